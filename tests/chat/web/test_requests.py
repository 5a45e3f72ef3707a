"""写错的请求：每个都有合适的状态和一句话，OpenAI 的格式。"""

import json

import pytest

from chitchat.chat.options import SamplingOptions
from chitchat.chat.web.errors import ApiError
from chitchat.chat.web.requests import parse_chat_request

HELLO = [{"role": "user", "content": "你好"}]
PART = {"type": "text", "text": "你"}
SYSTEM = {"role": "system", "content": "你是猫"}


def parse(fields: object, **limits: int):
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    options = SamplingOptions(max_len=20, max_history_len=5)
    return parse_chat_request(body, options, model_id="base", **{"max_choices": 8, **limits})


# (请求体, 状态, param, 消息里有的)
MALFORMED = [
    (b"", 400, None, "JSON"),
    (b"{", 400, None, "JSON"),
    (b"\xff\xfe", 400, None, "JSON"),
    (b"[" * 100_000, 400, None, "JSON"),
    (b"9" * 5000, 400, None, "JSON"),
    (b"[]", 400, None, "JSON 对象"),
    (b"null", 400, None, "null"),
    ({}, 400, "messages", "null"),
    ({"messages": []}, 400, "messages", "[]"),
    ({"messages": "你好"}, 400, "messages", "列表"),
    ({"messages": ["你好"]}, 400, "messages[0]", "对象"),
    ({"messages": [{"content": "你好"}]}, 400, "messages[0].role", "user"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "tool"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "messages[0].role", "user"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "3"),
    ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages", "空的"),
    ({"messages": [{"role": "system", "content": "你是谁"}]}, 400, "messages", "空的"),
    ({"messages": [*HELLO, {"role": "user", "content": ""}]}, 400, "messages", "空的"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0]",
        "image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "text": "你"}]}]},
        400,
        "messages[0].content[0]",
        "text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages[0].content[0].text",
        "null",
    ),
    ({"messages": [{"role": "user", "content": ""}, SYSTEM]}, 400, "messages", "空的"),
    ({"messages": [SYSTEM, {"role": "user", "content": ""}]}, 400, "messages", "空的"),
    ({"messages": [*HELLO, {"role": "user", "content": ""}, SYSTEM]}, 400, "messages", "空的"),
    ({"messages": HELLO * 2049}, 400, "messages", "2048"),
    ({"messages": [{"role": "user", "content": [PART] * 2049}]}, 400, "messages[0].content", "段"),
    ({f"a{i}": 1 for i in range(1001)}, 400, None, "字段"),
    ({"model": "gpt-4o"}, 404, "model", "base"),
    ({"model": 3}, 400, "model", "3"),
    ({"temperature": -1}, 400, "temperature", "大于 0"),
    ({"temperature": "hot"}, 400, "temperature", "hot"),
    ({"temperature": True}, 400, "temperature", "true"),
    (b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}', 400, "temperature", "nan"),
    (b'{"messages":[{"role":"user","content":"a"}],"top_p":1e999}', 400, "top_p", "inf"),
    ({"temperature": "0.5"}, 400, "temperature", "应为数"),
    ({"top_k": "5"}, 400, "top_k", "应为数"),
    ({"max_history_len": "5"}, 400, "max_history_len", "应为数"),
    ({"top_p": 1.1}, 400, "top_p", "不大于 1"),
    ({"top_k": 1.5}, 400, "top_k", "整数"),
    ({"top_k": -1}, 400, "top_k", "不小于 0"),
    ({"min_p": 2}, 400, "min_p", "不大于 1"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "大于 0"),
    ({"no_repeat_ngram_size": -1}, 400, "no_repeat_ngram_size", "不小于 0"),
    ({"max_history_len": 0}, 400, "max_history_len", "不小于 1"),
    ({"max_tokens": 0}, 400, "max_tokens", "不小于 1"),
    ({"max_completion_tokens": "5"}, 400, "max_completion_tokens", "整数"),
    ({"n": 0}, 400, "n", "不小于 1"),
    ({"n": 9}, 400, "n", "不大于 8"),
    ({"n": True}, 400, "n", "整数"),
    ({"seed": 1.5}, 400, "seed", "整数"),
    ({"stop": ""}, 400, "stop", "不空"),
    ({"stop": [1]}, 400, "stop", "不空"),
    ({"stop": ["a"] * 5}, 400, "stop", "最多 4"),
    ({"stream": 1}, 400, "stream", "true"),
    ({"stream_options": 1}, 400, "stream_options", "对象"),
    ({"stream_options": {"include_usage": 1}}, 400, "include_usage", "true"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "不支持"),
    ({"logprobs": True}, 400, "logprobs", "不支持"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "不支持"),
]


@pytest.mark.parametrize(("fields", "status", "param", "named"), MALFORMED)
def test_malformed_request_is_explained(fields, status, param, named):
    if isinstance(fields, dict) and fields and "messages" not in fields:
        fields = {"messages": HELLO, **fields}
    with pytest.raises(ApiError) as caught:
        parse(fields)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    assert len(error["message"]) < 300


HUGE = ["长" * 100_000, [["x"] * 1000] * 100, {"\ud800" * 1000: 1}, 10**4000, -(10**4000), 1e300]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: str(value)[:8])
def test_errors_repeat_only_a_little_of_what_came(value):
    wrong = [{"messages": [{"role": role, "content": value}]} for role in ("user", value)]
    wrong += [
        {"messages": [{"role": "user", "content": [part]}]} for part in (value, {"type": value})
    ]
    wrong += [{name: value} for name in ("model", "messages", "stop", "n", "stream")]
    wrong += [{name: value} for name in ("top_p", "min_p")]
    for fields in wrong[isinstance(value, str) :]:  # 文字可以是 content
        if fields == {"stop": value} and isinstance(value, str):
            continue
        with pytest.raises(ApiError) as caught:
            parse({"messages": HELLO, **fields})
        message = caught.value.body["error"]["message"]
        assert len(message.encode()) < 400
        assert len(message) < 160, fields.keys()


@pytest.mark.parametrize("depth", range(700, 1000, 4))
def test_depth_that_can_hardly_be_read_is_an_error_of_the_request(depth):
    with pytest.raises(ApiError):
        parse(b'{"messages":' + b"[" * depth + b"]" * depth + b"}")


def test_plain_request_takes_the_defaults_of_the_server():
    request = parse({"messages": HELLO})
    assert request.options == SamplingOptions(max_len=20, max_history_len=5)
    assert (request.history, request.num_choices, request.stops) == (("你好",), 1, ())
    assert (request.seed, request.is_stream, request.has_usage) == (None, False, False)
    assert request.ignored == ()
    nothing = dict.fromkeys(["temperature", "n", "stop", "seed", "stream", "max_tokens", "tools"])
    assert parse({"messages": HELLO, **nothing}) == request


def test_every_field_is_read():
    fields = {
        "model": "base",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5.0,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "max_history_len": 2,
        "max_tokens": 7,
        "n": 2,
        "stop": ["。"],
        "seed": 2**70,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "someone",
        "frequency_penalty": 1,
    }
    request = parse({"messages": HELLO, **fields})
    assert request.options == SamplingOptions(0.5, 5, 0.9, 0.1, 1.2, 3, 7, 2)
    assert (request.num_choices, request.stops, request.seed) == (2, ("。",), 2**70)
    assert request.is_stream
    assert request.has_usage
    assert request.ignored == ("frequency_penalty", "user")


def test_caps_of_the_server_hold():
    request = parse({"messages": HELLO, "max_tokens": 999, "max_history_len": 999})
    assert (request.options.max_len, request.options.max_history_len) == (20, 5)
    assert parse({"messages": HELLO, "max_completion_tokens": 3}).options.max_len == 3


@pytest.mark.parametrize(
    ("greedy", "fields", "expected"),
    [
        (False, {"temperature": 0}, True),
        (False, {"temperature": 0.5}, False),
        (True, {}, True),
        (True, {"top_k": 3}, True),
        (True, {"temperature": None}, True),
        (True, {"temperature": 0.0}, True),
        (True, {"temperature": 0.5}, False),
    ],
)
def test_temperature_0_is_greedy_and_any_other_is_not(greedy, fields, expected):
    body = json.dumps({"messages": HELLO, **fields}).encode()
    defaults = SamplingOptions(greedy=greedy)
    options = parse_chat_request(body, defaults, model_id="base", max_choices=8).options
    assert options.greedy is expected
    assert options.temperature == (fields.get("temperature") or 1)


def test_system_messages_are_left_out_and_parts_are_joined():
    messages = [
        {"role": "system", "content": "你是猫"},
        {"role": "developer", "content": "你是狗"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}],
        },
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "早", "name": "小柚"},
        {"role": "user", "content": "\ud800晚安 "},
    ]
    request = parse({"messages": messages})
    assert request.history == ("你好", "早", "?晚安")
    assert request.ignored == ("system",)
