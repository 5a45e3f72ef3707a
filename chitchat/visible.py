"""把不是我们写的文字（文件名、列名、昵称、消息）安全地显示在终端和日志里。"""

from __future__ import annotations

import re

# 控制字符，和改变书写方向的：后者能让后面的字倒着显示，冒充别的内容。
_CONTROLS = "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029"
_BIDI = "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"
_INVISIBLE = re.compile(f"[{_CONTROLS}{_BIDI}]")
_INVISIBLE_BUT_LINES = re.compile(f"(?![\\t\\n])[{_CONTROLS}{_BIDI}]")


def visible(text: str) -> str:
    r"""控制字符和改变方向的字符写成 ``\x1b`` 一类的样子；换行和 TAB 不变。"""
    return _INVISIBLE_BUT_LINES.sub(_escape, text)


def one_visible_line(text: str) -> str:
    r"""与 visible 相同，但换行也写成 ``\x0a``：日志里一条只占一行。"""
    return _INVISIBLE.sub(_escape, text)


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
