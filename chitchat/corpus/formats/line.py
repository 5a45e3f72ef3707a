"""LINE 导出的 TXT。

日期独占一行（``2026/1/30周五``、``2026/1/30(金)``、``2025.12.10 Wednesday``、``Fri, 1/30/2026``），
下面每条消息是 ``20:15⇥名字⇥文字``（也有 ``下午08:15``、``8:15PM``）；名字是空的是系统提示；
好几行的消息括在双引号里。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.messages import Message
from chitchat.corpus.times import parse_clock_text, parse_times

_CLOCK = r"(?:(?:上午|下午|午前|午後|[AaPp][Mm])\s?)?\d{1,2}:\d{2}(?:\s?[AaPp][Mm])?"
_ROW = re.compile(rf"(?P<clock>{_CLOCK})\t(?P<name>[^\t\n]*)(?:\t(?P<text>.*))?", re.DOTALL)
_DATE = re.compile(
    r"\d{4}[/.]\d{1,2}[/.]\d{1,2}\s?(?:[(（]\S[)）]|周\S|週\S|星期\S|[A-Z][a-z]+day)?"
    r"|[A-Z][a-z]{2,8}, \d{1,2}/\d{1,2}/\d{4}"
)
_RECALLED = re.compile(
    r".*(?:[撤收]回(?:了一[条則])?(?:消息|訊息)|unsent a message|送信を取り消しました).*"
)
_TITLE = re.compile(r"(?:\[LINE\] .*|Chat history (?:with|in) .*)")


def _recognise(head: Head) -> str:
    if head.lines and _TITLE.fullmatch(head.lines[0].lstrip("\ufeff")):
        return f"开头是 {head.lines[0][:30]!r}"
    lines = head.text.split("\n")[:80]
    has_date = any(_DATE.fullmatch(line.strip()) for line in lines)
    rows = [line for line in lines if _ROW.match(line)]
    return f"有 {rows[0][:30]!r} 这样的行" if has_date and rows else ""


def read_line(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """逐条给出消息。"""
    date, row, number, previous = "", "", 0, ""
    for line_number, line in enumerate(file, 1):
        line = line.rstrip("\r\n").lstrip("\ufeff")
        # 真正的日期行之前有空行；开了引号的消息里，别的日期是话。
        is_date = bool(_DATE.fullmatch(line.strip())) and not (_is_open(row) and previous)
        if is_date or _ROW.match(line):
            if row:
                yield _message(date, row, number)
            date, row, number = (line.strip(), "", 0) if is_date else (date, line, line_number)
        elif row:
            row += "\n" + line
        previous = line
    if row:
        yield _message(date, row, number)


def _is_open(row: str) -> bool:
    """正文是不是开了引号还没有合上。"""
    _, _, text = row.partition("\t")[2].partition("\t")
    return text.startswith('"') and not (len(text) > 1 and text.endswith('"'))


def _message(date: str, row: str, line: int) -> Message:
    match = _ROW.match(row)  # 没有正文的系统提示可以接着好几行，不必全都合
    clock = parse_clock_text(match["clock"])
    times = parse_times(f"{date} {clock[0]}:{clock[1]:02}")[:1] if clock else ()  # 月总在日前
    name, text = match["name"].strip(), match["text"]
    if not name or text is None:
        text = text or name
        kind = "撤回" if _RECALLED.fullmatch(text) else "系统提示"
        return Message("", times, text, left_out=kind, line=line)
    if "\n" in text and text.lstrip()[:1] == text.rstrip()[-1:] == '"':
        text = text.strip()[1:-1].replace('""', '"')
    return Message(name, times, text.strip(), name=name, line=line)


LINE = Format("LINE 的 TXT", _recognise, read_line, is_log=True)
