"""语料：从文本文件逐段读出对话。"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from chitchat.runtime import UserError


def read_dialogues(
    path: Path, report: Callable[[int], None] = lambda position: None
) -> Iterator[list[str]]:
    """逐段读出对话，内存里只有当前一段。

    一行一句话，空行分隔对话；只含空白的行算空行，连续的空行算一个。
    LF、CRLF、CR 以及混用都算换行，BOM 被去掉；U+0085、U+2028 等是普通字符，不换行。

    Args:
        path: UTF-8 文本文件。
        report: 每读出一段就以已读的字节数调用一次，用来显示进度。

    Yields:
        一段对话，至少一句；每句已去掉首尾空白。

    Raises:
        UserError: 文件不存在、不是文件，或有不合 UTF-8 的字节（指出行号）。
    """
    if not path.is_file():
        raise UserError(
            f"找不到语料 {path}：请用 --train_path 指定一个文本文件，一行一句、空行分隔对话"
        )
    dialogue: list[str] = []
    try:
        # newline=None 只把 \n、\r、\r\n 当作换行，不像 str.splitlines 那样还认 U+0085 等字符。
        with (
            path.open("rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None) as file,
        ):
            for line in file:
                utterance = line.strip()
                if utterance:
                    dialogue.append(utterance)
                elif dialogue:
                    report(raw.tell())
                    yield dialogue
                    dialogue = []
            report(raw.tell())
    except UnicodeDecodeError as error:
        raise UserError(_describe_bad_byte(path)) from error
    if dialogue:
        yield dialogue


def _describe_bad_byte(path: Path) -> str:
    """找出第一处不合 UTF-8 的字节，写成给用户的一句话。"""
    number = 1
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                before = line[: error.start]
                number += before.count(b"\r") - before.count(b"\r\n")  # 单独的 CR 也换行
                return (
                    f"{path} 第 {number} 行不是 UTF-8：有字节 0x{line[error.start]:02X}；"
                    "请在编辑器里另存为 UTF-8（GB 18030 的文件可用 iconv -f gb18030 -t utf-8 转换）"
                )
            number += line.count(b"\n") + line.count(b"\r") - line.count(b"\r\n")
    return f"{path} 不是完整的 UTF-8 文件，请重新保存为 UTF-8"
