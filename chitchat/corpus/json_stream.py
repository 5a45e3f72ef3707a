"""逐个读出一个大 JSON 列表里的元素，不把整个文件放进内存。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TextIO

from chitchat.errors import UserError

CHUNK_CHARS = 1 << 16
_SPACE = " \t\r\n\ufeff"


def iterate_json(file: TextIO, split: str) -> Iterator[object]:
    """逐个给出列表的元素；最外层是对象时，给出名为 ``split`` 的那个列表的元素。

    Raises:
        UserError: 不是完整的 JSON，最外层不是列表或对象，或没有叫 ``split`` 的列表。
    """
    stream = _Stream(file)
    first = stream.take()
    if first == "[":
        yield from stream.elements()
        return
    if first != "{":
        raise UserError("不是 JSON：应以 [ 或 { 开头；请用 --format 指定真正的格式")
    names = []
    while stream.peek() == '"':
        names.append(stream.value())
        stream.expect(":")
        if stream.peek() == "[":
            stream.take()
            for element in stream.elements():
                if names[-1] == split:
                    yield element
        else:
            stream.value()
        if stream.peek() != ",":
            break
        stream.take()
    stream.expect("}")
    if split not in names:
        raise UserError(
            f"JSON 里没有叫 {split} 的一份：有 {'、'.join(names) or '零份'}；"
            "请用 --split 指定其中之一"
        )


class _Stream:
    """读到一半的 JSON：缓冲区里有多少看多少，不够再读。"""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.buffer = ""
        self.position = 0
        self.decoder = json.JSONDecoder()

    def fill(self, num_chars: int = CHUNK_CHARS) -> bool:
        """再读一些；文件已到末尾时返回 False。"""
        chunk = self.file.read(num_chars)
        self.buffer = self.buffer[self.position :] + chunk
        self.position = 0
        return bool(chunk)

    def peek(self) -> str:
        """下一个不是空白的字符；到了末尾是空串。"""
        while True:
            while self.position < len(self.buffer):
                if self.buffer[self.position] not in _SPACE:
                    return self.buffer[self.position]
                self.position += 1
            if not self.fill():
                return ""

    def take(self) -> str:
        char = self.peek()
        self.position += 1
        return char

    def expect(self, char: str) -> None:
        found = self.take()
        if found != char:
            found = found or "文件末尾"
            raise UserError(f"JSON 不完整：应有 {char}，得到 {found}；请重新下载或改正")

    def value(self) -> object:
        """解出下一个值；缓冲区里的还不完整就成倍地多读。"""
        self.peek()
        num_chars = CHUNK_CHARS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                value, end, problem = None, len(self.buffer), error
            # 刚好停在缓冲区末尾的数可能还有下半截。
            if end < len(self.buffer):
                self.position = end
                return value
            if not self.fill(num_chars):
                raise UserError(f"JSON 不完整（{problem.msg}）：请重新下载或改正")
            num_chars *= 2

    def elements(self) -> Iterator[object]:
        """``[`` 之后的各个元素，直到 ``]``。"""
        if self.peek() == "]":
            self.take()
            return
        while True:
            yield self.value()
            if self.peek() != ",":
                break
            self.take()
        self.expect("]")
