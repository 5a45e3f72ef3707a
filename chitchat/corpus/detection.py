"""认格式：依次问各种格式，都说不是的才当作一行一句的文本，并且先看它像不像。"""

from __future__ import annotations

import re
from typing import NamedTuple

from chitchat.corpus.formats.base import Format, Head
from chitchat.corpus.formats.chatlab import CHATLAB
from chitchat.corpus.formats.discord import DISCORD
from chitchat.corpus.formats.json_dialogues import JSON
from chitchat.corpus.formats.line import LINE
from chitchat.corpus.formats.plain import CONV, ROWS, SCRIPT, TEXT, YAML
from chitchat.corpus.formats.qq import QQ
from chitchat.corpus.formats.tables import TABLE
from chitchat.corpus.formats.telegram import TELEGRAM
from chitchat.corpus.formats.wechat import WECHAT
from chitchat.corpus.formats.whatsapp import WHATSAPP
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

_STARTS_WITH_TIME = re.compile(
    r"\W{0,3}\S{0,12}?[\s\[(（:：]{0,2}"
    r"(?:\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}|\d{1,2}[:：]\d{2}(?:[:：]\d{2})?\b)"
)
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
            return Detected(name, why, [])
    return Detected("text", "一行一句", _doubts(head))


def _doubts(head: Head) -> list[str]:
    """当作一行一句的文本之前，看看像不像：带时间的拒绝，其余只提醒。"""
    lines = head.lines
    timed = [line for line in lines if _STARTS_WITH_TIME.match(line)]
    if len(timed) >= 3 and len(timed) >= 0.25 * len(lines):
        labels = "、".join(name for name in FORMATS if name != "text")
        raise UserError(
            f"像是聊天记录或带时间的文本（开头 {len(lines)} 行里有 {len(timed)} 行带时间，"
            f"如 {timed[0][:30]!r}），但不是认得的种类：认得 {labels}，可用 --format 指定其中之一；"
            "确实是一行一句、空行分隔的文本，就用 --format text"
        )
    separators = [line for line in lines if _SEPARATOR.fullmatch(line)]
    if len(separators) > 1:
        return [f"有 {separators[0][:12]} 这样的分隔线，会当作一句话训练：请换成空行"]
    return []


def format_of(name: str) -> Format:
    """``--format`` 的取值是哪种格式。"""
    return FORMATS[ALIASES.get(name, name)]
