"""各种格式共用的：一段对话、读取的选项、文件的开头，以及一种格式是什么。"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TextIO

from chitchat.corpus.chat_logs import LogOptions
from chitchat.corpus.formats.json_values import JsonShape, read_shape
from chitchat.corpus.messages import Message

HEAD_CHARS = 1 << 13  # 认格式时看多少


def one_line(text: str) -> str:
    """话里的换行变成空格，去掉首尾的空白；别的字符不动。"""
    return " ".join(text.replace("\r\n", "\n").split("\n")).strip()


class Dialogue(NamedTuple):
    """一段对话。

    Attributes:
        utterances: 各句，首尾没有空白。
        lines: 各句所在的行号；格式不分行（如 JSON）时为空。
    """

    utterances: list[str]
    lines: Sequence[int] = ()


@dataclass(frozen=True)
class ReadOptions(LogOptions):
    """读取时的选项，名字与命令行参数相同；各格式只看自己用得上的。"""

    format: str = "auto"
    split: str = "train"
    text_column: str | None = None
    dialogue_column: str | None = None
    speaker_column: str | None = None
    time_column: str | None = None
    clean: bool = False


class Head:
    """一个文件的开头，供认格式用。

    Attributes:
        name: 给用户看的文件名。
        suffix: 小写的后缀。
        text: 前面 HEAD_CHARS 个字符。
        starts_like_json: 以括号开头；整个 JSON 常常只有一行，多长都可以。
    """

    def __init__(self, name: str, suffix: str, open_text: Callable) -> None:
        self.name = name
        self.suffix = suffix
        with open_text() as file:
            self.text: str = file.read(HEAD_CHARS)
        first = next((line for line in self.lines if line[0] != "#"), "")  # JSONL 里可以有注释
        self.starts_like_json = first.lstrip("\ufeff").startswith(("{", "["))
        self.open_text = functools.partial(open_text, has_long_lines=self.starts_like_json)

    @cached_property
    def lines(self) -> list[str]:
        """不空的各行，首尾没有空白；最后一行可能不完整。"""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def json(self) -> JsonShape | None:
        """像 JSON 时，它的大致结构；不像时是 None。"""
        if not self.starts_like_json:
            return None
        with self.open_text() as file:
            shape = read_shape(file)
        return shape if shape.first or shape.keys else None


@dataclass(frozen=True)
class Format:
    """一种格式。

    Attributes:
        label: 给人看的名字。
        recognise: 由开头认出；返回凭据，空串表示不是这种格式。
        read: 生成器，给出对话，聊天记录则给出消息；内存里只有当前一段。
        is_log: 给出的总是消息；不定的由第一条看出。
        is_plain: 一行一行的文字；一行长得没有尽头就不读。
    """

    label: str
    recognise: Callable[[Head], str]
    read: Callable[[TextIO, ReadOptions, Head], Iterator[Dialogue] | Iterator[Message]]
    is_log: bool = False
    is_plain: bool = False
