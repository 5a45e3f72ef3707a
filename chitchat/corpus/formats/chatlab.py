"""ChatLab 交换格式 0.0.2。

JSON：``chatlab``、``meta``、``members``、``messages``；JSONL：每行有 ``_type``（header、member、
message），``#`` 开头的行是注释。消息的 ``type``：0 文字、25 回复（有文字），其余不是话。
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.formats.json_values import iterate_items, iterate_lines
from chitchat.corpus.messages import Message
from chitchat.corpus.times import parse_times

_KINDS = {
    0: "", 25: "", 1: "图片", 2: "语音", 3: "视频", 4: "文件", 5: "表情包", 7: "链接卡片",
    8: "位置", 20: "红包转账", 21: "红包转账", 22: "系统提示", 23: "通话", 24: "链接卡片",
    26: "转发", 27: "链接卡片", 80: "系统提示", 81: "撤回",
}  # fmt: skip


def _recognise(head: Head) -> str:
    shape = head.json
    if shape is None:
        return ""
    record = shape.record
    if isinstance(record, dict) and "_type" in record:
        return "各行有 _type"
    return "有 chatlab 一项" if "chatlab" in shape.keys.get("", []) else ""


def read_chatlab(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """逐条给出消息。"""
    shape = head.json
    if shape is not None and isinstance(shape.record, dict) and "_type" in shape.record:
        return _read(value for _, value in iterate_lines(file))
    owner = str(shape.scalars.get("meta.ownerId") or "") if shape else ""
    return _read(iterate_items(file, "messages.item"), owner)


def _read(values: Iterable[Any], owner: str = "") -> Iterator[Message]:
    chat, num_headers = "", 0
    for value in values:
        if not isinstance(value, dict):
            continue
        if value.get("_type", "message") != "message":
            if value["_type"] == "header":
                meta = value.get("meta")
                owner = str(meta.get("ownerId") or "") if isinstance(meta, dict) else ""
                num_headers += 1
                chat = str(num_headers)
            continue
        sender, code = str(value.get("sender") or ""), value.get("type", 0)
        text = value.get("content")
        yield Message(
            speaker=sender,
            times=parse_times(str(value.get("timestamp") or "")),
            text=text if isinstance(text, str) else "",
            chat=chat,
            name=str(value.get("groupNickname") or value.get("accountName") or ""),
            is_me=bool(owner) and sender == owner,
            left_out=_KINDS.get(code, f"其他（类型 {str(code)[:20]}）")
            if _is_int(code)
            else "其他",
            has_type=True,
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


CHATLAB = Format("ChatLab 交换格式", _recognise, read_chatlab, is_log=True)
