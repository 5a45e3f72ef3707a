"""认格式：依次问各种格式，都说不是的才当作一行一句的文本，并且先看它像不像。"""

from __future__ import annotations

import re
from typing import NamedTuple

from chitchat.corpus.formats.base import Format, Head
from chitchat.corpus.formats.chatlab import CHATLAB
from chitchat.corpus.formats.discord import DISCORD
from chitchat.corpus.formats.json_dialogues import JSON
from chitchat.corpus.formats.line import LINE
from chitchat.corpus.formats.plain import (
    CONV,
    ROWS,
    SCRIPT,
    TEXT,
    YAML,
    has_labels,
    mark_of_rows,
)
from chitchat.corpus.formats.qq import QQ
from chitchat.corpus.formats.tables import TABLE
from chitchat.corpus.formats.telegram import TELEGRAM
from chitchat.corpus.formats.wechat import WECHAT
from chitchat.corpus.formats.whatsapp import WHATSAPP
from chitchat.corpus.times import parse_times
from chitchat.errors import UserError

# 次序要紧：前面的写法更特别。WhatsApp 的一行 QQ 也认得，所以在它之前。
FORMATS: dict[str, Format] = {
    "chatlab": CHATLAB,
    "telegram": TELEGRAM,
    "discord": DISCORD,
    "wechat": WECHAT,
    "whatsapp": WHATSAPP,
    "line": LINE,
    "qq": QQ,
    "json": JSON,
    "yaml": YAML,
    "csv": TABLE,
    "conv": CONV,
    "tsv": ROWS,
    "script": SCRIPT,
    "text": TEXT,
}
ALIASES = {"jsonl": "json", "xlsx": "csv"}
FORMAT_NAMES = (*FORMATS, *ALIASES)

_DATE = (
    r"(?:\d{4}[-/.年] ?\d{1,2}[-/.月] ?\d{1,2}|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}"
    r"|\d{1,2}月\d{1,2}日|\d{2}-\d{2} )"
)
_CLOCK = r"\d{1,2}[:：]\d{2}(?:[:：]\d{2})?(?!\d)"
_TIMED = re.compile(
    rf"\W{{0,3}}\S{{0,12}}?[\s\[(（:：]{{0,2}}(?:{_DATE}|{_CLOCK})|.{{0,40}}{_DATE}.{{0,8}}{_CLOCK}\W?\Z"
)
_NAME_ONLY = re.compile(r"\S[^，。！？]{0,29}[:：]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_SEPARATOR = re.compile(r"([-=*_#~—])\1{2,}")


class Detected(NamedTuple):
    """认出的格式。

    Attributes:
        name: FORMATS 的键。
        why: 凭什么。
        warnings: 可疑的地方，给用户看的句子。
    """

    name: str
    why: str
    warnings: list[str]


def detect_format(head: Head) -> Detected:
    """由后缀和开头认出格式。

    Raises:
        UserError: 像是聊天记录，却不是认得的种类。
    """
    for name, found in FORMATS.items():
        if why := found.recognise(head):
            return Detected(name, why, _doubts_of_rows(head) if name == "tsv" else [])
    return Detected("text", "一行一句", _doubts(head))


def _doubts_of_rows(head: Head) -> list[str]:
    """当作一行一段之前，看看第一格是不是话。

    Raises:
        UserError: 各行都有一格是时间。
    """
    mark = mark_of_rows(head)
    rows = [[cell.strip() for cell in line.split(mark)] for line in head.lines[:200]]
    rows = [row for row in rows if len(row) > 1]
    timed = [row for row in rows if any(parse_times(cell) for cell in row[:3])]
    if len(rows) > 1 and len(timed) >= 0.8 * len(rows):
        raise UserError(
            f"各行都有一格是时间（如 {timed[0][0]!r}），像是没有表头的聊天记录："
            "请在第一行写上列名 time、sender、content，各列都以 TAB 隔开，另存为 .csv"
        )
    first = [row[0] for row in rows]
    if len(first) > 5 and not has_labels(head.lines):
        if all(re.fullmatch(r"[\d.]+", cell) for cell in first):
            return [f"各行第一格都是数（如 {first[0]}），会当作一句话训练：若是编号，请去掉这一列"]
        if 3 * len(set(first)) < len(first) and all(len(cell) < 12 for cell in first):
            return [f"各行第一格总是那几个（如 {first[0]}），会当作一句话训练：若是说话人，请去掉"]
    return []


def _doubts(head: Head) -> list[str]:
    """当作一行一句的文本之前，看看像不像：带时间、带名字的拒绝，其余只提醒。

    Raises:
        UserError: 像是聊天记录，或不是文字。
    """
    lines = head.lines
    if 3 * len(_CONTROL.findall(head.text)) > len(head.text) > 0:
        raise UserError("多半是控制字符，不是文字：请换成文本文件")
    timed = [line for line in lines if _TIMED.match(line)]
    named = [line for line in lines if _NAME_ONLY.fullmatch(line)]
    is_named = len(named) >= 4 and 2 * len(set(named)) <= len(named)
    for kind, found in (("带时间", timed), ("只有名字和冒号", named if is_named else [])):
        if len(found) >= 3 and len(found) >= 0.25 * len(lines):
            labels = "、".join(name for name in FORMATS if name != "text")
            raise UserError(
                f"像是聊天记录或带时间的文本（开头 {len(lines)} 行里有 {len(found)} 行{kind}，"
                f"如 {found[0][:30]!r}），但不是认得的种类：认得 {labels}，"
                "可用 --format 指定其中之一；从聊天窗口复制的，请改用导出工具，或整理成三列的 CSV，"
                "列名 time、sender、content（别的列名用 --time_column、--speaker_column、"
                "--text_column 指出）；确实是一行一句、空行分隔的文本，就用 --format text"
            )
    separators = [line for line in lines if _SEPARATOR.fullmatch(line)]
    if len(separators) > 1:
        return [f"有 {separators[0][:12]} 这样的分隔线，会当作一句话训练：请换成空行"]
    return []


def format_of(name: str) -> Format:
    """``--format`` 的取值是哪种格式。"""
    return FORMATS[ALIASES.get(name, name)]
