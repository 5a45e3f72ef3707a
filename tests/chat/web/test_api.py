"""真的服务器，真的连接：回复、流、一起生成、走开的人、门。"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from serving import OPTIONS, PATH, wait_for

from chitchat.chat.context import build_context
from chitchat.chat.generation import Batch
from chitchat.tokens.tokenizer import decode_response, encode_utterances

pytest_plugins = ["web_server"]


def reply_alone(server, text: str, seed: int, **changes: object) -> str:
    """不经过服务器，单独生成的回复。"""
    bot = server.service.bot
    history = encode_utterances(bot.tokenizer, [text])
    options = dataclasses.replace(OPTIONS, **changes)
    return "".join(bot.reply(history, options, random.Random(seed)))


@pytest.fixture
def slow(monkeypatch):
    """服务器的每一步至少 20 毫秒；单独生成的不必等。"""
    step = Batch.step

    def wait_first(self):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Batch, "step", wait_first)


def test_reply_has_every_field_of_openai(server):
    reply = server.chat("你好", seed=1)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    body = reply.json
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("chat.completion", "parrot")
    (choice,) = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["total_tokens"] == 4 + body["usage"]["completion_tokens"]


def test_stream_adds_up_to_the_whole_reply(server):
    whole = server.chat("你好", seed=1).json
    reply = server.chat("你好", seed=1, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = reply.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    text = "".join(delta["content"] for delta in deltas[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]


def test_forty_at_once_each_get_the_reply_they_get_alone(server, slow):
    """旋钮、种子各不相同，一起来；超过一批的在排队。"""
    knobs = [{}, {"temperature": 1.5, "top_k": 0}, {"top_p": 0.7}, {"max_tokens": 4}]
    names = {"max_tokens": "max_len"}

    def ask(i: int) -> str:
        time.sleep(0.01 * (i % 7))
        return server.chat("你好" * (1 + i % 5), seed=i, **knobs[i % 4]).text

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(40)))
    for i, text in enumerate(found):
        changes = {names.get(name, name): value for name, value in knobs[i % 4].items()}
        assert text == reply_alone(server, "你好" * (1 + i % 5), i, **changes)
    assert len(set(found)) > 30


def test_n_choices_are_different_and_the_first_is_that_of_the_seed(server):
    choices = server.chat("你好", n=4, seed=7).json["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts[0] == reply_alone(server, "你好", 7)
    streamed = [""] * 4
    for chunk in server.chat("你好", n=4, seed=7, stream=True).events[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_the_whole_conversation_is_the_context(server):
    history = ["你好", "早上好", "你是谁"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, history, strict=True)]
    system = [{"role": "system", "content": "你是猫"}]
    bot = server.service.bot
    ids = encode_utterances(bot.tokenizer, history)
    expected = "".join(bot.reply(ids, OPTIONS, random.Random(3)))
    reply = server.post({"messages": [*system, *messages], "seed": 3})
    assert reply.text == expected
    context, _ = build_context(ids, ids=bot.ids, max_history_len=5, max_tokens=40)
    assert reply.json["usage"]["prompt_tokens"] == len(context)


def test_a_literal_sep_stays_text(server):
    assert server.chat("[SEP]", seed=1).json["usage"]["prompt_tokens"] > 3


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stop_ends_the_reply_before_it_wherever_the_pieces_break(server, size):
    text = reply_alone(server, "你好", 5)
    stop = text[4 : 4 + size]
    for is_stream in (False, True):
        reply = server.chat("你好", seed=5, stop=["不会出现", stop], stream=is_stream)
        if is_stream:
            choices = [chunk["choices"][0] for chunk in reply.events[:-1]]
            found = "".join(choice["delta"].get("content", "") for choice in choices)
            assert choices[-1]["finish_reason"] == "stop"
        else:
            found = reply.text
            assert reply.json["choices"][0]["finish_reason"] == "stop"
        assert found == text[: text.index(stop)]
    server.wait_until_idle()


def test_finish_reason_length_is_that_of_max_tokens(server):
    reply = server.chat("你好", seed=5, max_tokens=2).json
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_candidates_are_listed_best_first(start_server, make_bot):
    server = start_server(make_bot(num_candidates=5))
    (choice,) = server.chat("你好", seed=1).json["choices"]
    candidates = choice["candidates"]
    assert candidates[0]["text"] == choice["message"]["content"]
    assert len(candidates) > 1
    scores = [candidate["likelihood"] for candidate in candidates]
    assert scores == sorted(scores, reverse=True)
    assert choice["message"]["content"] == reply_alone(server, "你好", 1)
    last = server.chat("你好", seed=1, stream=True).events[-2]["choices"][0]
    assert last["candidates"] == candidates


def leave_early(server, fields: dict, num_bytes: int) -> None:
    """问了就走：读到 num_bytes 个字节就断开。"""
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], **fields}).encode()
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        if num_bytes:
            while num_bytes > 0:
                num_bytes -= len(connection.recv(num_bytes))
        else:
            wait_for(lambda: server.service.scheduler.num_running > 0)


@pytest.mark.parametrize(("is_stream", "num_bytes"), [(True, 400), (False, 0), (True, 0)])
def test_a_client_that_leaves_frees_its_row_at_once(
    is_stream, num_bytes, start_server, monkeypatch
):
    step, steps = Batch.step, []

    def slowly(self):
        steps.append(self.num_rows)
        time.sleep(0.05)
        return step(self)

    server = start_server()
    monkeypatch.setattr(Batch, "step", slowly)
    leave_early(server, {"stream": is_stream, "temperature": 9, "top_k": 0}, num_bytes)
    num_steps = len(steps)
    server.wait_until_idle()
    assert len(steps) - num_steps < 8  # 一句有 20 步
    assert server.chat("你好", seed=1, max_tokens=1).status == 200


def test_full_queue_is_503_with_retry_after_and_nobody_gets_the_words_of_another(
    start_server, slow
):
    server = start_server(max_rows=2, max_waiting=3)
    barrier = threading.Barrier(20)

    def ask(i: int):
        barrier.wait()
        return server.chat("你好", seed=i)

    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(ask, range(20)))
    refused = [reply for reply in replies if reply.status == 503]
    assert 0 < len(refused) < 20
    for reply in refused:
        assert reply.headers["retry-after"] == "2"
        assert reply.json["error"]["type"] == "server_error"
    for i, reply in enumerate(replies):
        if reply.status == 200:
            assert reply.text == reply_alone(server, "你好", i)
    server.wait_until_idle()
    assert server.chat("你好", seed=1).status == 200


def test_failing_step_is_told_and_the_next_request_is_answered(server, monkeypatch, caplog):
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: 1 / 0)
    logging.getLogger("uvicorn.error").disabled = True
    assert server.chat("你好").status == 500
    assert "error" in server.chat("你好", stream=True).events[-1]
    monkeypatch.setattr(Batch, "step", step)
    assert server.chat("你好", seed=1).text == reply_alone(server, "你好", 1)


def test_models_health_and_knobs(server):
    (card,) = server.ask("GET", "/v1/models").json["data"]
    assert set(card) == {"id", "object", "created", "owned_by"}
    assert server.ask("GET", "/v1/models/parrot").json == card
    assert server.ask("GET", "/v1/models/other").status == 404
    assert server.ask("GET", "/health").json == {"status": "ok", "running": 0, "waiting": 0}
    knobs = {knob["field"]: knob for knob in server.ask("GET", "/v1/knobs").json["knobs"]}
    assert knobs["max_len"]["default"] == OPTIONS.max_len
    assert (knobs["top_p"]["minimum"], knobs["top_p"]["maximum"]) == (0, 1)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", PATH, 405), ("POST", "/health", 405), ("POST", "/", 405)],
)
def test_wrong_address_or_method_is_an_error_of_openai(method, path, status, server):
    reply = server.ask(method, path)
    assert reply.status == status
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in reply.headers) == (status == 405)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        ({"messages": []}, {}, 400),
        (b"{}", {"Content_Type": "text/plain"}, 415),
        (b"{}", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        (b'{"messages":"' + b"a" * 1_000_001 + b'"}', {}, 413),
        ({"messages": [], "model": "gpt"}, {}, 404),
        (b"{}", {"Host": "evil.example"}, 421),
        (b"{}", {"Host": "evil.example:8000"}, 421),
        (b"{}", {"Host": ""}, 421),
        (b"{}", {"Host": "127.evil.example"}, 421),
        (b"{}", {"Host": "127.0.0.1.evil.example"}, 421),
        (b"{}", {"Host": "[::1"}, 421),
        (b"{}", {"Origin": "http://evil.example"}, 403),
        (b"{}", {"Origin": "null"}, 403),
        (b"{}", {"Origin": "http://localhost:1"}, 403),
    ],
)
def test_refused_requests_have_the_right_status(body, headers, status, server):
    reply = server.post(body, **headers)
    assert reply.status == status
    assert reply.json["error"]["message"]
    assert "access-control-allow-origin" not in reply.headers


def test_body_without_a_length_is_cut_at_a_megabyte_too(server):
    with contextlib.closing(server.connect()) as connection:
        parts = (b"x" * 100_000 for _ in range(11))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", PATH, parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "127.1.2.3"]
)
def test_names_of_this_machine_are_accepted(host, server):
    assert server.ask("GET", "/health", Host=host).status == 200


def test_own_page_may_ask(server):
    assert server.chat("你好").status == 200
    reply = server.post({"messages": [{"role": "user", "content": "你好"}]}, Origin=server.url)
    assert reply.status == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "secret", "Bearer secretx"])
def test_key_is_asked_for(header, start_server):
    server = start_server(api_key="secret")
    headers = {} if header is None else {"Authorization": header}
    reply = server.post({"messages": []}, **headers)
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.json["error"]["code"] == "invalid_api_key"
    assert server.ask("GET", "/v1/models", **headers).status == 401
    assert server.ask("GET", "/v1/models", Authorization="Bearer secret").status == 200
    assert server.ask("GET", "/health").status == server.ask("GET", "/").status == 200


@pytest.mark.parametrize("host", ["x?", "x#", "x/?"])
def test_broken_host_is_no_way_around_the_key(host, start_server):
    """路径要取自请求行，不能取自由 Host 拼出的网址；只在本机时 Host 本身就不对。"""
    server = start_server(api_key="secret")
    assert server.post({"messages": []}, Host=host).status in (400, 401, 421)


def test_broken_origin_is_refused_like_any_other(server):
    assert server.ask("GET", "/health", Origin="http://[").status == 403


def test_cors_is_for_the_named_site_only(start_server):
    server = start_server(cors="http://localhost:3000", api_key="secret")
    asked = {"Access_Control_Request_Method": "POST"}
    asked["Access_Control_Request_Headers"] = "authorization,content-type"
    allowed = server.ask("OPTIONS", PATH, Origin="http://localhost:3000", **asked)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
    refused = server.ask("OPTIONS", PATH, Origin="http://evil.example", **asked)
    assert refused.status == 400
    assert "access-control-allow-origin" not in refused.headers
    reply = server.post(
        {"messages": []}, Origin="http://localhost:3000", Authorization="Bearer secret"
    )
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (
        400,
        "http://localhost:3000",
    )


def test_cors_lets_the_client_for_javascript_send_all_its_headers(start_server):
    server = start_server(cors="http://localhost:3000")
    asked = {"Access_Control_Request_Method": "POST", "Origin": "http://localhost:3000"}
    wanted = "authorization,content-type,x-stainless-arch,x-stainless-retry-count,x-new"
    reply = server.ask("OPTIONS", PATH, Access_Control_Request_Headers=wanted, **asked)
    assert reply.status == 200
    assert reply.headers["access-control-allow-headers"] == wanted


def test_a_temperature_is_sampled_with_though_the_server_is_greedy(start_server):
    server = start_server(options=dataclasses.replace(OPTIONS, greedy=True))
    assert len({server.chat("你好", seed=i).text for i in range(4)}) == 1
    sampled = {server.chat("你好", seed=i, temperature=1.5).text for i in range(4)}
    assert len(sampled) > 1


@pytest.mark.parametrize("seed", [-1, 0, 2**64, -(10**4000)])
def test_any_integer_is_a_seed(seed, server):
    replies = [server.chat("你好", seed=seed, n=2) for _ in range(2)]
    assert [reply.status for reply in replies] == [200, 200]
    assert replies[0].json["choices"] == replies[1].json["choices"]


def test_errors_outside_the_body_repeat_only_a_little_too(server):
    long = "a" * 5000
    replies = [
        server.ask("GET", f"/{long}"),
        server.ask(long[:50], f"/health{long}"),
        server.ask("GET", f"/v1/models/{long}"),
        server.ask("GET", "/health", Host=long),
        server.ask("GET", "/health", Origin=f"http://{long}"),
        server.post(b"{}", Content_Type=long),
    ]
    assert [reply.status for reply in replies] == [404, 404, 404, 421, 403, 415]
    assert all(len(reply.json["error"]["message"]) < 160 for reply in replies)


def test_each_request_is_one_line_of_the_log_without_what_was_said(server, caplog):
    logger = logging.getLogger("chitchat")
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger="chitchat"):
        server.chat("你好", seed=1)
        server.ask("GET", "/a b\n".replace("\n", "%0a").replace(" ", "%20"))
        server.post({"messages": [{"role": "system", "content": ""}] * 2})
        for _ in range(2):
            server.chat("你好", seed=1, user="x", max_tokens=1)
        wait_for(lambda: sum("path=" in r.getMessage() for r in caplog.records) == 5)
    lines = [record.getMessage() for record in caplog.records if "path=" in record.getMessage()]
    assert all(line.isascii() and "\n" not in line for line in lines)
    assert "method=POST path=/v1/chat/completions status=200" in lines[0]
    assert "prompt_tokens=4 completion_tokens=" in lines[0]
    assert "status=404" in lines[1]
    assert sum(record.getMessage() == "ignored=user" for record in caplog.records) == 1


def test_chat_log_of_the_day_has_every_turn(server, tmp_path):
    texts = [server.chat(text, seed=i).text for i, text in enumerate(["你好", "晚\n\n安"])]
    server.wait_until_idle()
    (path,) = (tmp_path / "web").iterdir()
    assert path.name == time.strftime("%Y-%m-%d.txt")
    if os.name != "nt":
        assert path.stat().st_mode & 0o777 == 0o600
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("聊天记录20")] == [
        "user:你好",
        *(f"chatbot:{line}" for line in texts[0].splitlines()),
        "user:晚",
        "user:安",
        *(f"chatbot:{line}" for line in texts[1].splitlines()),
    ]


def test_text_is_decoded_as_in_the_terminal(server):
    bot = server.service.bot
    reply = bot.reply([[110]], OPTIONS, random.Random(1))
    assert "".join(reply) == decode_response(bot.tokenizer, reply.token_ids)
