"""语料：从各种格式的文件里逐段读出对话，并按要求筛选。"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from chitchat.corpus.formats import READERS, Dialogue, ReadOptions, detect_format
from chitchat.corpus.sources import Source, find_sources
from chitchat.errors import UserError

HEAD_CHARS = 1 << 12  # 认格式时看多少


def read_dialogues(
    path: Path, report: Callable[[int], None] = lambda position: None
) -> Iterator[list[str]]:
    """逐段读出一个文件里的对话，格式和编码都自动认出；每段是各句的列表，至少一句。

    Raises:
        UserError: 找不到文件，内容不合格式，或有不合编码的字节（指出行号）。
    """
    for source in find_sources([path]):
        for dialogue in read_source(source, ReadOptions(), report):
            yield dialogue.utterances


def read_source(
    source: Source, options: ReadOptions, report: Callable[[int], None] = lambda position: None
) -> Iterator[Dialogue]:
    """逐段读出一个文件里的对话，内存里只有当前一段。

    Args:
        source: find_sources 给出的文件。
        options: 格式等选项。
        report: 以已读的字节数调用，用来显示进度。

    Raises:
        UserError: 内容不合格式，或有不合编码的字节。
    """
    reader = READERS[source_format(source, options)]
    with source.open(report) as file:
        try:
            yield from reader(file, options)
        except csv.Error as error:
            raise UserError(f"{source.name} 不是完整的 CSV（{error}）：请重新导出") from error
        except UserError as error:
            raise UserError(f"{source.name}：{error}") from error


def source_format(source: Source, options: ReadOptions) -> str:
    """这个文件是什么格式。"""
    if options.format != "auto":
        return options.format
    with source.open() as file:
        head = file.read(HEAD_CHARS)
    return detect_format(source.suffix, head.split("\n"))


def describe_source(source: Source, options: ReadOptions) -> str:
    """给用户看的一行：文件是什么格式、编码，用了哪几种换行。读一遍文件。"""
    with source.open() as file:
        for _ in file:
            pass
        found = file.newlines or ()
    names = {"\n": "LF", "\r\n": "CRLF", "\r": "CR"}
    ends = [names[end] for end in ((found,) if isinstance(found, str) else found)]
    mixed = "（混用，不影响读取）" if len(ends) > 1 else ""
    name = source_format(source, options)
    kind = f"{name} 格式，{source.encoding} 编码"
    return f"{source.name}：{kind}，{'、'.join(ends) or '没有'} 换行{mixed}"


def filter_dialogues(
    dialogues: Iterable[Dialogue],
    *,
    min_turns: int = 1,
    max_turns: int = 0,
    max_dialogues: int = 0,
    drop_duplicates: bool = False,
) -> Iterator[Dialogue]:
    """筛选对话，次序不变。

    Args:
        dialogues: 全部对话。
        min_turns: 句数少于它的不要。
        max_turns: 句数多于它的不要，0 表示不限。
        max_dialogues: 筛选之后只要前面这么多段，0 表示不限。
        drop_duplicates: 各句都与前面某一段相同的不要。
    """
    seen: set[int] = set()  # 只记 64 位散列值，一千万段也不到 1 GB

    def is_wanted(dialogue: Dialogue) -> bool:
        num_turns = len(dialogue.utterances)
        if num_turns < min_turns or (max_turns and num_turns > max_turns):
            return False
        if drop_duplicates:
            key = hash(tuple(dialogue.utterances))
            if key in seen:
                return False
            seen.add(key)
        return True

    yield from itertools.islice(filter(is_wanted, dialogues), max_dialogues or None)


def total_size(sources: Sequence[Source]) -> int:
    """各文件在磁盘上的字节数之和，一个压缩包只算一次。"""
    return sum(path.stat().st_size for path in {source.path for source in sources})
