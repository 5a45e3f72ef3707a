"""流式地读 JSON：不把整个文件放进内存，一个文件里接连的几个值都读。"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import ijson
from ijson.common import ObjectBuilder

from chitchat.errors import UserError

MAX_DEPTH = 500  # 套得比这还深的不是对话，只会耗尽内存
MAX_EVENTS = 30_000  # 看结构时最多看多少个记号
_LONE_SURROGATE = re.compile(
    r"(?<!\\)(?:\\\\)*\\u(?:[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u)[dD][c-fC-F][0-9a-fA-F]{2})"
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NEST = re.compile(rf"(?:[\[{{][^\[\]{{}}]*){{{MAX_DEPTH}}}")
_SPACE = " \t\r\n\ufeff"
_BROKEN = (ijson.JSONError, ValueError, RecursionError, IndexError)


class TooDeepError(ValueError):
    """JSON 套得太深。"""


@dataclass
class JsonShape:
    """一个 JSON 文件的大致结构。

    Attributes:
        is_lines: 一行一个值（JSONL）。
        first: 各个列表的路径（如 ``messages.item``）→ 它的第一个元素；JSONL 的第一行在空路径下。
        keys: 各个对象的路径 → 见过的键。
        scalars: 各个不在列表里的简单值，路径 → 值；太长的字符串不在内。
    """

    is_lines: bool = False
    first: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Any:
        """第一条记录：JSONL 的第一行，或最外层列表的第一个元素；都没有时是 None。"""
        return self.first.get("" if self.is_lines else "item")


class Utf8Bytes:
    """把文字变成 ijson 要的 UTF-8 字节；不成对的代理码在这里拦下，ijson 会把它变成问号。"""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.tail = ""
        self.is_start = True
        self.gauge = DepthGauge()

    def read(self, size: int = -1) -> bytes:
        """读出大约 size 个字符。"""
        if size == 0:  # ijson 先这样问一下给的是不是字节
            return b""
        text = self.file.read(size)
        if self.is_start:
            text, self.is_start = text.lstrip("\ufeff"), False
        if "\\u" in text or "\\u" in self.tail:
            check_surrogates(self.tail + (text or " " * 12), start=8 if len(self.tail) == 40 else 0)
        self.tail = (self.tail + text)[-40:]
        self.gauge.add(text)
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise UserError("JSON 里有不成对的代理码：请改正或去掉") from error


class DepthGauge:
    """一块一块地数 JSON 套了多少层；字符串里的括号不算，字符串可以跨块。"""

    def __init__(self) -> None:
        self.depth = 0
        self.is_in_string = False
        self.rest = ""  # 上一块末尾的反斜杠，与下一块的头一个字连着看

    def add(self, text: str) -> None:
        """再看一块。

        Raises:
            TooDeepError: 套得太深。
        """
        text = self.rest + text
        self.rest = "\\" * ((len(text) - len(text.rstrip("\\"))) % 2)
        text = text.removesuffix(self.rest)
        outside = _STRING.sub("", f'"{text}' if self.is_in_string else text)
        outside, quote, _ = outside.partition('"')
        self.is_in_string = bool(quote)
        self.depth += sum(map(outside.count, "[{")) - sum(map(outside.count, "]}"))
        if self.depth > MAX_DEPTH or _NEST.search(outside):
            raise TooDeepError


def check_surrogates(text: str, start: int = 0) -> None:
    r"""JSON 文字里不能有不成对的 ``\ud800`` 至 ``\udfff``。

    末尾 12 个字符可能不完整，不看；开头的 ``start`` 个字符只用作前文。

    Raises:
        UserError: 有。
    """
    match = _LONE_SURROGATE.search(text, start)
    if match and match.end() <= len(text) - 12:
        around = text[max(0, match.start() - 12) : match.start()]
        raise UserError(
            f"JSON 里 {around!r} 之后有不成对的代理码（\\ud800 至 \\udfff）：请改正或去掉"
        )


def iterate_items(file: TextIO, prefix: str) -> Iterator[Any]:
    """逐个给出路径为 ``prefix`` 的值；列表的元素是 ``….item``，空路径是最外层的各个值。

    Raises:
        UserError: 不是完整的 JSON。
    """
    with explained():
        yield from ijson.items(Utf8Bytes(file), prefix, multiple_values=True, use_float=True)


def iterate_pairs(file: TextIO) -> Iterator[tuple[str, Any]]:
    """逐个给出最外层对象的键和值。"""
    with explained():
        yield from ijson.kvitems(Utf8Bytes(file), "", multiple_values=True, use_float=True)


def check_syntax(file: TextIO) -> None:
    """从头到尾看一遍是不是正确的 JSON。

    Raises:
        UserError: 不是。
    """
    with explained():
        for _ in ijson.basic_parse(Utf8Bytes(file), multiple_values=True, use_float=True):
            pass


def iterate_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """JSONL：逐行给出行号和值；空行和 ``#`` 开头的行略去。

    Raises:
        UserError: 有一行不是完整的 JSON（指出行号）。
    """
    for number, line in enumerate(file, 1):
        line = line.strip(_SPACE)
        if not line or line.startswith("#"):
            continue
        try:
            value = json.loads(line)
            line.encode()
            if "\\u" in line:
                check_surrogates(line + " " * 12)
        except json.JSONDecodeError as error:
            raise UserError(
                f"第 {number} 行不是完整的 JSON（第 {error.colno} 个字符处）：请改正或删去这一行"
            ) from error
        except (RecursionError, ValueError) as error:
            raise UserError(
                f"第 {number} 行的 JSON 太深或有过大的数：请改正或删去这一行"
            ) from error
        except UserError as error:
            raise UserError(f"第 {number} 行：{error}") from error
        yield number, value


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """把 ijson 的异常变成给用户看的一句话。"""
    try:
        yield
    except (ijson.JSONError, RecursionError, ValueError) as error:
        raise UserError(_explain_syntax(error)) from error


def _explain_syntax(error: Exception) -> str:
    if isinstance(error, TooDeepError):
        return f"JSON 套了 {MAX_DEPTH} 层以上，不像对话：请检查文件，或用 --format 指定格式"
    reason, _, drawing = str(error).partition("\n")
    if "premature EOF" in reason:
        return "JSON 不完整，后半截没有了：请重新下载或导出"
    place = drawing.split("\n")[0].strip()[:60]
    return (
        f"不是正确的 JSON{f'（{place!r} 一带）' if place else ''}："
        "常见的毛病是多了一个逗号、用了单引号、后面还有别的内容；"
        "请改正，或用 Python 的 json.dump 重新写出"
    )


def read_shape(file: TextIO) -> JsonShape:
    """看 JSON 的大致结构：只看开头，写坏了的也看到坏处为止。"""
    shape = JsonShape()
    head = file.read(1 << 16)
    lines = [line for line in head.split("\n") if line.strip(_SPACE) and line[0] != "#"]
    with contextlib.suppress(*_BROKEN):
        first = json.loads(lines[0].strip(_SPACE))
        if len(lines) > 1 and lines[1].lstrip(_SPACE).startswith(("{", "[")):
            shape.is_lines, shape.first[""] = True, first
    with contextlib.suppress(*_BROKEN):
        _fill(shape, _Chained(head, file))
    return shape


class _Chained:
    """已读出的开头，接着是文件剩下的部分。"""

    def __init__(self, head: str, file: TextIO) -> None:
        self.head = head
        self.file = file

    def read(self, size: int = -1) -> str:
        if self.head:
            head, self.head = self.head, ""
            return head
        return self.file.read(size)


def _fill(shape: JsonShape, file: Any) -> None:
    """由记号填出结构。每个列表只留第一个元素，元素之内的不再另记。"""
    builders: list[tuple[str, int, ObjectBuilder]] = []
    depth = 0
    events = ijson.parse(Utf8Bytes(file), multiple_values=True, use_float=True)
    for prefix, event, value in itertools.islice(events, MAX_EVENTS):
        if event in ("end_map", "end_array"):
            depth -= 1
        starts = event in ("start_map", "start_array")
        is_element = prefix.endswith("item") and event not in ("end_map", "end_array", "map_key")
        if is_element and prefix not in shape.first and prefix.count("item") <= 2:
            shape.first[prefix] = None
            builders.append((prefix, depth, ObjectBuilder()))
        for _, _, builder in builders:
            builder.event(event, value)
        if builders and not starts and depth == builders[-1][1] and event != "map_key":
            path, _, builder = builders.pop()
            shape.first[path] = builder.value
        if event == "map_key":
            keys = shape.keys.setdefault(prefix, [])
            if len(keys) < 100 and value not in keys:
                keys.append(value)
        elif event in ("string", "number") and "item" not in prefix and len(str(value)) < 1000:
            shape.scalars[prefix] = value
        depth += starts
    for path, _, builder in builders:
        shape.first[path] = getattr(builder, "value", None)
