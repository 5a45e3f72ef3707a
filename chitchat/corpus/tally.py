"""读语料时记下的数：读了什么、留下什么、为什么没有留下。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from chitchat.corpus.sources import Source, encoding_label

MAX_PEOPLE = 8  # 说有谁时最多列几个
_NEWLINES = {"\n": "LF", "\r\n": "CRLF", "\r": "CR"}


@dataclass
class Tally:
    """一个来源的数目。

    Attributes:
        format: 格式的名字。
        why: 凭什么认出来的。
        is_log: 是不是聊天记录；其余的数多半只有聊天记录才有。
        newlines: 文件里有哪几种换行。
        num_messages: 消息条数，留下的和没有留下的都算。
        left_out: 没有留下的消息，缘由 → 条数。
        speakers: 留下的消息，（账号，是不是自己）→ 条数。
        names: 同样的键 → 最后用的昵称。
        num_chats: 聊天的个数。
        first, last: 最早、最晚的时刻，自 1970 年起的秒数；None 表示都没有时刻。
        num_untimed: 没有时刻的消息数。
        private: 被换掉的私人信息，种类 → 处数。
        num_alone: 只有一个人说话、因此不要的段数。
        num_wanted: 留下的消息里，--reply_speaker 所指的人的条数。
        num_unanswered: 因 --reply_speaker 去掉的句数。
        cleaned: --clean 改动或去掉的，规则 → 处数；一句里可以有几处。
        num_dialogues, num_utterances: 给出的对话数、句数。
        warnings: 可疑的地方，给用户看的句子。
        unbroken: 整个文件成了很长的一段时，提醒的话；总共不止一段就不必说。
        skipped: 文件夹里与对话无关、没有读的文件，为什么；空串表示读了。
    """

    format: str = ""
    why: str = ""
    is_log: bool = False
    newlines: tuple[str, ...] = ()
    num_messages: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    speakers: Counter[tuple[str, bool]] = field(default_factory=Counter)
    names: dict[tuple[str, bool], str] = field(default_factory=dict)
    num_chats: int = 0
    first: float | None = None
    last: float | None = None
    num_untimed: int = 0
    private: Counter[str] = field(default_factory=Counter)
    num_alone: int = 0
    num_wanted: int = 0
    num_unanswered: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    num_dialogues: int = 0
    num_utterances: int = 0
    warnings: list[str] = field(default_factory=list)
    unbroken: str = ""
    skipped: str = ""

    def lines(self) -> list[str]:
        """给用户看的各行。"""
        if not self.is_log:
            return _counted("--clean 改动或去掉", self.cleaned, "处")
        kept = self.num_messages - self.left_out.total()
        span = "，都没有时间"
        if self.first is not None:
            span = f"，{_day(self.first)} 至 {_day(self.last)}"
            span += f"（{self.num_untimed:,} 条没有时间）" if self.num_untimed else ""
        lines = [
            f"聊天 {self.num_chats:,} 个，{len(self.speakers):,} 人，"
            f"消息 {self.num_messages:,} 条，留下 {kept:,} 条{span}"
        ]
        lines += _counted("没有留下", self.left_out, "条")
        lines += _counted("隐去", self.private, "处")
        lines += _counted("--clean 改动或去掉", self.cleaned, "处")
        lines.append(
            f"对话 {self.num_dialogues:,} 段；只有一个人说话、不要的 {self.num_alone:,} 段"
            + (f"；不合 --reply_speaker 的 {self.num_unanswered:,} 句" * bool(self.num_unanswered))
        )
        return lines

    def name_of(self, speaker: tuple[str, bool]) -> str:
        """说话人给人看的名字：最后用的昵称。"""
        return self.names[speaker] or "（没有名字）"

    def explain_nothing(self) -> str:
        """一段对话也没有时，丢在了哪一步、该怎么办；不是聊天记录时是空串。"""
        kept = self.num_messages - self.left_out.total()
        if not self.is_log:
            return ""
        if not self.num_messages:
            return "没有一条消息：文件里只有开头，或不是这种格式，可用 --format 指定"
        if not kept:
            reasons = "、".join(
                f"{name} {count:,} 条" for name, count in self.left_out.most_common()
            )
            return f"{self.num_messages:,} 条消息都不是话（{reasons}）：请导出含文字消息的聊天"
        if not any(account or is_me for account, is_me in self.speakers):
            return (
                f"{kept:,} 条消息，都没有说话人，分不出是谁在对谁说："
                "请重新导出，选上昵称或发送人一列；若另有一列是说话人，用 --speaker_column 指定"
            )
        if len(self.speakers) == 1:
            return (
                f"{kept:,} 条消息都是 {self.name_of(next(iter(self.speakers)))} 一个人说的："
                "请导出双方都说了话的聊天；若另有一列是说话人，用 --speaker_column 指定"
            )
        return (
            f"{kept:,} 条消息、{len(self.speakers)} 个人，但每一段都只有一个人说话："
            "相隔太久的算作两段，可把 --gap_minutes 调大"
        )


def describe_source(source: Source, tally: Tally) -> list[str]:
    """一个来源当作了什么、凭什么、什么编码；聊天记录另有几行数目。"""
    if tally.skipped:
        return [f"{source.name}：没有读（{tally.skipped}）"]
    ends = "、".join(_NEWLINES[end] for end in tally.newlines) or "没有"
    mixed = "（混用，不影响读取）" if len(tally.newlines) > 1 else ""
    first = f"{source.name}：当作 {tally.format}（{tally.why}），"
    first += f"{encoding_label(source.encoding)} 编码，{ends} 换行{mixed}，"
    first += f"{tally.num_dialogues:,} 段对话"
    return [first, *(f"    {line}" for line in tally.lines())]


def find_unbroken(tallies: Sequence[Tally]) -> str:
    """总共只有很长的一段对话，多半是忘了分段时，提醒的话；否则是空串。"""
    is_one = sum(tally.num_dialogues for tally in tallies) == 1
    return "".join(tally.unbroken for tally in tallies) if is_one else ""


def collect_warnings(tallies: Sequence[Tally]) -> list[str]:
    """各个来源可疑的地方，给用户看的句子。"""
    found = [warning for tally in tallies for warning in tally.warnings]
    return [*found, *filter(None, [find_unbroken(tallies)])]


def speaker_lines(tally: Tally) -> list[str]:
    """谁说了多少条，多的在前。"""
    if not tally.is_log:
        return ["    不是聊天记录，没有说话人"]
    lines = []
    for (account, is_me), count in tally.speakers.most_common():
        name = tally.name_of((account, is_me))
        shown = name if name == account or not account else f"{name}（{account}）"
        lines.append(f"    {shown}{'，导出的人，可写作 me' * is_me}：{count:,} 条")
    return lines


def describe_filters(filters: Mapping[str, object]) -> str:
    """用了哪些筛选，照命令行的写法。"""
    named = {name: value for name, value in filters.items() if value}
    if named["min_turns"] == 1:  # 每段至少一句，等于没有筛
        del named["min_turns"]
    return "、".join(
        f"--{name}" + f" {value}" * (value is not True) for name, value in named.items()
    )


def explain_nothing(
    sources: Sequence[Source], tallies: Sequence[Tally], filters: Mapping[str, object]
) -> str:
    """一段对话也没有时给用户的一句话：丢在了哪一步，该怎么办。"""
    names = "、".join(source.name for source in sources[:3]) + "……" * (len(sources) > 3)
    if any(tally.num_dialogues for tally in tallies):
        found = sum(tally.num_dialogues for tally in tallies)
        used = describe_filters({name: filters[name] for name in ("min_turns", "max_turns")})
        return f"{names} 里没有对话合乎要求：读到的 {found:,} 段都被 {used} 筛掉了，请放宽"
    if any(tally.cleaned for tally in tallies):  # 有对话交给了 --clean，却一段也没有留下
        return f"{names} 里没有对话：都被 --clean 去掉了，请去掉 --clean，或换一份语料"
    if any(tally.num_unanswered and len(tally.speakers) > 1 for tally in tallies):
        return f"{names} 里没有对话：{_explain_speakers(tallies)}"
    reasons = [reason for tally in tallies if (reason := tally.explain_nothing())]
    if reasons:
        return f"{names} 里没有对话：{reasons[0]}"
    return f"{names} 里没有对话：文件是空的或只有空白；请写入一行一句、空行分隔的对话"


def _explain_speakers(tallies: Sequence[Tally]) -> str:
    """--reply_speaker 所指的人没有答过别人：不认得他，就说出各个来源里一共有谁。"""
    if num_wanted := sum(tally.num_wanted for tally in tallies):
        return (
            f"--reply_speaker 所指的人说了 {num_wanted:,} 条，但没有答过别人："
            "有他的每一段都由他开头、别人接着说，或只有他一个人；"
            "若是相隔太久，可把 --gap_minutes 调大，若想学别人，用 --list_speakers 看有谁"
        )
    people: Counter[str] = Counter()
    for tally in tallies:
        for speaker, count in tally.speakers.items():
            people["me（导出的人）" if speaker[1] else tally.name_of(speaker)] += count
    shown = "、".join(f"{name} {count:,} 条" for name, count in people.most_common(MAX_PEOPLE))
    return (
        f"{people.total():,} 条消息里没有 --reply_speaker 所指的人，"
        f"说话的有 {shown}{'等' * (len(people) > MAX_PEOPLE)}："
        "请改成其中一个，全部的人和账号用 --list_speakers 看"
    )


def _counted(title: str, counts: Counter[str], unit: str) -> list[str]:
    if not counts:
        return []
    parts = [f"{name} {count:,}" for name, count in counts.most_common()]
    return [f"{title} {counts.total():,} {unit}：{'、'.join(parts)}"]


def _day(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):
        return "?"
