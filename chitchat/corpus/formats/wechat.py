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

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.formats.columns import find_header, open_rows, skip_header
from chitchat.corpus.formats.json_values import iterate_items, iterate_lines
from chitchat.corpus.messages import Message, kind_of_type
from chitchat.corpus.times import parse_times
from chitchat.errors import UserError

_SENDER_PREFIX = re.compile(r"\A(?P<account>[\w@.-]+):\r?\n")  # 群消息的正文以“账号:换行”开头
# 微信数据库里的类型号；49 之类的应用消息另有子类型，57 是引用，有文字。
_CODES = {
    1: "", 2: "", 3: "图片", 34: "语音", 42: "名片", 43: "视频", 44: "视频", 47: "表情包",
    48: "位置", 49: "链接", 50: "通话", 51: "系统", 62: "视频", 64: "通话", 66: "名片", 67: "名片",
    10000: "系统", 10002: "撤回", 11000: "系统",
}  # fmt: skip
_QUOTE = 57
_TEXT_TITLE = re.compile(r"<title>(?P<text>.*?)</title>", re.DOTALL)


def _kind_of_code(code: str, subtype: str = "") -> str:
    """类型号 → 不是话的缘由；高 32 位是子类型。"""
    try:
        number = int(float(code))
        sub = int(float(subtype or 0)) or number >> 32
    except (ValueError, OverflowError):
        return kind_of_type(code)
    number &= 0xFFFFFFFF
    if number == 49 and sub == _QUOTE:
        return ""
    return kind_of_type(_CODES[number]) if number in _CODES else f"其他（类型 {code[:20]}）"


@dataclass(frozen=True)
class _Layout:
    """一种工具的表：各种用途的名字；空的没有。"""

    label: str
    text: str
    time: tuple[str, ...]
    account: str = ""
    name: str = ""
    me: str = ""
    chat: str = ""
    type: str = ""
    code: str = ""
    subtype: str = ""

    def needed(self) -> set[str]:
        """认这种表要有的名字。"""
        return {self.text, self.time[0], self.me or self.account, self.type or self.code} - {""}


_TABLES = (
    _Layout("PyWxDump/WeClone/WeFlow CSV", "msg", ("CreateTime",), "talker", "", "is_sender",
            "room_name", type="type_name"),
    _Layout("旧版 PyWxDump/WeClone CSV", "content", ("CreateTime",), "talker", "", "is_sender",
            "room_name", type="type_name"),
    _Layout("留痕 MemoTrace CSV", "StrContent", ("CreateTime", "StrTime"), "Sender", "NickName",
            "IsSender", "TalkerId", code="Type", subtype="SubType"),
    _Layout("chatlog CSV", "Content", ("Time",), "Sender", "SenderName", "", "Talker"),
)  # fmt: skip


_MARKING = ("is_sender", "StrContent", "TalkerName")  # 各种表特有的列名


def _layout_of(head: Head) -> tuple[_Layout, list[str]] | None:
    """CSV 的表头是哪种工具的。"""
    _, header = find_header(head, _MARKING)
    for layout in _TABLES:
        extra = {"SenderName"} if not layout.me else set()
        if layout.needed() | extra <= set(header):
            return layout, header
    return None


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
    if head.suffix in (".csv", ".txt", ".tsv", "") and (found := _layout_of(head)):
        return f"列名像 {found[0].label}"
    return ""


def read_wechat(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """按开头认出的工具读；指定了 --format wechat 而认不出时报错。"""
    if label := _json_label(head):
        yield from _read_chatlog_json(file, head) if label == "chatlog JSON" else _read_weflow(file)
        return
    found = _layout_of(head)
    if found is None:
        raise UserError(
            "不像是认得的微信导出：应是 PyWxDump、WeClone、WeFlow、留痕、chatlog、CipherTalk、"
            "EchoTrace 的 CSV 或 JSON；可去掉 --format 自动认，"
            "或用 --format csv 和 --text_column、--speaker_column、--time_column"
        )
    layout, header = found
    rows = open_rows(file, head)
    skip_header(rows, head, _MARKING)
    columns = {name: column for column, name in enumerate(header)}
    last_column = max(columns[name] for name in layout.needed())
    for row in rows:
        if len(row) > last_column:
            yield _message(layout, dict(zip(columns, row, strict=False)), rows.line_num)


def _message(layout: _Layout, row: Mapping[str, str], line: int) -> Message:
    """表里的一行。"""

    def cell(name: str) -> str:
        return (row.get(name) or "").strip()

    is_me = cell(layout.me).lower() in ("1", "true")
    account, name, chat = cell(layout.account), cell(layout.name), cell(layout.chat)
    if layout.label.startswith("chatlog"):
        is_me = bool(chat) and not chat.endswith("@chatroom") and account != chat
        account = account or name
    has_sender = layout.account in row or layout.name in row
    text, prefix = _strip_sender(row.get(layout.text) or "")
    kind = kind_of_type(cell(layout.type)) if layout.type else _kind_of_code(
        cell(layout.code) or "1", cell(layout.subtype))  # fmt: skip
    if not kind and text.lstrip().startswith("<") and cell(layout.subtype) == str(_QUOTE):
        title = _TEXT_TITLE.search(text)
        text = title["text"] if title else ""
    return Message(
        speaker=account or prefix or name,
        times=next((t for field in layout.time if (t := parse_times(cell(field)))), ()),
        text=text,
        # 留痕的 TalkerId 不可靠：有说话人一列时，两个人的就是一个聊天，由 chat_logs 看是几个人。
        chat="" if layout.chat == "TalkerId" and has_sender and account else chat,
        name=name,
        is_me=is_me,
        left_out=kind,
        line=line,
        has_type=bool(layout.type or layout.code),
    )


def _strip_sender(text: str) -> tuple[str, str]:
    """群消息的正文和开头的账号；没有账号时是空串。"""
    match = _SENDER_PREFIX.match(text)
    return (text[match.end() :], match["account"]) if match else (text, "")


def _read_weflow(file: TextIO) -> Iterator[Message]:
    for message in iterate_items(file, "messages.item"):
        if not isinstance(message, dict):
            continue
        kind = str(message.get("type") or "")
        code = str(message.get("localType") or "")
        left_out = kind_of_type(kind) if kind else _kind_of_code(code or "1")
        if message.get("isSend") is None and not left_out:
            left_out = "系统提示"
        text, prefix = _strip_sender(str(message.get("content") or ""))
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
            left_out=_kind_of_code(str(message.get("type") or "1"), subtype),
            has_type=True,
        )


WECHAT = Format("微信导出工具的 CSV、JSON", _recognise, read_wechat, is_log=True)
