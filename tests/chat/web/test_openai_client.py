"""openai 的 Python 客户端：收发都由它的类型检查；没有装它时跳过。"""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

types = pytest.importorskip("openai.types")
pagination = pytest.importorskip("openai.pagination")
chat_types = pytest.importorskip("openai.types.chat")

pytest_plugins = ["web_server"]
MESSAGES = [{"role": "system", "content": "你是猫"}, {"role": "user", "content": "你好"}]


@pytest.fixture
def client(start_server):
    server = start_server(api_key="secret")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_client_chats_with_and_without_a_stream(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["parrot"]
    types.Model.model_validate(models[0].model_dump(), strict=True)
    options = {"model": "parrot", "messages": MESSAGES, "seed": 1, "n": 2}
    extra = {"top_k": 5, "repetition_penalty": 1.1}
    whole = client.chat.completions.create(**options, extra_body=extra)
    chat_types.ChatCompletion.model_validate_json(whole.model_dump_json(), strict=True)
    texts = ["", ""]
    stream = client.chat.completions.create(
        **options, extra_body=extra, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        chat_types.ChatCompletionChunk.model_validate_json(chunk.model_dump_json(), strict=True)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunk.usage == whole.usage


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
    ],
)
def test_errors_become_the_exceptions_of_the_client(changes, error, client):
    options = {"model": "parrot", "messages": MESSAGES, **changes}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**options)
    assert caught.value.param == next(iter(changes))


def assert_fits(kind: type, fields: dict, *, own: tuple[str, ...] = ()) -> None:
    """每个字段都是 kind 里有的，类型照 kind 的严格检查；own 是我们多出来的。"""
    kind.model_validate(fields, strict=True)
    assert set(fields) <= {*kind.model_fields, *own}


def test_everything_sent_has_the_fields_and_types_of_openai(start_server, make_bot):
    """直接看发出来的字节：客户端自己会补上缺的字段。"""
    completion, chunk = chat_types.ChatCompletion, chat_types.ChatCompletionChunk
    for num_candidates in (1, 3):
        server = start_server(make_bot(num_candidates=num_candidates), api_key="secret")
        headers = {"Authorization": "Bearer secret"}
        asked = {"messages": MESSAGES, "n": 2, "stream_options": {"include_usage": True}}
        whole = server.post(asked, **headers).json
        assert_fits(completion, whole)
        own = ("candidates",) if num_candidates > 1 else ()
        for choice in whole["choices"]:
            assert_fits(chat_types.chat_completion.Choice, choice, own=own)
            assert_fits(chat_types.ChatCompletionMessage, choice["message"])
        assert_fits(types.CompletionUsage, whole["usage"])
        *chunks, done = server.post({**asked, "stream": True}, **headers).events
        assert done == "[DONE]"
        for fields in chunks:
            assert_fits(chunk, fields)
            for choice in fields["choices"]:
                assert_fits(chat_types.chat_completion_chunk.Choice, choice, own=own)
                assert_fits(chat_types.chat_completion_chunk.ChoiceDelta, choice["delta"])
    models = server.ask("GET", "/v1/models", **headers).json
    assert_fits(pagination.SyncPage[types.Model], models)
    for card in (*models["data"], server.ask("GET", "/v1/models/parrot", **headers).json):
        assert_fits(types.Model, card)


def test_every_error_has_the_fields_and_types_of_openai(start_server, monkeypatch):
    server = start_server(api_key="secret", max_rows=1, max_waiting=0)
    headers = {"Authorization": "Bearer secret"}
    replies = [
        server.post(b"{", **headers),
        server.post({"messages": []}),
        server.post(b"x" * 1_000_001, **headers),
        server.post({"messages": MESSAGES, "model": "gpt"}, **headers),
        server.ask("GET", "/v1/models/gpt", **headers),
        server.ask("GET", "/nothing"),
        server.ask("PUT", "/health"),
        server.ask("GET", "/health", Host="evil"),
        server.ask("GET", "/health", Origin="http://evil"),
        server.post(b"{}", **headers, Content_Type="text/plain"),
        server.post({"messages": MESSAGES, "n": 2}, **headers),
    ]
    monkeypatch.setattr(server.service.scheduler, "check_room", lambda *counts: 1 / 0)
    replies.append(server.post({"messages": MESSAGES}, **headers))
    found = [reply.status for reply in replies]
    assert found == [400, 401, 413, 404, 404, 404, 405, 421, 403, 415, 400, 500]
    for reply in replies:
        assert set(reply.json) == {"error"}
        assert_fits(types.shared.ErrorObject, reply.json["error"])


def test_wrong_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
