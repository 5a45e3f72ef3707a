"""隐去私人信息：电话、证件号、银行卡号换成一个平常的词，邮箱也是，网址去掉。"""

from __future__ import annotations

import re
from collections import Counter

_FULL_WIDTH = {0xFEE0 + ord(char): char for char in "0123456789-"}
_MAYBE = re.compile(r"\d{3}|@|https?:|www\.", re.IGNORECASE)  # \d 也认全角
_LINK = re.compile(r"(?:https?://|www\.)[^\s\u4e00-\u9fff，。！？；、）】》]+", re.IGNORECASE)
_EMAIL = re.compile(r"[A-Za-z0-9][\w.+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+", re.ASCII)
_IDENTITY = re.compile(r"(?<!\d)\d{6}(?:18|19|20)\d{2}[01]\d[0-3]\d{4}[\dXx](?!\d)", re.ASCII)
_BANK_CARD = re.compile(
    r"(?<!\d)\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}(?:[ -]?\d{1,3})?(?!\d)", re.ASCII
)
_PHONE = re.compile(
    r"(?<!\d)(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)"
    r"|(?<!\d)0\d{2,3}-\d{7,8}(?!\d)|(?<!\d)400[ -]?\d{3}[ -]?\d{4}(?!\d)",
    re.ASCII,
)


def mask_private(text: str, counts: Counter[str] | None = None) -> str:
    """隐去一句话里的私人信息。

    Args:
        text: 一句话。
        counts: 每隐去一处就把那一种加一；None 表示不数。

    Returns:
        隐去之后的话，可能是空串。
    """
    if not _MAYBE.search(text):
        return text
    counts = Counter() if counts is None else counts
    for kind, pattern, word in (
        ("网址", _LINK, ""),
        ("邮箱", _EMAIL, "某个邮箱"),
        ("证件号", _IDENTITY, "某个号码"),
        ("银行卡号", _BANK_CARD, "某个号码"),
        ("电话", _PHONE, "某个号码"),
    ):
        # 全角数字换成半角再找；一个字对一个字，位置不变。
        plain = text.translate(_FULL_WIDTH)
        parts, end = [], 0
        for match in pattern.finditer(plain):
            if kind == "银行卡号" and not _passes_luhn(match[0]):
                continue
            parts += [text[end : match.start()], word]
            end = match.end()
            counts[kind] += 1
        text = "".join([*parts, text[end:]])
    return " ".join(text.split())


def _passes_luhn(text: str) -> bool:
    """银行卡号的校验位对不对（ISO/IEC 7812-1 附录 B）。"""
    digits = [int(char) for char in text if char.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
