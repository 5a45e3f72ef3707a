"""语料格式：每种格式一个小读取器，登记在 READERS；``auto`` 由文件名和内容认出。

读取器是生成器：接受一个打开的文本文件，逐段给出对话，内存里只有当前一段。
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TextIO

from chitchat.corpus.chat_logs import (
    QQ_HEADER,
    Message,
    build_dialogues,
    parse_time,
    read_qq_messages,
)
from chitchat.corpus.json_stream import iterate_json
from chitchat.errors import UserError


class Dialogue(NamedTuple):
    """一段对话。

    Attributes:
        utterances: 各句，首尾没有空白。
        lines: 各句所在的行号；格式不分行（如 JSON）时为空。
    """

    utterances: list[str]
    lines: Sequence[int] = ()


@dataclass(frozen=True)
class ReadOptions:
    """读取时的选项，名字与命令行参数相同；各格式只看自己用得上的。"""

    format: str = "auto"
    split: str = "train"
    text_column: str | None = None
    dialogue_column: str | None = None
    speaker_column: str | None = None
    time_column: str | None = None
    gap_minutes: float = 30


Reader = Callable[[TextIO, ReadOptions], Iterator[Dialogue]]


def read_text(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """一行一句，空行分隔对话；只含空白的行算空行，连续的空行算一个。"""
    utterances: list[str] = []
    number = 0
    for number, line in enumerate(file, 1):
        utterance = line.strip()
        if utterance:
            utterances.append(utterance)
        elif utterances:
            yield Dialogue(utterances, range(number - len(utterances), number))
            utterances = []
    if utterances:
        yield Dialogue(utterances, range(number + 1 - len(utterances), number + 1))


def read_tsv(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """一行一段对话，各句以 TAB 分隔。"""
    for number, line in enumerate(file, 1):
        utterances = [text for cell in line.split("\t") if (text := cell.strip())]
        if utterances:
            yield Dialogue(utterances, [number] * len(utterances))


def read_conv(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """``E`` 开始一段对话，``M 文字`` 是一句；词之间可以有 ``/``，换成分词器会略去的空格。"""
    head = list(itertools.islice(file, 1000))
    is_split = _is_split_into_words(head)
    utterances: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(itertools.chain(head, file), 1):
        mark, _, text = line.strip().partition(" ")
        if mark == "E":
            if utterances:
                yield Dialogue(utterances, lines)
            utterances, lines = [], []
        elif mark == "M":
            text = text.replace("/", " ").strip() if is_split else text.strip()
            if text:
                utterances.append(text)
                lines.append(number)
        elif mark:
            raise UserError(
                f"第 {number} 行不是 .conv 的写法：应以 E 或 M 开头，得到 {line.strip()[:20]!r}；"
                "请改正这一行，或用 --format 指定别的格式"
            )
    if utterances:
        yield Dialogue(utterances, lines)


def _is_split_into_words(lines: Sequence[str]) -> bool:
    """三个字以上的句子多数有斜杠，就是分过词的；偶尔出现的斜杠是文字。"""
    texts = [line.strip()[2:] for line in lines if line.startswith("M ")]
    texts = [text for text in texts if len(text) > 2]
    return 2 * sum("/" in text for text in texts) > len(texts)


def read_json(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """JSON 列表的列表，或 ``{"train": [...], …}``（用 --split 选一份）。"""
    for number, element in enumerate(iterate_json(file, options.split), 1):
        if utterances := _utterances_of(element, f"第 {number} 段对话"):
            yield Dialogue(utterances)


def read_jsonl(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """一行一段对话：``messages``（role/content）、``conversations``（from/value）或字符串列表。"""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            element = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"第 {number} 行不是完整的 JSON（第 {error.colno} 个字符处）：请改正或删去这一行"
            ) from error
        if utterances := _utterances_of(element, f"第 {number} 行"):
            yield Dialogue(utterances, [number] * len(utterances))


_TURN_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "utterances")
_TEXT_KEYS = ("content", "value", "text", "utterance")
_SPEAKER_KEYS = ("role", "from")


def _utterances_of(element: object, where: str) -> list[str]:
    """JSON 里一段对话的各句；system 与工具的消息不是对话，略去。"""
    if isinstance(element, dict):
        element = next((element[key] for key in _TURN_KEYS if key in element), None)
    if not isinstance(element, list):
        raise UserError(
            f"{where}不是对话：应是字符串的列表，或含有 {'、'.join(_TURN_KEYS)} 之一的对象；"
            "请改正内容，或用 --format 指定别的格式"
        )
    utterances = []
    for turn in element:
        if isinstance(turn, dict):
            role = next((turn[key] for key in _SPEAKER_KEYS if key in turn), None)
            if role in ("system", "tool", "function", "observation"):
                continue
            turn = next((turn[key] for key in _TEXT_KEYS if key in turn), None)
        if not isinstance(turn, str):
            raise UserError(
                f"{where}里有一句不是文字（{str(turn)[:20]!r}）：应是字符串，"
                f"或含有 {'、'.join(_TEXT_KEYS)} 之一的对象"
            )
        if text := " ".join(turn.split("\n")).strip():
            if re.search("[\ud800-\udfff]", text):
                raise UserError(f"{where}里有不成对的代理码（\\ud800 至 \\udfff）：请改正这一句")
            utterances.append(text)
    return utterances


# 没有指名时，依次找这些列名（小写）。
_COLUMNS = {
    "text": (
        "utterance",
        "strcontent",
        "content",
        "text",
        "message",
        "msg",
        "内容",
        "消息",
        "文本",
    ),
    "dialogue": ("dialogue_id", "dialog_id", "conversation_id", "session_id", "对话", "会话"),
    "speaker": ("sender", "speaker", "issender", "talker", "role", "发送人", "发送者", "发言人"),
    "time": ("createtime", "strtime", "time", "timestamp", "datetime", "时间", "发送时间", "日期"),
    "chat": ("talkerid", "talker", "remark", "聊天", "会话对象"),
    "type": ("type", "msgtype", "msg_type", "类型", "消息类型"),
}
_TEXT_TYPES = ("1", "text", "文本", "文字", "文本消息", "")


def read_csv(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """CSV：有对话编号的列就按它分段，一行一句；否则是聊天记录，按说话人和时间分段。"""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(file)
    header = [name.strip() for name in next(rows, [])]
    columns = _find_columns(header, options)
    if "dialogue" in columns and not (options.speaker_column and options.time_column):
        yield from _group_rows(rows, columns["text"], columns["dialogue"])
        return
    if not {"speaker", "time"} <= columns.keys():
        raise UserError(
            f"CSV 的列 {'、'.join(header)} 里看不出怎样分对话："
            "请用 --dialogue_column 指定对话编号的列，"
            "或用 --speaker_column 和 --time_column 指定说话人和时间的列"
        )
    messages = _read_csv_messages(rows, columns)
    for utterances, lines in build_dialogues(messages, options.gap_minutes):
        yield Dialogue(utterances, lines)


def _find_columns(header: Sequence[str], options: ReadOptions) -> dict[str, int]:
    """各种用途的列在第几列；没有的不在结果里，文字的列必须有。"""
    lower = [name.lower() for name in header]
    columns = {}
    for role, aliases in _COLUMNS.items():
        named = getattr(options, f"{role}_column", None)
        if named is not None and named not in header:
            raise UserError(
                f"CSV 里没有 --{role}_column 指定的列 {named}：有 {'、'.join(header) or '零列'}"
            )
        name = named or next((alias for alias in aliases if alias in lower), None)
        if name is not None:
            columns[role] = header.index(named) if named else lower.index(name)
    if "text" not in columns:
        raise UserError(
            f"CSV 的列 {'、'.join(header) or '零列'} 里看不出哪一列是文字：请用 --text_column 指定"
        )
    return columns


def _group_rows(rows: Iterator[list[str]], text: int, dialogue: int) -> Iterator[Dialogue]:
    """对话编号相同的相邻各行是一段对话。"""
    full_rows = (row for row in rows if len(row) > max(text, dialogue))
    for _, group in itertools.groupby(full_rows, lambda row: row[dialogue]):
        utterances, lines = [], []
        for row in group:
            if utterance := " ".join(row[text].split("\n")).strip():
                utterances.append(utterance)
                lines.append(rows.line_num)
        if utterances:
            yield Dialogue(utterances, lines)


def _read_csv_messages(rows: Iterator[list[str]], columns: dict[str, int]) -> Iterator[Message]:
    """CSV 聊天记录的各条消息；有类型一列时只要文字消息。"""
    width = max(columns.values())
    for row in rows:
        if len(row) <= width:
            continue
        if "type" in columns and row[columns["type"]].strip().lower() not in _TEXT_TYPES:
            continue
        speaker = row[columns["speaker"]].strip()
        chat = row[columns["chat"]].strip() if "chat" in columns else ""
        time = parse_time(row[columns["time"]])
        yield Message(chat, speaker, time, row[columns["text"]], rows.line_num)


def read_qq(file: TextIO, options: ReadOptions) -> Iterator[Dialogue]:
    """QQ 导出的文本聊天记录。"""
    messages = read_qq_messages(file)
    for utterances, lines in build_dialogues(messages, options.gap_minutes):
        yield Dialogue(utterances, lines)


READERS: dict[str, Reader] = {
    "text": read_text,
    "tsv": read_tsv,
    "json": read_json,
    "jsonl": read_jsonl,
    "conv": read_conv,
    "csv": read_csv,
    "wechat": read_csv,
    "qq": read_qq,
}
_BY_SUFFIX = {".tsv": "tsv", ".jsonl": "jsonl", ".conv": "conv", ".csv": "csv"}


def detect_format(suffix: str, head: Sequence[str]) -> str:
    """由后缀和开头若干行认出格式，返回 READERS 的键；认不出的当作 text。"""
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    lines = [line.strip() for line in head if line.strip()]
    if suffix == ".json" or (lines and re.match(r'[\[{]\s*(?:["\[{]|$)', lines[0])):
        return _detect_json(lines, is_named=suffix == ".json")
    if any(line.startswith("消息记录") for line in lines[:1]) or any(
        QQ_HEADER.fullmatch(line) for line in lines[:8]
    ):
        return "qq"
    if lines and lines[0] == "E" and all(line[:2] in ("E", "M", "M ") for line in lines[:20]):
        return "conv"
    return "text"


def _detect_json(lines: Sequence[str], *, is_named: bool) -> str:
    """第一行自成一个 JSON，后面还有一行，就是 JSONL。"""
    try:
        first = json.loads(lines[0]) if lines else None
    except json.JSONDecodeError:
        is_json = is_named or (len(lines) > 1 and lines[0] in ("[", "{"))
        is_json = is_json or (len(lines) == 1 and lines[0].startswith(("[[", '{"')))
        return "json" if is_json else "text"
    if isinstance(first, dict) and any(key in first for key in _TURN_KEYS):
        return "jsonl"
    return "jsonl" if len(lines) > 1 and isinstance(first, list) else "json"
