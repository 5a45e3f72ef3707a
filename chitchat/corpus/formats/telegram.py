"""Telegram Desktop 导出的 ``result.json``。

一个聊天（``name``、``type``、``messages``）或整个账号（``chats.list``）；``text`` 是字符串，或
字符串与 ``{"type", "text"}`` 的列表；``type`` 是 service 的是系统提示；“收藏夹”不是对话。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

import ijson
from ijson.common import ObjectBuilder

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.formats.json_values import Utf8Bytes, explained, iterate_items
from chitchat.corpus.messages import Message
from chitchat.corpus.times import parse_times

_CHATS = ("chats.list.item", "left_chats.list.item")
_MEDIA = (
    ("sticker", "表情包"), ("animation", "表情包"), ("voice_message", "语音"),
    ("audio_file", "语音"), ("video_message", "视频"), ("video_file", "视频"),
)  # fmt: skip


def _recognise(head: Head) -> str:
    shape = head.json
    if shape is None:
        return ""
    keys = shape.keys.get("", [])
    message = shape.first.get("messages.item")
    if isinstance(message, dict) and {"from_id", "text", "date"} <= message.keys():
        return "消息有 from_id、date 和 text"
    if isinstance(message, dict) and message.get("type") == "service" and "actor" in message:
        return "消息有 actor 和 action"
    if "chats" in keys and {"about", "personal_information", "contacts"} & set(keys):
        return "有 chats 与 about"
    return ""


def read_telegram(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """逐条给出消息。"""
    shape = head.json
    if shape is not None and "chats" in shape.keys.get("", []):
        me = str(shape.scalars.get("personal_information.user_id") or "")
        yield from _read_account(file, me)
    else:
        for message in iterate_items(file, "messages.item"):
            if isinstance(message, dict):
                yield _message(message, "", "")


def _read_account(file: TextIO, me: str) -> Iterator[Message]:
    """整个账号：一边读一边记下在哪个聊天里，一次只有一条消息在内存里。"""
    number, is_saved = 0, False
    builder: ObjectBuilder | None = None
    with explained():
        for prefix, event, value in ijson.parse(
            Utf8Bytes(file), multiple_values=True, use_float=True
        ):
            if prefix in _CHATS and event == "start_map":
                number, is_saved = number + 1, False
            elif prefix in (f"{_CHATS[0]}.type", f"{_CHATS[1]}.type"):
                is_saved = value == "saved_messages"
            is_message = prefix.endswith(".list.item.messages.item")
            if is_message and event == "start_map":
                builder = ObjectBuilder()
            if builder is not None:
                builder.event(event, value)
                if is_message and event == "end_map":
                    if not is_saved:
                        yield _message(builder.value, str(number), me)
                    builder = None


def _message(message: dict[str, Any], chat: str, me: str) -> Message:
    account = str(message.get("from_id") or message.get("from") or "")
    text = _text_of(message.get("text"))
    left_out = ""
    if message.get("type") != "message":
        left_out = "系统提示"
    elif not text.strip():
        media = dict(_MEDIA).get(str(message.get("media_type")))
        left_out = media or (
            "图片" if "photo" in message else "文件" if "file" in message else "其他"
        )
    return Message(
        speaker=account,
        times=parse_times(str(message.get("date_unixtime") or message.get("date") or "")),
        text=text,
        chat=chat,
        name=str(message.get("from") or ""),
        is_me=bool(me) and account == f"user{me}",
        left_out=left_out,
        has_type=True,
    )


def _text_of(text: Any) -> str:
    """字符串，或字符串与 ``{"type", "text"}`` 的列表。"""
    if isinstance(text, str):
        return text
    parts = text if isinstance(text, list) else []
    return "".join(part if isinstance(part, str) else str(part.get("text") or "")
                   for part in parts if isinstance(part, (str, dict)))  # fmt: skip


TELEGRAM = Format("Telegram 的 result.json", _recognise, read_telegram, is_log=True)
