"""JSON 与 JSONL 的对话语料，由键名认出。

- 列表的列表；``{"train": […], …}`` 用 --split 选一份，可以再套一层；编号 → 对话的对象（CrossWOZ）；
- 多轮：messages、conversations、dialogue 等键下是一句句的话；一句是字符串，或有 content、value、
  text、message、utterance 等键的对象（ShareGPT、KdConv、NaturalConv），或 input/output、
  human/assistant 成对的对象（XTuner、Firefly）；
- 一问一答：instruction/input/output/history（Alpaca、BELLE）、input/target（Firefly）、
  prompt/response、question/answer 等；DPO 的 chosen 是回复，rejected 不要；
- MOSS 的 chat、CDConv 的 u1/b1/u2/b2、LCCC 的 context/response、``{"text": "多行"}``；
- 有说话人和时间的一条条消息：聊天记录。
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, TextIO

from chitchat.corpus.formats.base import Dialogue, Format, Head, ReadOptions
from chitchat.corpus.formats.columns import ALIASES
from chitchat.corpus.formats.json_records import (
    TEXT_KEYS,
    TURN_KEYS,
    dialogues_of,
    is_record,
    split_dialogues,
    texts_of,
)
from chitchat.corpus.formats.json_values import (
    JsonShape,
    iterate_items,
    iterate_lines,
    iterate_pairs,
)
from chitchat.corpus.messages import Message, kind_of_type
from chitchat.corpus.times import parse_times
from chitchat.errors import UserError

_NOT_TRAIN = ("valid", "validation", "val", "dev", "test", "eval")


def _recognise(head: Head) -> str:
    if head.suffix in (".json", ".jsonl", ".ndjson"):
        return f"后缀是 {head.suffix}"
    shape = head.json
    if shape is None:
        return ""
    if shape.is_lines:
        return "一行一个 JSON"
    has_content = bool(shape.first or shape.keys.get(""))
    starts = re.match(r'\ufeff?\s*[\[{]\s*["\[{\]}]', head.text)
    return "整个文件是 JSON" if has_content and starts else ""


def read_json(
    file: TextIO, options: ReadOptions, head: Head
) -> Iterator[Dialogue] | Iterator[Message]:
    """读出对话；记录是一条条消息时给出消息。"""
    shape = head.json
    if shape is None:
        raise UserError("不是 JSON：应以 [ 或 { 开头；请用 --format 指定真正的格式")
    is_lines = shape.is_lines or (
        head.suffix in (".jsonl", ".ndjson") and "item" not in shape.first
    )
    if is_lines and not _is_pretty(head):
        records: Iterator[tuple[str, Any]] = (
            (f"第 {number} 行", value) for number, value in iterate_lines(file)
        )
    else:
        prefix = _prefix_of(shape, options)
        values = (value for _, value in iterate_pairs(file)) if prefix is None else (
            iterate_items(file, prefix))  # fmt: skip
        records = ((f"第 {number} 段对话", value) for number, value in enumerate(values, 1))
    first = next(records, None)
    if first is None:
        return
    records = itertools.chain([first], records)
    if columns := _message_columns(first[1]):
        yield from _read_messages(records, columns)
    elif _is_turn(first[1]):
        utterances = [text for where, turn in records for text in texts_of(turn, where)]
        yield from split_dialogues([utterances])
    else:
        for where, record in records:
            number = int(where.split()[1]) if where.endswith("行") else 0
            for dialogue in split_dialogues(dialogues_of(record, where)):
                yield dialogue._replace(lines=[number] * len(dialogue.utterances) if number else ())


def _is_pretty(head: Head) -> bool:
    """后缀是 .jsonl 而一个值占了好几行。"""
    first = head.text.lstrip("\ufeff \t\r\n").split("\n", 1)[0].strip()
    return first in ("{", "[", "[[", "[{")


def _prefix_of(shape: JsonShape, options: ReadOptions) -> str | None:
    """各段对话的路径；None 表示最外层对象的每个值是一段。

    Raises:
        UserError: 没有叫 --split 的一份。
    """
    if "item" in shape.first:
        return "item"
    keys = shape.keys.get("", [])
    splits = _splits(shape)
    if not keys or (not splits and is_record(set(keys))):
        return ""
    if options.split in splits:
        return splits[options.split]
    others = [name for name in splits if name.lower() not in _NOT_TRAIN]
    if len(splits) == 1 and len(others) == 1:
        return splits[others[0]]
    if not splits and any(prefix in keys for prefix in shape.keys):
        return None
    if splits and set(splits) == set(keys[: len(splits)]) and all(map(_is_id, splits)):
        return None  # 编号 → 一段对话的列表
    names = keys[:20] if set(splits) <= set(keys) else list(splits)
    raise UserError(
        f"JSON 里没有叫 {options.split} 的一份：有 {'、'.join(names) or '零份'}；"
        "请用 --split 指定其中之一"
    )


def _is_id(name: str) -> bool:
    return any(char.isdecimal() for char in name)


def _splits(shape: JsonShape) -> dict[str, str]:
    """最外层或下一层里，值是列表的各个键 → 元素的路径；``{"train": {编号: 对话}}`` 不算。"""
    found = {}
    for path, element in shape.first.items():
        parts = path.split(".")
        if not path.endswith(".item") or path.count("item") > 1 or len(parts) > 3:
            continue
        is_dialogue = isinstance(element, list) or (isinstance(element, dict) and any(
            isinstance(element.get(key), list) for key in TURN_KEYS))  # fmt: skip
        if parts[-2] not in TURN_KEYS or is_dialogue:
            found[parts[-2]] = path
    return found


def _is_turn(value: Any) -> bool:
    """是不是单独的一句：字符串，或有文字和说话人的对象。"""
    if isinstance(value, str):
        return True
    return (
        isinstance(value, dict)
        and any(isinstance(value.get(key), str) for key in TEXT_KEYS)
        and any(isinstance(value.get(key), str) for key in ("role", "from", "speaker"))
    )


def _message_columns(record: Any) -> dict[str, str]:
    """记录是一条消息时，各种用途 → 键；不是时为空。"""
    if not isinstance(record, dict):
        return {}
    lower = {key.lower(): key for key in record if isinstance(key, str)}
    columns: dict[str, str] = {}
    for role, aliases in ALIASES.items():
        name = next((alias for alias in aliases if alias in lower), None)
        if name and lower[name] not in columns.values():
            columns[role] = lower[name]
    is_text = "text" in columns and isinstance(record[columns["text"]], str)
    is_log = is_text and "time" in columns and {"speaker", "me"} & columns.keys()
    return columns if is_log else {}


def _read_messages(
    records: Iterator[tuple[str, Any]], columns: dict[str, str]
) -> Iterator[Message]:
    for _, record in records:
        if not isinstance(record, dict):
            continue

        def cell(role: str, record: dict = record) -> str:
            value = record.get(columns.get(role, ""))
            return "" if value is None else str(value).strip()

        yield Message(
            speaker=cell("speaker"),
            times=parse_times(cell("time")),
            text=cell("text"),
            chat=cell("chat"),
            is_me=cell("me").lower() in ("1", "true"),
            left_out=kind_of_type(cell("type")),
            has_type="type" in columns,
        )


JSON = Format("JSON、JSONL 语料", _recognise, read_json)
