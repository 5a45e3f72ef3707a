"""DiscordChatExporter 导出的 JSON：``guild``、``channel``、``messages``。

消息的 ``type`` 是 Default 或 Reply 的是话，其余是系统提示；机器人的话不要。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.formats.json_values import iterate_items
from chitchat.corpus.messages import Message
from chitchat.corpus.times import parse_times

_SPOKEN = ("Default", "Reply", "ThreadStarterMessage", "0", "19")
_MENTION = re.compile(r"<(?:@[!&]?|#)\d+>|<a?:\w+:\d+>")


def _recognise(head: Head) -> str:
    shape = head.json
    if shape is None:
        return ""
    is_export = {"guild", "channel"} <= set(shape.keys.get("", []))
    return "有 guild 和 channel 两项" if is_export else ""


def read_discord(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """逐条给出消息。"""
    for message in iterate_items(file, "messages.item"):
        if not isinstance(message, dict):
            continue
        author = message.get("author") if isinstance(message.get("author"), dict) else {}
        text = _MENTION.sub(" ", str(message.get("content") or ""))
        left_out = ""
        if str(message.get("type")) not in _SPOKEN:
            left_out = "系统提示"
        elif author.get("isBot"):
            left_out = "机器人"
        elif not text.strip():
            left_out = "图片" if message.get("attachments") else "其他"
        yield Message(
            speaker=str(author.get("id") or author.get("name") or ""),
            times=parse_times(str(message.get("timestamp") or "")),
            text=text,
            name=str(author.get("nickname") or author.get("name") or ""),
            left_out=left_out,
            has_type=True,
        )


DISCORD = Format("DiscordChatExporter 的 JSON", _recognise, read_discord, is_log=True)
