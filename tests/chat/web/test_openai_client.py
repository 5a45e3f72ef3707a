"""openai 的 Python 客户端：收发都由它的类型检查；没有装它时跳过。"""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

types = pytest.importorskip("openai.types")
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


def test_wrong_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
