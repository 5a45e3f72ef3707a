"""表头：分隔符是哪个，哪一行是表头，各列作什么用。"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from chitchat.corpus.formats.base import Head, ReadOptions
from chitchat.errors import UserError

DELIMITERS = ",\t;|"
HEADER_ROWS = 12  # 表头之前最多有几行说明
# 没有指名时，依次找这些列名（小写）。
_COLUMNS = {
    "text": "utterance strcontent content text message msg 内容 消息 消息内容 文本 正文 聊天内容"
    " body sentence 话 说的话 聊天消息 发言内容 發言內容 訊息",
    "dialogue": "dialogue_id dialog_id conversation_id session_id conv_id dialogueid dialogid"
    " conversationid 对话 会话 对话编号 对话id 会话id 会话编号",
    "speaker": "sender speaker from author user username nickname name talker role 发送人 发送者"
    " 发言人 说话人 昵称 发信人 微信id 谁 用户 角色 sendername 寄件者",
    "time": "createtime timestamp strtime time datetime date sent_at 时间戳 时间 发送时间 日期时间"
    " 日期 何时 時間",
    "chat": "talkerid chat chat_id room room_name 聊天 会话对象 群 群名 群聊 聊天对象",
    "type": "type msgtype msg_type type_name 类型 消息类型 訊息類型",
    "me": "issender is_sender isself is_self issend is_send fromme is_from_me 是否自己",
}
ALIASES = {role: names.split() for role, names in _COLUMNS.items()}
PAIRS = (
    ("question", "answer"), ("q", "a"), ("ask", "answer"), ("query", "response"),
    ("prompt", "response"), ("prompt", "completion"), ("input", "output"), ("input", "target"),
    ("instruction", "output"), ("context", "response"), ("post", "response"), ("title", "reply"),
    ("human", "assistant"), ("user", "assistant"), ("user", "bot"), ("问", "答"), ("问题", "回答"),
    ("问题", "答案"), ("提问", "回答"), ("上句", "下句"), ("source", "target"), ("text1", "text2"),
    ("question", "reply"), ("ask", "reply"), ("q", "r"), ("问句", "答句"),
)  # fmt: skip
NUMBERED = re.compile(
    r"(?:turn|utterance|sentence|text|column|line|句|第)_?(\d{1,2})(?:句|轮)?", re.IGNORECASE
)


def open_rows(file: TextIO, head: Head) -> Iterator[list[str]]:
    """逐行给出各格；分隔符由开头认出。``rows.line_num`` 是行号。"""
    csv.field_size_limit(2**31 - 1)
    return csv.reader(file, delimiter=delimiter_of(head))


def delimiter_of(head: Head) -> str:
    """表头里最多的那种分隔符；Excel 的 ``sep=;`` 一行说了算。"""
    lines = head.lines[:HEADER_ROWS]
    if lines and (match := re.fullmatch(r'"?sep=(.)"?', lines[0])):
        return match[1]
    header = max(lines, key=lambda line: len(known_names(cells_of(line))), default="")
    return max(DELIMITERS, key=lambda mark: header.count(mark)) if header else ","


def cells_of(line: str) -> list[str]:
    """一行按各种分隔符切开的各格，不管引号。"""
    return [cell.strip(' "') for cell in re.split(f"[{re.escape(DELIMITERS)}]", line)]


def known_names(cells: Iterable[str]) -> set[str]:
    """这些格里有哪些认得的列名（小写）。"""
    known = {name for names in ALIASES.values() for name in names}
    known |= {name for pair in PAIRS for name in pair}
    lower = {cell.strip().lower().lstrip("\ufeff") for cell in cells}
    return {name for name in lower if name in known or NUMBERED.fullmatch(name)}


def skip_header(rows: Iterator[list[str]], head: Head, wanted: Sequence[str] = ()) -> list[str]:
    """读到表头为止，返回表头；没有表头时什么也不读，返回空的。

    Args:
        rows: open_rows 给出的，从头开始。
        head: 同一个文件的开头。
        wanted: 另外算作认得的列名。
    """
    number, header = find_header(head, wanted)
    for _ in range(number):
        next(rows, None)
    return header


def find_header(head: Head, wanted: Sequence[str] = ()) -> tuple[int, list[str]]:
    """表头是前面几行里认得的列名最多的一行：它是第几行，各格；没有时是 0 和空的。"""
    with head.open_text() as file:
        rows = list(itertools.islice(open_rows(file, head), HEADER_ROWS))
    found = [[cell.strip().lstrip("\ufeff") for cell in row] for row in rows]
    scores = [len(known_names(row) | (set(wanted) & set(row))) for row in found]
    best = max(scores, default=0)
    number = scores.index(best) if best else 0
    is_header = best >= 2 or (
        best == 1 and (len(found[number]) == 1 or set(wanted) & set(found[number]))
    )
    return (number + 1, found[number]) if is_header else (0, [])


def find_columns(header: Sequence[str], options: ReadOptions) -> dict[str, int]:
    """各种用途的列在第几列；没有的不在结果里。

    Raises:
        UserError: 没有命令行指名的列。
    """
    lower = [name.lower() for name in header]
    columns = {}
    for role, aliases in ALIASES.items():
        named = getattr(options, f"{role}_column", None)
        if named is not None and named not in header:
            raise UserError(
                f"CSV 里没有 --{role}_column 指定的列 {named}：有 {'、'.join(header) or '零列'}"
            )
        taken = columns.values()
        name = named or next(
            (alias for alias in aliases if alias in lower and lower.index(alias) not in taken), None
        )
        if name is not None:
            columns[role] = header.index(named) if named else lower.index(name)
    return columns
