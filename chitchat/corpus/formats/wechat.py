"""微信：各种导出工具的 CSV 和 JSON（TXT 与 QQ 的同形，见 qq）。

由列名或键认出：

- PyWxDump / WeClone / WeFlow 的 CSV：``type_name``、``is_sender``、``talker``，文字在 ``msg``
  或（旧版）``content``；``talker`` 是说话人，``room_name`` 是聊天，没有这一列时一个文件是一个聊天；
- 留痕 MemoTrace / WeChatMsg 的 CSV：``StrContent``、``IsSender``、``Type``；私聊导出的行比表头短，
  没有说话人，只有 IsSender；``TalkerId`` 不可靠；
- sjzar/chatlog 的 CSV（``SenderName``、``TalkerName``）与 JSON（``talker``、``isSelf``）；
- WeFlow、EchoTrace、CipherTalk 的 JSON：``session`` 与 ``messages``，消息有 ``senderUsername``。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.formats.json_values import iterate_items, iterate_lines
from chitchat.corpus.formats.wechat_tables import (
    kind_of_code,
    read_wechat_table,
    strip_sender,
    table_label,
)
from chitchat.corpus.messages import Message, kind_of_type
from chitchat.corpus.times import parse_times
from chitchat.errors import UserError


def _json_label(head: Head) -> str:
    """JSON 是哪种工具的；不是微信的时是空串。"""
    shape = head.json
    if shape is None:
        return ""
    message = shape.first.get("messages.item")
    keys = shape.keys.get("", [])
    if isinstance(message, dict) and {"senderUsername", "createTime"} <= message.keys():
        generator = str(shape.scalars.get("exportInfo.generator", ""))
        return generator or ("WeFlow JSON" if "weflow" in keys else "EchoTrace JSON")
    if "session" in keys and {"weflow", "exportInfo"} & set(keys):
        return "WeFlow JSON"
    record = shape.record
    if isinstance(record, dict) and {"talker", "sender", "time", "content"} <= record.keys():
        return "chatlog JSON"
    return ""


def _recognise(head: Head) -> str:
    if label := _json_label(head):
        return f"键像 {label}"
    if head.suffix in (".csv", ".txt", ".tsv", "") and (label := table_label(head)):
        return f"列名像 {label}"
    return ""


def read_wechat(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """按开头认出的工具读；指定了 --format wechat 而认不出时报错。"""
    if label := _json_label(head):
        yield from _read_chatlog_json(file, head) if label == "chatlog JSON" else _read_weflow(file)
        return
    if not table_label(head):
        raise UserError(
            "不像是认得的微信导出：应是 PyWxDump、WeClone、WeFlow、留痕、chatlog、CipherTalk、"
            "EchoTrace 的 CSV 或 JSON；可去掉 --format 自动认，"
            "或用 --format csv 和 --text_column、--speaker_column、--time_column"
        )
    yield from read_wechat_table(file, head)


def _read_weflow(file: TextIO) -> Iterator[Message]:
    for message in iterate_items(file, "messages.item"):
        if not isinstance(message, dict):
            continue
        kind = str(message.get("type") or "")
        code = str(message.get("localType") or "")
        left_out = kind_of_type(kind) if kind else kind_of_code(code or "1")
        if kind.startswith("其他") and code:  # 名字不知道的，看类型号：引用就是这样写的
            left_out = kind_of_code(code)
        if message.get("isSend") is None and not left_out:
            left_out = "系统提示"
        text, prefix = strip_sender(str(message.get("content") or ""))
        yield Message(
            speaker=str(message.get("senderUsername") or prefix or ""),
            times=parse_times(str(message.get("createTime") or message.get("formattedTime") or "")),
            text=text,
            name=str(message.get("senderDisplayName") or ""),
            is_me=str(message.get("isSend")) in ("1", "True"),
            left_out=left_out,
            has_type=True,
        )


def _read_chatlog_json(file: TextIO, head: Head) -> Iterator[Message]:
    if head.json is not None and head.json.is_lines:
        messages = (value for _, value in iterate_lines(file))
    else:
        messages = iterate_items(file, "item")
    for message in messages:
        if not isinstance(message, dict):
            continue
        subtype = str(message.get("subType") or "")
        yield Message(
            speaker=str(message.get("sender") or ""),
            times=parse_times(str(message.get("time") or "")),
            text=str(message.get("content") or ""),
            chat=str(message.get("talker") or ""),
            name=str(message.get("senderName") or ""),
            is_me=bool(message.get("isSelf")),
            left_out=kind_of_code(str(message.get("type") or "1"), subtype),
            has_type=True,
        )


WECHAT = Format("微信导出工具的 CSV、JSON", _recognise, read_wechat, is_log=True)
