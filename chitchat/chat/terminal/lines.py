"""用户打的字：终端里逐行编辑，管道里逐行读出并认出编码。"""

from __future__ import annotations

import codecs
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from chitchat.errors import UserError

logger = logging.getLogger(__name__)

BOM = "\ufeff"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(*, is_terminal: bool, history_path: Path | None = None) -> Iterator[str]:
    """逐行给出用户的话；终端里带提示符和行编辑，否则一行标准输入是一句。

    Args:
        is_terminal: 标准输入是不是终端。
        history_path: 终端里打过的话记在哪里；None 表示不记。

    Raises:
        UserError: 管道里的字不是 UTF-8、UTF-16 或 GB 18030；或没有装 prompt_toolkit。
    """
    return _read_terminal(history_path) if is_terminal else _read_pipe()


def _read_pipe() -> Iterator[str]:
    """一行标准输入是一句。"""
    buffer = getattr(sys.stdin, "buffer", None)  # 标准输入可能已关闭
    lines = (sys.stdin or ()) if buffer is None else _decode_lines(buffer)
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix(BOM)


def _read_terminal(history_path: Path | None) -> Iterator[str]:
    """在终端里逐行读；管道用不着 prompt_toolkit，所以到这里才导入。"""
    try:
        from chitchat.chat.terminal.prompt import prompt_lines
    except ModuleNotFoundError as error:
        if error.name != "prompt_toolkit":
            raise
        raise UserError(
            "在终端里聊天要用 prompt_toolkit：请先运行 pip install prompt_toolkit"
        ) from None
    return prompt_lines(history_path)


def _decode_lines(buffer: BinaryIO) -> Iterator[str]:
    """认出编码，逐行解码；不等后面的行，对方因此可以一问一答。"""
    head = buffer.peek(1)
    encoding = _find_utf16(head)
    if encoding:
        logger.info("stdin_encoding=%s", encoding)
        reader = codecs.getreader(encoding)(buffer)
        try:
            yield from reader
        except UnicodeError as error:
            raise UserError(f"标准输入不是完整的 UTF-16（{error}）：请先转换成 UTF-8") from error
        return
    encoding = "utf-8" if _is_utf8(head) else "gb18030"
    for number, line in enumerate(buffer, start=1):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError:
            encoding = "gb18030"
            text = _decode_gb18030(line, number)
        yield from text.rstrip("\r\n").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _find_utf16(head: bytes) -> str:
    """由开头的字节认出 UTF-16；不是的话是空的。没有 BOM 时看换行和 ASCII 字的 NUL 在哪一边。"""
    if head.startswith(UTF16_MARKS):
        return "utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even == odd:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"


def _is_utf8(head: bytes) -> bool:
    """开头是不是 UTF-8；末尾断开的字不算错。"""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _decode_gb18030(line: bytes, number: int) -> str:
    """按 GB 18030 解码一行。"""
    logger.info("stdin_encoding=gb18030 line=%d", number)
    try:
        return line.decode("gb18030")
    except UnicodeDecodeError as error:
        raise UserError(
            f"标准输入第 {number} 行不是 UTF-8，也不是 GB 18030 或 UTF-16："
            "请先转换，例如 iconv -f 原来的编码 -t UTF-8"
        ) from error
