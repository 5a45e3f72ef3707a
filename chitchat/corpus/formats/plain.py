"""一行一句的文本，和它的近亲。

- ``text``：一行一句，空行分隔对话；
- ``tsv``：一行一段，各句以 TAB、``__eou__`` 或 `` | `` 分隔；第一格若都是 0 或 1，就是检索式对话的
  标签（豆瓣、电商），只要 1 的；``编号+++$+++说话人+++$+++文字`` 一行一句；
- ``script``：``说话人：文字``，空行分隔对话，同一人接连的几行接成一句；
- ``conv``：``E`` 开始一段，``M 文字`` 是一句（小黄鸡、电视剧字幕）；
- ``yaml``：ChatterBot 的语料，``conversations`` 下是列表的列表。
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TextIO

from chitchat.corpus.formats.base import Dialogue, Format, Head, ReadOptions, one_line
from chitchat.corpus.messages import join_messages
from chitchat.errors import UserError

# 分词器会丢掉的字符：只有它们的一行与空行无异。
_BLANK = "".join(map(chr, (*range(0x200B, 0x2010), 0x2060, 0xFEFF, *range(0xFE00, 0xFE10))))
_ANY_BLANK = re.compile(f"[{_BLANK}]")
_MARKS = ("\t", "__eou__", " | ")
_RECORD = "+++$+++"
_SCRIPT = re.compile(r"(?P<speaker>[^\s:：][^:：\n]{0,11}?)\s?[:：]\s*(?P<text>.*)")
_ASKERS = ("问", "q", "question", "提问")
_ROLES = (
    *_ASKERS, "答", "user", "用户", "human", "ask", "a", "b", "bot", "assistant", "system", "gpt",
    "机器人", "系统", "助手",
)  # fmt: skip
_NOT_SPEAKERS = ("http", "https", "ps", "p.s.", "re", "fw", "注")
MAX_YAML_CHARS = 64 << 20
BLOCK_CHARS = 1 << 13


def strip_blank(line: str) -> str:
    """去掉首尾的空白，以及不产生 token 的字符。"""
    line = line.strip()
    if line and (line[0] in _BLANK or line[-1] in _BLANK):
        # 变体选择符、零宽连接符跟在 emoji 后面时是它的一部分，只有这些的才是空行。
        return "" if not line.strip(_BLANK + " \t") else line.strip("\ufeff\u200b").strip()
    return line


def read_text(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Dialogue]:
    """一行一句，空行分隔对话；只含空白的行算空行，连续的空行算一个。"""
    utterances: list[str] = []
    number = 0
    lines = itertools.chain.from_iterable(map(_stripped_lines, _blocks(file)))
    for number, line in enumerate(lines, 1):
        if line:
            utterances.append(line)
        elif utterances:
            yield Dialogue(utterances, range(number - len(utterances), number))
            utterances = []
    if utterances:
        yield Dialogue(utterances, range(number + 1 - len(utterances), number + 1))


def _blocks(file: TextIO) -> Iterator[str]:
    """一次几千字，总在行尾断开；一行一行地读要慢一倍。"""
    while block := file.read(BLOCK_CHARS):
        yield block if block[-1] == "\n" else block + file.readline()


def _stripped_lines(block: str) -> Iterator[str]:
    """一块里的各行，去掉首尾；绝大多数块里没有零宽字符，不必逐行去看。"""
    lines = block.removesuffix("\n").split("\n")
    return map(strip_blank if _ANY_BLANK.search(block) else str.strip, lines)


def _recognise_rows(head: Head) -> str:
    lines = head.lines[:200]
    if lines and sum(_RECORD in line for line in lines) > 0.8 * len(lines):
        return f"各行以 {_RECORD} 分隔"
    if head.suffix == ".tsv":
        return "后缀是 .tsv"
    mark = _mark_of(lines)
    return f"各行以 {mark.strip() or 'TAB'} 分隔成几句" if mark else ""


def _mark_of(lines: Sequence[str]) -> str:
    """八成以上的行里都有的分隔符；没有就是空串。"""
    for mark in _MARKS:
        if sum(mark in line for line in lines) >= max(1, 0.8 * len(lines)):
            return mark
    return ""


def mark_of_rows(head: Head) -> str:
    """一行一段的文件里，各句以什么分隔。"""
    return "\t" if head.suffix == ".tsv" else _mark_of(head.lines[:200]) or "\t"


def read_rows(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Dialogue]:
    """一行一段对话，各句以同一种记号分隔。"""
    if any(_RECORD in line for line in head.lines[:1]):
        yield from _read_records(file)
        return
    mark = mark_of_rows(head)
    is_labelled = mark == "\t" and has_labels(head.lines)
    for number, line in enumerate(file, 1):
        cells = [text for cell in line.split(mark) if (text := strip_blank(cell))]
        if is_labelled and cells:
            label, *cells = cells
            if label != "1":
                continue
        if cells:
            yield Dialogue(cells, [number] * len(cells))


def has_labels(lines: Sequence[str]) -> bool:
    """第一格都是 0 或 1，后面至少两格。"""
    rows = [line.split("\t") for line in lines[:-1] or lines]
    return bool(rows) and all(row[0] in ("0", "1") and len(row) > 2 for row in rows)


def _read_records(file: TextIO) -> Iterator[Dialogue]:
    """``编号+++$+++说话人+++$+++文字``：编号接着的是一段；没有编号时，一行的各格是一段。"""
    utterances: list[str] = []
    lines: list[int] = []
    last_id, last_speaker = None, None
    for number, line in enumerate(file, 1):
        cells = [cell.strip() for cell in line.split(_RECORD)]
        if len(cells) > 1 and not re.fullmatch(r"L?\d+", cells[0]):
            texts = [cell for cell in cells if cell]
            yield Dialogue(texts, [number] * len(texts))
            continue
        if len(cells) == 5:
            raise UserError(
                "像是 Cornell 的 movie_lines.txt：哪几句是一段写在 movie_conversations.txt 里，"
                "单有它分不出对话；请先按那个文件拼成一行一句、空行分隔的文本"
            )
        is_next = len(cells) > 2 and last_id in (None, int(cells[0].lstrip("L")) - 1)
        if utterances and not is_next:
            yield Dialogue(utterances, lines)
            utterances, lines, last_speaker = [], [], None
        if len(cells) < 3 or not cells[-1]:
            last_id = None
            continue
        last_id = int(cells[0].lstrip("L"))
        if cells[1] == last_speaker:
            utterances[-1] = join_messages([utterances[-1], cells[-1]])
        else:
            utterances.append(cells[-1])
            lines.append(number)
        last_speaker = cells[1]
    if utterances:
        yield Dialogue(utterances, lines)


def _recognise_script(head: Head) -> str:
    matches = [_SCRIPT.fullmatch(line) for line in head.lines[:400]]
    speakers = Counter(match["speaker"] for match in matches if match and match["text"])
    num_lines = len(matches)
    if not 2 <= len(speakers) <= 12 or any(name.lower() in _NOT_SPEAKERS for name in speakers):
        return ""
    are_roles = all(name.lower() in _ROLES for name in speakers)
    if speakers.total() < 0.9 * num_lines or (num_lines < 2 * len(speakers) and not are_roles):
        return ""
    if any(re.search(r"\d{1,2}$", name) and "：" not in head.text for name in speakers):
        return ""  # 冒号前是钟点
    return f"各行以说话人开头（{'、'.join(name for name, _ in speakers.most_common(3))}）"


def read_script(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Dialogue]:
    """``说话人：文字``；空行或又一个“问：”另起一段，system 的话略去。"""
    turns: list[list[str]] = []
    lines: list[int] = []
    last_speaker = None
    for number, line in enumerate(itertools.chain(file, [""]), 1):
        match = _SCRIPT.fullmatch(strip_blank(line))
        speaker = match["speaker"] if match else last_speaker
        text = match["text"] if match else strip_blank(line)
        starts = match and speaker.lower() in _ASKERS and speaker != last_speaker
        if turns and (not text or starts):
            yield Dialogue([join_messages(turn) for turn in turns], lines)
            turns, lines, last_speaker = [], [], None
        if not text or (speaker or "").lower() in ("system", "系统"):
            continue
        if speaker == last_speaker and turns:
            turns[-1].append(text)
        else:
            turns.append([text])
            lines.append(number)
        last_speaker = speaker


def _recognise_conv(head: Head) -> str:
    if head.suffix == ".conv":
        return "后缀是 .conv"
    lines = head.lines[:20]
    is_conv = lines[:1] == ["E"] and all(line[:2] in ("E", "M", "M ") for line in lines)
    return "各行以 E 或 M 开头" if is_conv else ""


def read_conv(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Dialogue]:
    """``E`` 开始一段对话，``M 文字`` 是一句；词之间可以有 ``/``，换成分词器会略去的空格。"""
    first_lines = list(itertools.islice(file, 1000))
    is_split = _is_split_into_words(first_lines)
    utterances: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(itertools.chain(first_lines, file), 1):
        mark, _, text = line.strip().partition(" ")
        if mark == "E":
            if utterances:
                yield Dialogue(utterances, lines)
            utterances, lines = [], []
        elif mark == "M":
            text = text.replace("/", " ").strip() if is_split else text.strip()
            if text:
                utterances.append(text)
                lines.append(number)
        elif mark:
            raise UserError(
                f"第 {number} 行不是 .conv 的写法：应以 E 或 M 开头，得到 {line.strip()[:20]!r}；"
                "请改正这一行，或用 --format 指定别的格式"
            )
    if utterances:
        yield Dialogue(utterances, lines)


def _is_split_into_words(lines: Sequence[str]) -> bool:
    """三个字以上的句子多数有斜杠，就是分过词的；偶尔出现的斜杠是文字。"""
    texts = [line.strip()[2:] for line in lines if line.startswith("M ")]
    texts = [text for text in texts if len(text) > 2]
    return 2 * sum("/" in text for text in texts) > len(texts)


def _recognise_yaml(head: Head) -> str:
    if head.suffix in (".yml", ".yaml"):
        return "后缀是 .yml"
    has_key = any(line == "conversations:" for line in head.lines[:40])
    return "有 conversations: 一行" if has_key else ""


def read_yaml(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Dialogue]:
    """ChatterBot 的 YAML：``conversations`` 下每一项是一段，各句是字符串。"""
    import yaml

    text = file.read(MAX_YAML_CHARS + 1)
    if len(text) > MAX_YAML_CHARS:
        raise UserError("YAML 要整个读进内存，这个文件太大：请拆成几个 64 MB 以内的文件")
    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"不是正确的 YAML（{reason}）：请改正") from error
    found = content.get("conversations") if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise UserError("YAML 里没有 conversations 列表：应像 ChatterBot 的语料那样写")
    for number, turns in enumerate(found, 1):
        if not isinstance(turns, list) or any(isinstance(turn, (list, dict)) for turn in turns):
            raise UserError(f"第 {number} 段不是字符串的列表：请改正")
        texts = [one_line(str(turn)) for turn in turns if turn is not None]
        if texts := [text for text in texts if text]:
            yield Dialogue(texts)


TEXT = Format("一行一句、空行分隔对话的文本", lambda head: "", read_text, is_plain=True)
ROWS = Format("一行一段、以 TAB 等分隔的文本", _recognise_rows, read_rows, is_plain=True)
SCRIPT = Format("“说话人：文字”的文本", _recognise_script, read_script, is_plain=True)
CONV = Format("E、M 开头的 .conv", _recognise_conv, read_conv, is_plain=True)
YAML = Format("ChatterBot 的 YAML", _recognise_yaml, read_yaml)
