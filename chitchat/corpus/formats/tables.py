"""表格：CSV（逗号、分号、TAB、竖线分隔）、Excel 变成的 CSV。

开头几行里找表头，由列名认出用途：

- 有问、答两列，或有好几列都是话：一行一段；
- 有对话编号的列：同号的是一段，不必相邻；
- 有说话人和时间的列：聊天记录。

没有表头、每行都是两格文字的，当作问和答。
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import TextIO

from chitchat.corpus.formats.base import (
    HEAD_CHARS,
    Dialogue,
    Format,
    Head,
    ReadOptions,
    one_line,
)
from chitchat.corpus.formats.columns import (
    ALIASES,
    DELIMITERS,
    NUMBERED,
    PAIRS,
    SESSION_NAMES,
    Rows,
    cells_of,
    find_columns,
    known_names,
    open_rows,
    skip_header,
)
from chitchat.corpus.messages import Message, kind_of_type
from chitchat.corpus.sorting import group_rows
from chitchat.corpus.times import parse_times
from chitchat.errors import UserError

_LETTER = re.compile(r"[^\W\d_]")


def _recognise(head: Head) -> str:
    if head.suffix == ".csv":
        return "后缀是 .csv"
    if head.suffix not in (".tsv", ".txt", ""):
        return ""
    first = head.lines[0] if head.lines else ""
    marks = [mark for mark in DELIMITERS if mark in first]
    for mark in marks:
        cells = [cell.strip(' "').lower() for cell in first.split(mark)]
        if len(known_names(cells)) >= 2 and len(known_names(cells)) >= len(cells) / 2:
            return f"第一行是表头（{'、'.join(cells[:4])}）"
    return ""


def has_messages(header: Sequence[str], options: ReadOptions) -> bool:
    """这个表头是聊天记录的：有说话人和时间，没有对话编号和问答。"""
    columns = find_columns(header, options)
    named = options.speaker_column and options.time_column
    is_log = {"text", "time"} <= columns.keys() and {"speaker", "me"} & columns.keys()
    is_corpus = "dialogue" in columns and header[columns["dialogue"]].lower() not in SESSION_NAMES
    return bool(named or (is_log and not is_corpus and not _turns_of(header)))


def has_voice(options: ReadOptions) -> bool:
    """用户问起了说话人：对话编了号的表也要按说话人接成一句一句。"""
    return bool(options.speaker_column or options.reply_speaker)


def _turns_of(header: Sequence[str]) -> list[int]:
    """一行就是一段对话时，各句所在的列：问答两列，或 text1、text2……这样编了号的列。"""
    lower = [name.lower() for name in header]
    numbered = [i for i, name in enumerate(lower) if NUMBERED.fullmatch(name)]
    if len(numbered) > 1:
        return numbered
    for pair in PAIRS:
        if set(pair) <= set(lower):
            return [lower.index(name) for name in pair]
    return []


def read_table(
    file: TextIO, options: ReadOptions, head: Head
) -> Iterator[Dialogue] | Iterator[Message]:
    """按表头决定是聊天记录、编了号的对话还是一行一段。"""
    rows = open_rows(file, head)
    named = [getattr(options, f"{role}_column", None) for role in ALIASES]
    header = skip_header(rows, head, [name for name in named if name])
    if not header:
        yield from _read_bare(file, head, options)
        return
    turns = _turns_of(header)
    columns = find_columns(header, options)
    if turns and not any(named):
        lower = [name.lower() for name in header]
        label = lower.index("label") if {"label", "context"} <= set(lower) else None
        yield from _read_turns(rows, turns, label)
    elif "text" not in columns:
        raise UserError(
            f"CSV 的列 {'、'.join(header)} 里看不出哪一列是文字：请用 --text_column 指定"
        )
    elif has_messages(header, options):
        yield from read_messages(rows, columns)
    elif "dialogue" in columns and "speaker" in columns and has_voice(options):
        yield from (message._replace(is_cut=True) for message in read_messages(rows, columns))
    elif "dialogue" in columns:
        cells = _cells_of_dialogues(rows, columns["text"], columns["dialogue"])
        yield from (Dialogue(*group) for group in group_rows(cells))
    else:
        raise UserError(
            f"CSV 的列 {'、'.join(header)} 里看不出怎样分对话："
            "请用 --dialogue_column 指定对话编号的列，"
            "或用 --speaker_column 和 --time_column 指定说话人和时间的列"
        )


def _read_bare(file: TextIO, head: Head, options: ReadOptions) -> Iterator[Dialogue]:
    """没有表头：每行都是两格以上的文字时，一行一段。"""
    if not head.lines:
        return
    lines = head.text.splitlines(keepends=True)
    whole = lines[:-1] if len(head.text) == HEAD_CHARS else lines
    for mark in ("\t", "|", ",", ";"):
        rows = list(csv.reader(whole, delimiter=mark))
        rows = [row for row in rows if row]
        is_text = all(
            len(row) == len(rows[0]) > 1 and all(map(_LETTER.search, row)) for row in rows
        )
        if len(rows) > 1 and is_text and not known_names(rows[0]):
            break
    else:
        first = "、".join(cells_of(head.lines[0]))
        raise UserError(
            f"CSV 的列 {first} 里看不出哪一列是文字："
            "请用 --text_column 等指定，或在第一行写上列名（如 question,answer）"
        )
    rows = Rows(file, mark)
    for row in rows:
        if texts := [text for cell in row if (text := one_line(cell).lstrip("\ufeff"))]:
            yield Dialogue(texts, [rows.line_num] * len(texts))


def _read_turns(rows: Rows, columns: Sequence[int], label: int | None) -> Iterator[Dialogue]:
    """一行一段；有标签一列时只要 1 的。"""
    for row in rows:
        if label is not None and (label >= len(row) or row[label].strip() not in ("1", "1.0")):
            continue
        cells = [row[column] for column in columns if column < len(row)]
        texts = [text for cell in cells if (text := one_line(cell))]
        if len(texts) == len(columns) or (len(columns) > 2 and len(texts) > 1):
            yield Dialogue(texts, [rows.line_num] * len(texts))


def _cells_of_dialogues(rows: Rows, text: int, dialogue: int) -> Iterator[tuple[str, str, int]]:
    """每行的对话编号、文字、行号。"""
    for row in rows:
        if len(row) > max(text, dialogue) and (utterance := one_line(row[text])):
            yield row[dialogue].strip(), utterance, rows.line_num


def read_messages(rows: Rows, columns: dict[str, int]) -> Iterator[Message]:
    """CSV 聊天记录的各条消息；有类型一列时只要文字消息。"""

    def cell(row: list[str], role: str) -> str:
        column = columns.get(role)
        return row[column].strip() if column is not None and column < len(row) else ""

    for row in rows:
        if not any(row):
            continue
        is_me = cell(row, "me").lower() in ("1", "true", "是", "yes")
        time = cell(row, "time")
        yield Message(
            speaker=cell(row, "speaker"),
            times=parse_times(f"{cell(row, 'date')} {time}") or parse_times(time),
            text=cell(row, "text"),
            chat=cell(row, "chat") or cell(row, "dialogue"),
            is_me=is_me,
            left_out=kind_of_type(cell(row, "type")),
            line=rows.line_num,
            has_type="type" in columns,
        )


TABLE = Format("CSV 或 Excel 表格", _recognise, read_table)
