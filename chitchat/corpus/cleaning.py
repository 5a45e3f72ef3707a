"""--clean：去掉微博、论坛、字幕语料里的杂质，规则取自 LCCC 公开的清洗办法。

来源: “A Large-Scale Chinese Short-Text Conversation Dataset”, arXiv:2008.03946 §3.2。
句子能修的修（去掉 @名字、话题、网址……），修不了的在那里把对话切断，剩下只有一句的不要。
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from chitchat.corpus.formats.base import Dialogue

MAX_SAME_REPLY = 100  # 同一句回复最多留这么多次，再多就是套话
MAX_CHARS = 200
_HANZI = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_LETTER = re.compile(r"[^\W_]")


class _Edit(NamedTuple):
    """一种修法。

    Attributes:
        name: 规则的名字。
        pattern: 要找的。
        replacement: 换成什么。
    """

    name: str
    pattern: re.Pattern
    replacement: str | Callable[[re.Match], str]


def _three_times(match: re.Match) -> str:
    return match[1] * 3


_EDITS = (
    _Edit("回复 @某人", re.compile(r"回复\s?@[^\s:：]{1,30}\s?[:：]\s?"), ""),
    _Edit("转发的原文", re.compile(r"//\s?@[^\s:：]{1,30}\s?[:：].*", re.DOTALL), ""),
    _Edit("@某人", re.compile(r"@[\w\u4e00-\u9fff·-]{1,30}\s?"), ""),
    _Edit("#话题#", re.compile(r"#[^#\n]{1,40}#"), ""),
    _Edit("网址", re.compile(r"(?:https?://|www\.)[\w./?=&%#~:+,;@!$*'()-]+", re.IGNORECASE), ""),
    _Edit("重复的词", re.compile(r"(.{1,6}?)\1{3,}", re.DOTALL), _three_times),
)
_BAD = (
    ("电话号码", re.compile(r"(?<!\d)(?:1[3-9]\d{9}|0\d{2,3}-?\d{7,8})(?!\d)")),
    (
        "乱码、控制字符",
        re.compile("[\ufffd\ue000-\uf8ff\x00-\x08\x0b-\x1f\x7f-\x9f]|锟斤拷|烫烫烫"),
    ),
)


class Cleaner:
    """清洗一个来源；记得每句回复出现过几次，内存随不同的回复数增长（每句一个散列值）。

    Args:
        counts: 规则 → 处数，随清洗增加；一句里可以有几处。
    """

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.replies: Counter[int] = Counter()

    def clean(self, dialogue: Dialogue) -> Iterator[Dialogue]:
        """清洗之后的各段；在修不了的句子处切断，切剩一句的不要。"""
        kept: list[str] = []
        lines: list[int] = []
        numbers = dialogue.lines or [0] * len(dialogue.utterances)
        pieces: list[tuple[list[str], list[int]]] = []
        for utterance, line in zip(dialogue.utterances, numbers, strict=True):
            text = self._edit(utterance)
            reason = self._reason_to_cut(text, kept[-1] if kept else None)
            if reason:
                self.counts[reason] += 1
                pieces.append((kept, lines))
                kept, lines = [], []
            else:
                kept.append(text)
                lines.append(line)
        pieces.append((kept, lines))
        least = min(2, len(dialogue.utterances))
        for kept, lines in pieces:
            if len(kept) >= least:
                yield Dialogue(kept, lines if dialogue.lines else ())

    def _edit(self, text: str) -> str:
        for name, pattern, replacement in _EDITS:
            text, count = pattern.subn(replacement, text)
            if count:
                self.counts[name] += count
        return " ".join(text.split())

    def _reason_to_cut(self, text: str, context: str | None) -> str:
        """这一句为什么不能要；能要就是空串。"""
        for name, pattern in _BAD:
            if pattern.search(text):
                return name
        if not _HANZI.search(text):
            return "没有汉字"
        if 3 * len(_LETTER.findall(text)) < len(text):
            return "多半是符号"
        if len(text) > MAX_CHARS:
            return "太长"
        if context is None:
            return ""
        if text == context:
            return "与上一句相同"
        key = hash(text)
        self.replies[key] += 1
        return "到处都是的回复" if self.replies[key] > MAX_SAME_REPLY else ""
