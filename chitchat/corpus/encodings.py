"""编码：由字节认出，认不准的不猜。"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

# 最常见的字，简体与繁体；任何中文里它们都占三四成，解错了的只占百分之几。
_COMMON_HANZI = frozenset(
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
    "知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女问力机给等几很业最"
    "吗呢吧啊哈嗯哦早晚吃睡真怎什今明谢再喜欢爱快走做找让"
    "這個來國說們為時會過學對裡後麼沒於發當無開見經頭從動兩長現將與進實點種聲話問機給幾業嗎歡愛讓誰還樣"
)
_COMMON_HANGUL = frozenset("이다는가에을를은하고지의도로나사있어기한시그리아해게요안녕세")
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\u30fc]")
_LEGACY = ("gb18030", "big5hkscs", "cp932", "euc_kr", "cp1252")
_PLAIN = re.compile(
    "[\\n\\r\\t -~\u0085\u00a0-\u00ff\u2010-\u2027\u2030-\u205e\u3000-\u30ff"
    "\u3400-\u9fff\uac00-\ud7a3\uff00-\uffef\ufe0f\u200d\ufeff\u2190-\u27bf\U0001f000-\U0001faff]"
)
_WESTERN = re.compile(
    "(?:(?<=[A-Za-z ])[\u2013-\u2026\u00c0-\u00ff](?![^\x00-\x7f])"
    "|(?<![^\x00-\x7f])[\u2013-\u2026\u00c0-\u00ff](?=[A-Za-z ]))"
)
_HANZI = re.compile("[\u3400-\u9fff\u3041-\u30ff\uac00-\ud7a3]")


def detect_encoding(sample: bytes) -> str:
    """由开头的若干字节认出编码，返回 Python 的编码名。

    UTF-8 要严格；UTF-16 要有 BOM，或者几乎每个字符都说得通；其余在 GB 18030、Big5、Shift-JIS、
    EUC-KR、Windows-1252 里挑最像文字的。夹着少数坏行的 UTF-8 仍算 UTF-8，读到那里再指出行号。
    """
    if sample.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    is_utf8 = _decode(sample, "utf-8") is not None
    if sample.count(0) > 0.02 * len(sample) or (0 in sample and not is_utf8):
        for name in ("utf-16-le", "utf-16-be"):
            if _looks_like_text(_decode(sample[: len(sample) // 2 * 2], name)):
                return name
    if is_utf8:
        return "utf-8-sig"
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    if 4 * sum(map(_is_utf8_hanzi, lines)) >= len(lines):
        return "utf-8-sig"
    likeness = {name: _likeness(sample, name) for name in _LEGACY}
    best = max(_LEGACY, key=likeness.__getitem__)
    return best if likeness[best] > 0 else "utf-8-sig"


def _decode(sample: bytes, encoding: str) -> str | None:
    """解出文字，末尾不完整的字符不要；不合编码时是 None。"""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return None


def _looks_like_text(text: str | None) -> bool:
    return bool(text) and len(_PLAIN.findall(text)) >= 0.95 * len(text)


def _is_utf8_hanzi(line: bytes) -> bool:
    """这一行是 UTF-8，并且有汉字、假名或谚文；碰巧合乎 UTF-8 的 GBK 里没有。"""
    text = _decode(line, "utf-8")
    return text is not None and bool(_HANZI.search(text))


def _likeness(sample: bytes, encoding: str) -> float:
    """解出的文字有多像那种语言，越大越像；解不出的字节重罚。"""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    foreign = [char for char in text if char > "\x7f"]
    if not foreign:
        return 0
    num_bad = foreign.count("\ufffd")
    if encoding == "cp1252":
        # 西文里非 ASCII 的字符又少又散，前后多是字母或空白。
        num_good = len(_WESTERN.findall(text))
        return (0.35 * num_good - num_bad) / len(foreign)
    if encoding == "cp932":
        num_good = len(_KANA.findall(text))
    else:
        common = _COMMON_HANGUL if encoding == "euc_kr" else _COMMON_HANZI
        num_good = sum(char in common for char in foreign)
    return (num_good - 3 * num_bad) / len(foreign)


def find_mixed_line(lines: Iterable[bytes]) -> int:
    """认作旧编码的文件里，第一行其实是 UTF-8 的行号；没有就是 0。"""
    for number, line in enumerate(lines, 1):
        text = None if line.isascii() else _decode(line, "utf-8")
        if text is not None and len(_HANZI.findall(text)) >= 2 and _looks_like_text(text):
            return number
    return 0
