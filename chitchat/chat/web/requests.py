"""请求体 → 要做的事：按 OpenAI 的 chat/completions 读字段，旋钮照 options 的表检查。"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chitchat.chat.options import KNOBS, SamplingOptions
from chitchat.chat.web.errors import MAX_SHOWN, ApiError, invalid, shown
from chitchat.errors import UserError
from chitchat.files import parse_json

SPEAKERS = ("user", "assistant")
LEFT_OUT = ("system", "developer")
MAX_STOPS = 4
MAX_MESSAGES = 2048  # 与 OpenAI 相同；一条消息的段数也是
MAX_FIELDS = 1000  # 十万个没有用的字段，光是排序就要让别人等
OWN_FIELDS = ("model", "messages", "stream", "stream_options", "n", "stop", "seed")
LENGTH_FIELDS = ("max_completion_tokens", "max_tokens", "max_len")
# 给出这些值等于没有给；别的值做不到，要说清楚。
UNSUPPORTED = {
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class ChatRequest:
    """一个请求要做的事。

    Attributes:
        history: 各句，最新的在最后，至少一句。
        options: 采样的旋钮。
        num_choices: 要几个回复。
        stops: 遇到其中任何一个就停，它本身不算在回复里。
        seed: 随机种子，None 表示每次不同。
        is_stream: 是否边生成边发。
        has_usage: 边生成边发时，最后要不要报 token 数。
        ignored: 没有作用的字段，包括 system 消息。
    """

    history: tuple[str, ...]
    options: SamplingOptions
    num_choices: int
    stops: tuple[str, ...]
    seed: int | None
    is_stream: bool
    has_usage: bool
    ignored: tuple[str, ...]


def parse_chat_request(
    body: bytes, defaults: SamplingOptions, *, model_id: str, max_choices: int
) -> ChatRequest:
    """读请求体。

    Args:
        body: JSON。
        defaults: 服务器的旋钮；回复长度和历史句数不能超过它的。
        model_id: 模型的名字。
        max_choices: n 最大是几。

    Raises:
        ApiError: 不是 JSON，或某个字段不对。
    """
    fields = _parse_json(body)
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("model", f"应为文字，得到 {shown(model)}")
    if model not in (None, "", model_id):
        message = f"没有模型 {shown(model)}：这里只有 {model_id!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    for name, allowed in UNSUPPORTED.items():
        if fields.get(name) is not None and fields[name] not in allowed:
            raise invalid(name, "这个模型不支持，请去掉它")
    history, left_out = _read_messages(fields.get("messages"))
    stream_options = fields.get("stream_options")
    if not isinstance(stream_options, Mapping | None):
        raise invalid("stream_options", f"应为对象，得到 {shown(stream_options)}")
    given = {name for name, value in fields.items() if value is not None}
    known = {*OWN_FIELDS, *LENGTH_FIELDS, *UNSUPPORTED, *(k.field for k in KNOBS.values())}
    return ChatRequest(
        history=history,
        options=_read_options(fields, defaults),
        num_choices=_read_int(fields, "n", 1, max_choices) or 1,
        stops=_read_stops(fields.get("stop")),
        seed=_read_int(fields, "seed", None, None),
        is_stream=_read_bool(fields, "stream"),
        has_usage=_read_bool(stream_options or {}, "include_usage"),
        ignored=(*left_out, *sorted(given - known)),
    )


def _parse_json(body: bytes) -> Mapping[str, object]:
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise invalid(None, f"请求体不是 JSON（{str(error)[:MAX_SHOWN]}）") from None
    if not isinstance(fields, dict):
        raise invalid(None, f"请求体应为 JSON 对象，得到 {shown(fields)}")
    if len(fields) > MAX_FIELDS:
        raise invalid(None, f"最多 {MAX_FIELDS} 个字段，得到 {len(fields)} 个")
    return fields


def _read_messages(messages: object) -> tuple[tuple[str, ...], list[str]]:
    """各句，以及略去的消息的种类。"""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", f"应为至少一条消息的列表，得到 {shown(messages)}")
    if len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"最多 {MAX_MESSAGES} 条，得到 {len(messages)} 条")
    history, left_out, last = [], [], ""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise invalid(where, f"应为对象，得到 {shown(message)}")
        role = message.get("role")
        if role not in (*SPEAKERS, *LEFT_OUT):
            known = "、".join((*SPEAKERS, *LEFT_OUT))
            raise invalid(f"{where}.role", f"应为 {known} 之一，得到 {shown(role)}")
        text = _read_content(message.get("content"), f"{where}.content", role)
        if role in LEFT_OUT:
            left_out = ["system"]
            continue
        last = text
        if text:
            history.append(text)
    if not last:
        raise invalid("messages", "最后一句是空的，没有可以回答的话")
    return tuple(history), left_out


def _read_content(content: object, where: str, role: str) -> str:
    """一条消息的文字，去掉两端的空白；可以是分成几段的。"""
    if content is None and role == "assistant":
        return ""
    if isinstance(content, list):
        if len(content) > MAX_MESSAGES:
            raise invalid(where, f"最多 {MAX_MESSAGES} 段，得到 {len(content)} 段")
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text":
                raise invalid(f"{where}[{i}]", f'只支持文字（"type": "text"），得到 {shown(kind)}')
            if not isinstance(part.get("text"), str):
                raise invalid(f"{where}[{i}].text", f"应为文字，得到 {shown(part.get('text'))}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise invalid(where, f"应为文字，得到 {shown(content)}")
    # JSON 里可以写出半个 emoji，它不是文字
    return content.encode("utf-8", "replace").decode().strip()


def _read_options(fields: Mapping[str, object], defaults: SamplingOptions) -> SamplingOptions:
    """请求里的旋钮；说了温度就照它：0 是总取最可能的，大于 0 就采样；max_tokens 是回复的长度。"""
    changes: dict[str, object] = {}
    for knob in KNOBS.values():
        value = fields.get(knob.field)
        if value is None or knob.field == "max_len":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(knob.field, f"应为数，得到 {shown(value)}")
        if knob.field == "temperature":
            changes["greedy"] = value == 0
            if value == 0:
                continue
        try:
            changes[knob.field] = knob.read(value)
        except UserError as error:
            raise invalid(knob.field, str(error)) from None
    if "max_history_len" in changes:
        changes["max_history_len"] = min(changes["max_history_len"], defaults.max_history_len)
    limits = [_read_int(fields, name, 1, None) for name in LENGTH_FIELDS]
    max_len = min([defaults.max_len, *(limit for limit in limits if limit is not None)])
    return dataclasses.replace(defaults, **changes, max_len=max_len)


def _read_stops(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise invalid("stop", f"应为不空的文字，或它们的列表，得到 {shown(stop)}")
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"最多 {MAX_STOPS} 个，得到 {len(stops)} 个")
    return tuple(stops)


def _read_int(
    fields: Mapping[str, object], name: str, minimum: int | None, maximum: int | None
) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    limits: Sequence[str] = [
        f"{text} {limit}"
        for text, limit in (("不小于", minimum), ("不大于", maximum))
        if limit is not None
    ]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_within = is_whole and (minimum is None or value >= minimum)
    if not is_within or (maximum is not None and value > maximum):
        raise invalid(name, f"应为整数{''.join(f'，{x}' for x in limits)}，得到 {shown(value)}")
    return value


def _read_bool(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise invalid(name, f"应为 true 或 false，得到 {shown(value)}")
    return bool(value)
