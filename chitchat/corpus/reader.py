"""语料：逐个来源认出格式、读出对话，并按要求筛选。"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from chitchat.corpus.chat_logs import build_dialogues
from chitchat.corpus.cleaning import Cleaner
from chitchat.corpus.detection import FORMAT_NAMES, detect_format, format_of
from chitchat.corpus.formats.base import Dialogue, Head, ReadOptions
from chitchat.corpus.messages import Message
from chitchat.corpus.sources import Source, find_sources
from chitchat.corpus.tally import Tally
from chitchat.errors import UserError

__all__ = ["FORMAT_NAMES", "filter_dialogues", "read_dialogues", "read_source", "total_size"]

MAX_UTTERANCE = 1_000_000  # 字；更长的不会是一句话，编码它要几 GB 内存
LONG_DIALOGUE = 20  # 认作一行一句的文本只有一段、却有这么多句，多半是忘了空行，提醒一句
ONE_DIALOGUE = 200  # 有这么多句，就是忘了空行；别的格式，这时才提醒


def read_dialogues(
    path: Path, report: Callable[[int], None] = lambda position: None
) -> Iterator[list[str]]:
    """逐段读出一个文件里的对话，格式和编码都自动认出；每段是各句的列表，至少一句。

    Raises:
        UserError: 找不到文件，内容不合格式，或有不合编码的字节（指出行号）。
    """
    for source in find_sources([path]):
        for dialogue in read_source(source, ReadOptions(), report=report):
            yield dialogue.utterances


def read_source(
    source: Source,
    options: ReadOptions,
    tally: Tally | None = None,
    report: Callable[[int], None] = lambda position: None,
) -> Iterator[Dialogue]:
    """逐段读出一个文件里的对话，内存里只有当前一段。

    Args:
        source: find_sources 给出的文件。
        options: 格式等选项。
        tally: 记下各种数目；None 表示不记。
        report: 以已读的字节数调用，用来显示进度。

    Raises:
        UserError: 内容不合格式，或有不合编码的字节。
    """
    tally = Tally() if tally is None else tally
    try:
        head = Head(source.name, source.suffix, source.open)
        if options.format == "auto":
            tally.format, tally.why, tally.warnings = detect_format(head)
        else:
            tally.format, tally.why = options.format, "由 --format 指定"
        found = format_of(tally.format)
        has_long_lines = head.starts_like_json and not found.is_plain
        with source.open(report, has_long_lines=has_long_lines) as file:
            items = iter(found.read(file, options, head))
            first = next(items, None)
            tally.is_log = found.is_log or isinstance(first, Message)
            if first is not None:
                items = itertools.chain([first], items)
            try:
                yield from _dialogues(items, options, tally)
            finally:  # --max_dialogues 够了就不再读，那时也要记下
                ends = file.newlines or ()
                tally.newlines = (ends,) if isinstance(ends, str) else ends
    except csv.Error as error:
        raise UserError(f"{source.name} 不是完整的 CSV（{error}）：请重新导出") from error
    except UserError as error:
        is_named = str(error).startswith(source.name)
        raise error if is_named else UserError(f"{source.name}：{error}") from error
    _check_layout(source, options, tally)


def _dialogues(items: Iterator, options: ReadOptions, tally: Tally) -> Iterator[Dialogue]:
    """消息变成对话，对话照原样；要清洗的清洗，数出段数。"""
    if tally.is_log:
        items = (Dialogue(*found) for found in build_dialogues(items, options, tally))
    elif options.reply_speaker is not None:
        raise UserError(
            f"是{format_of(tally.format).label}，不是聊天记录，看不出谁在说话："
            "请去掉 --reply_speaker，它只用于聊天记录"
        )
    if options.clean:
        cleaner = Cleaner(tally.cleaned)
        items = (piece for dialogue in items for piece in cleaner.clean(dialogue))
    for dialogue in items:
        longest = max(map(len, dialogue.utterances))
        if longest > MAX_UTTERANCE:
            raise UserError(
                f"第 {tally.num_dialogues + 1} 段对话里有一句长 {longest:,} 个字，"
                f"最多 {MAX_UTTERANCE:,}：像是整篇文章，请分成一句一句的，或删去它"
            )
        tally.num_dialogues += 1
        tally.num_utterances += len(dialogue.utterances)
        yield dialogue


def _check_layout(source: Source, options: ReadOptions, tally: Tally) -> None:
    """读完之后，看看是不是该分段的没有分，或分得太碎；--format 指定的不问是不是没有分段。

    Raises:
        UserError: 认作一行一句的文本，整个文件成了一段很长的对话。
    """
    if tally.is_log:
        return
    is_text = tally.format == "text"
    most = LONG_DIALOGUE if is_text else ONE_DIALOGUE
    is_one = tally.num_dialogues == 1 and tally.num_utterances > most
    if is_one and options.format == "auto":
        problem = f"{source.name} 没有分段，{tally.num_utterances:,} 句成了一段对话"
        if is_text and tally.num_utterances > ONE_DIALOGUE:
            raise UserError(
                f"{problem}：请在各段对话之间加一个空行；每行本来就是一段、"
                "各句以 TAB 分隔，就用 --format tsv；确实只有一段，就用 --format text"
            )
        remedy = "请在各段之间加一个空行" if is_text else "请看看文件里是怎样分段的"
        tally.unbroken = (
            f"{problem}：若不止一段，{remedy}；确实只有一段，就用 --format {tally.format}"
        )
    if tally.num_dialogues >= 20 and tally.num_dialogues == tally.num_utterances:
        has_blank_lines = tally.format in ("text", "script")
        remedy = "请去掉同一段对话各句之间的空行" if has_blank_lines else "请看看各句是怎样分成段的"
        tally.warnings.append(f"{source.name} 每段都只有一句话，学不到怎样回答：{remedy}")


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
