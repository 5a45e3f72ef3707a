"""连接：太多、太慢、不读、半路走开的，都不妨碍别人，也不在日志里留下 traceback。"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from serving import PATH, wait_for

from chitchat.chat.generation import Batch
from chitchat.chat.web import api, connections

pytest_plugins = ["web_server"]

HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HELLO = {"messages": [{"role": "user", "content": "你好"}], "temperature": 9, "top_k": 0}


@pytest.fixture
def few(monkeypatch):
    """最多 4 个连接。"""
    monkeypatch.setattr("chitchat.chat.web.server.connection_limit", lambda: 4, raising=False)


@pytest.fixture
def lines(caplog):
    """日志里到现在为止的各行。"""
    logging.getLogger("chitchat").propagate = True
    caplog.set_level(logging.INFO, logger="chitchat")
    return lambda: caplog.records


@pytest.fixture
def slow(monkeypatch):
    step = Batch.step

    def slowly(self):
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Batch, "step", slowly)


@pytest.fixture
def dial():
    """拨号的函数；结束时全部挂断。"""
    with contextlib.ExitStack() as stack:

        def connect(server, data: bytes = b"") -> socket.socket:
            address = ("127.0.0.1", server.port)
            connection = stack.enter_context(socket.create_connection(address, timeout=20))
            connection.sendall(data)
            return connection

        yield connect


def request(fields: dict, size: int | None = None) -> bytes:
    body = json.dumps(fields).encode()
    return f"{HEAD}Content-Length: {size or len(body)}\r\n\r\n".encode() + body


def is_closed(connection: socket.socket) -> bool:
    """对方有没有关掉；收到的都读掉。"""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def seconds_until_closed(connection: socket.socket, drip: bytes) -> float:
    start = time.monotonic()
    while not is_closed(connection):
        assert time.monotonic() - start < 5, "still open"
        time.sleep(0.02)
        with contextlib.suppress(OSError):
            connection.send(drip)
    return time.monotonic() - start


def test_idle_connections_make_room_for_those_who_ask(few, start_server, dial):
    server = start_server()
    idle = [dial(server, b"GET /health HTTP/1.1\r\n"[: 5 * (i % 2)]) for i in range(30)]
    assert server.chat("你好").status == 200
    wait_for(lambda: sum(map(is_closed, idle)) >= 26, seconds=5)
    assert server.chat("你好").status == 200


def test_when_all_are_being_answered_the_next_is_told_503_and_nobody_is_cut_off(
    few, start_server, slow
):
    server = start_server(cors="http://a.b")
    with ThreadPoolExecutor(8) as pool:
        talks = [pool.submit(server.chat, "你好", stream=True) for _ in range(4)]
        wait_for(lambda: server.service.scheduler.num_running == 4)
        refused = server.chat("你好")
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        assert refused.json["error"]["code"] == "too_many_connections"
        assert all(talk.result().events[-1] == "[DONE]" for talk in talks)
    assert server.chat("你好").status == 200


BODY = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "drip"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\n", b""),
        (b"GET / HTTP/1.1\r\nX: ", b"a"),
        (WHOLE + b"GET / HT", b"a"),
        (BODY, b"a"),
        (HEAD.encode() + b"Content-Length: 1000\r\n\r\n", b"a"),
    ],
)
def test_a_request_that_never_ends_is_cut_off(data, drip, start_server, dial, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(api, "BODY_SECONDS", 0.5)
    connection = dial(start_server(), data)
    assert 0.3 < seconds_until_closed(connection, drip) < 3


def test_who_never_reads_is_cut_off(start_server, dial, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    server = start_server()
    connection = dial(server)
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(500):
            connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(1)
    received = 0
    connection.settimeout(5)
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 20):
            received += len(part)
    page = len(server.ask("GET", "/").body)
    assert received < 450 * page


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("how", ["body", "close", "half"])
def test_who_leaves_in_mid_request_is_a_499_without_a_traceback(
    how, is_stream, server, slow, dial, lines
):
    size = 9999 if how == "body" else None
    connection = dial(server, request({**HELLO, "stream": is_stream}, size))
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
    else:
        time.sleep(0.1)
        connection.close()
    wait_for(lambda: any("status=" in line.getMessage() for line in lines()), seconds=5)
    server.wait_until_idle()
    told = [line.getMessage() for line in lines() if "status=" in line.getMessage()]
    assert len(told) == 1
    assert " status=499 " in told[0]
    assert not [line.getMessage() for line in lines() if line.exc_info]


def test_garbage_leaves_one_line_and_no_traceback(server, dial, lines):
    for data in [
        b"\x16\x03\x01\x02\x00" * 50,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\nmore",
        WHOLE + b"\x00" * 100,
        request(HELLO) + b"\x00" * 100,
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD.encode() + b"Content-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000,
        WHOLE[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ]:
        connection = dial(server, data)
        for more in (b"more", b"\r\n\r\n"):
            time.sleep(0.02)
            with contextlib.suppress(OSError):
                connection.sendall(more)
    assert server.chat("你好").status == 200
    server.wait_until_idle()
    time.sleep(0.1)
    assert not [line.getMessage() for line in lines() if line.exc_info]
    assert len(lines()) < 30


def test_the_next_request_on_a_connection_does_not_wait_for_the_40_ms_of_nagle(server):
    body, headers = json.dumps({**HELLO, "max_tokens": 1}), {"Content-Type": "application/json"}
    waits = []
    with contextlib.closing(server.connect()) as connection:
        for _ in range(20):
            start = time.perf_counter()
            connection.request("POST", PATH, body.encode(), headers)
            assert connection.getresponse().read()
            waits.append(time.perf_counter() - start)
    assert sorted(waits)[10] < 0.03


def test_a_full_table_of_files_is_one_line_of_the_log(lines):
    tell = connections.LoopErrors()
    error = OSError(24, "Too many open files")
    for _ in range(1000):
        tell(None, {"message": "socket.accept() out of system resource", "exception": error})
    assert [line.getMessage() for line in lines() if line.name == connections.__name__] == [
        "event loop: socket.accept() out of system resource (OSError)"
    ]


MANY_FIELDS = ",".join(f'"a{i}":1' for i in range(80_000))


@pytest.mark.parametrize(
    "raw",
    [
        '{"max_tokens":1,"messages":[{"role":"user","content":"' + "你 " * 248_000 + '"}]}',
        "{" + MANY_FIELDS + "}",
    ],
    ids=["text", "fields"],
)
def test_many_megabytes_do_not_keep_the_others_waiting(raw, server):
    """大家同时贴来一兆字节，已经在说的和只说一句的都不停。"""
    is_over = threading.Event()

    def paste() -> int:
        status = 0
        while not is_over.is_set():
            status = server.post(raw.encode()).status
        return status

    with ThreadPoolExecutor(12) as pool:
        pasting = [pool.submit(paste) for _ in range(12)]
        time.sleep(1)
        waits = []
        for i in range(10):
            start = time.monotonic()
            assert server.chat("你好", seed=i, temperature=9, top_k=0).status == 200
            waits.append(time.monotonic() - start)
        is_over.set()
        assert {future.result() for future in pasting} <= {200, 400, 503}
    assert sorted(waits)[5] < 1.0, waits


def test_a_full_queue_refuses_before_anything_is_encoded(start_server, slow, monkeypatch):
    server = start_server(max_rows=1, max_waiting=1)
    bot, encoded = server.service.bot, []
    build = bot.build_context
    monkeypatch.setattr(bot, "build_context", lambda *a: encoded.append(1) or build(*a))
    with ThreadPoolExecutor(2) as pool:
        talks = [pool.submit(server.chat, "你好", temperature=9, top_k=0)]
        wait_for(lambda: server.service.scheduler.num_running == 1)
        talks += [pool.submit(server.chat, "你好", temperature=9, top_k=0)]
        wait_for(lambda: server.service.scheduler.num_waiting == 1)
        assert [server.chat("你好").status for _ in range(5)] == [503] * 5
        assert {talk.result().status for talk in talks} == {200}
    assert len(encoded) == 2


def test_each_step_takes_in_a_bounded_number_of_new_tokens(start_server, monkeypatch):
    """已经在说的每一步都要轮到：一次送入的新 token 有数；同一个请求的几个回复只送入一次。"""
    monkeypatch.setattr("chitchat.chat.web.scheduler.MAX_PREFILL", 50, raising=False)
    step, sizes = Batch.step, []

    def counted(self):
        sizes.append(sum(g.input_ids.numel() for g in self._groups if g.cache.length == 0))
        time.sleep(0.02)
        return step(self)

    server = start_server()
    monkeypatch.setattr(Batch, "step", counted)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(server.chat, "你好" * 10, seed=i) for i in range(16)]
        assert {future.result().status for future in asked} == {200}
    assert max(sizes) <= 50
    assert sum(sizes) == 16 * 22
    sizes.clear()
    assert len(server.chat("你好" * 10, n=8).json["choices"]) == 8
    assert sum(sizes) == 22
