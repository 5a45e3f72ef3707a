"""微信导出工具的 CSV：列名的表、类型号，见 wechat 的说明。"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from chitchat.corpus.formats.base import Head
from chitchat.corpus.formats.columns import Rows, find_header, open_rows, skip_header
from chitchat.corpus.messages import Message, kind_of_type
from chitchat.corpus.times import parse_times

# 群消息的正文以“账号:换行”开头
_SENDER_PREFIX = re.compile(r"\A(?P<account>wxid_[\w-]+|gh_\w+|[\w.-]+@[\w.-]+):\r?\n")
# 微信数据库里的类型号；49 之类的应用消息另有子类型，57 是引用，有文字。
_CODES = {
    1: "", 2: "", 3: "图片", 34: "语音", 42: "名片", 43: "视频", 44: "视频", 47: "表情包",
    48: "位置", 49: "链接", 50: "通话", 51: "系统", 62: "视频", 64: "通话", 66: "名片", 67: "名片",
    10000: "系统", 10002: "撤回", 11000: "系统",
}  # fmt: skip
_APP_KINDS = {
    3: "链接卡片", 4: "链接卡片", 5: "链接卡片", 6: "文件", 8: "表情包", 19: "转发", 33: "链接卡片",
    36: "链接卡片", 2000: "红包转账", 2001: "红包转账",
}  # fmt: skip
_QUOTE = 57


def kind_of_code(code: str, subtype: str = "") -> str:
    """类型号 → 不是话的缘由；高 32 位是子类型。"""
    try:
        number = int(float(code))
        sub = int(float(subtype or 0)) or number >> 32
    except (ValueError, OverflowError):
        return kind_of_type(code)
    number &= 0xFFFFFFFF
    if number == 49 and sub == _QUOTE:
        return ""
    if number == 49 and sub in _APP_KINDS:
        return _APP_KINDS[sub]
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


def table_label(head: Head) -> str:
    """CSV 是哪种工具的；认不出时是空串。"""
    found = _layout_of(head)
    return found[0].label if found else ""


def read_wechat_table(file: TextIO, head: Head) -> Iterator[Message]:
    """逐行给出消息；表头是 table_label 认得的。"""
    layout, header = _layout_of(head)
    rows = open_rows(file, head)
    skip_header(rows, head, _MARKING)
    columns = {name: column for column, name in enumerate(header)}
    last_column = max(columns[name] for name in layout.needed())
    with head.open_text() as again:
        chat_column = _chat_column(layout, open_rows(again, head), columns)
    for row in rows:
        if len(row) > last_column:
            cells = dict(zip(columns, map(str.strip, row), strict=False))
            yield _message(layout, cells, rows.line_num, chat_column)


def _chat_column(layout: _Layout, rows: Rows, columns: dict[str, int]) -> str:
    """哪一列说明是哪个聊天；空串表示整个文件是一个聊天。

    留痕的 TalkerId 不可靠：除了自己只有一个人时，就是一个聊天。PyWxDump 旧版没有 room_name，
    自己的那些行若也写着对方的账号，talker 就是聊天。
    """
    if layout.chat != "TalkerId" and (layout.chat in columns or not layout.me):
        return layout.chat
    others: set[str] = set()
    mine: set[str] = set()
    me, account = columns.get(layout.me, -1), columns.get(layout.account, -1)
    for row in rows:
        if 0 <= max(me, account) < len(row) and row[account].strip() not in ("", layout.account):
            is_me = me >= 0 and row[me].strip().lower() in ("1", "true")
            (mine if is_me else others).add(row[account].strip())
    if layout.chat == "TalkerId":
        return "" if len(others) == 1 else layout.chat
    return layout.account if mine and mine <= others else ""


def _message(layout: _Layout, row: Mapping[str, str], line: int, chat_column: str) -> Message:
    """表里的一行。"""
    cell = row.get
    is_me = cell(layout.me, "").lower() in ("1", "true")
    account, name = cell(layout.account, ""), cell(layout.name, "")
    if layout.label.startswith("chatlog"):
        chat = cell(layout.chat, "")
        is_me = bool(chat) and not chat.endswith("@chatroom") and account != chat
        account = account or name
    text, prefix = strip_sender(cell(layout.text, ""))
    kind = kind_of_type(cell(layout.type, "")) if layout.type else kind_of_code(
        cell(layout.code) or "1", cell(layout.subtype, ""))  # fmt: skip
    if not kind and text.startswith("<") and cell(layout.subtype) == str(_QUOTE):
        _, _, rest = text.partition("<title>")
        text = html.unescape(rest.partition("</title>")[0])
    # 聊天由账号一列说明时，自己的那些行写的是对方的账号。
    is_others = is_me and chat_column == layout.account
    return Message(
        speaker="" if is_others else account or prefix or name,
        times=next((t for field in layout.time if (t := parse_times(cell(field, "")))), ()),
        text=text,
        chat=cell(chat_column, ""),
        name=name,
        is_me=is_me,
        left_out=kind,
        line=line,
        has_type=bool(layout.type or layout.code),
    )


def strip_sender(text: str) -> tuple[str, str]:
    """群消息的正文和开头的账号；没有账号时是空串。"""
    match = _SENDER_PREFIX.match(text)
    return (text[match.end() :], match["account"]) if match else (text, "")
