"""--check：逐段看可疑之处，给出建议。"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from chitchat.corpus.formats.base import Dialogue
from chitchat.corpus.statistics import Statistics
from chitchat.corpus.tally import Tally, collect_warnings, find_unbroken
from chitchat.errors import UserError
from chitchat.files import atomic_file
from chitchat.tokens.tokenizer import decode_response, special_ids

MAX_PLACES = 3  # 每种可疑之处举几个例子
LONG_UTTERANCE = 500  # 字符数
_FINE = "没有发现要处理的地方，可以去掉 --check 正式运行"
_LETTER = re.compile(r"[^\W_]")
SUSPICIONS = {
    # UTF-8 被当作 Latin-1 或 GBK 解读过、替换字符、私用区
    "乱码": re.compile(
        "\ufffd|锟斤拷|烫烫烫|[\ue000-\uf8ff]|[\u00c0-\u00ff][\u0080-\u00bf]|[\u00c0-\u00ff]{3}"
    ),
    "不算换行的换行符": re.compile("[\x0b\x0c\x85\u2028\u2029]"),
    "控制字符": re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]"),
    "网址": re.compile(r"https?://|www\.", re.IGNORECASE),
}


@dataclass
class CorpusCheck:
    """--check：在统计之外，逐段看可疑之处；内存只随不同的句子数增长（每句一个 64 位散列值）。"""

    tokenizer: Tokenizer
    max_len: int
    statistics: Statistics
    unknown: Counter[str] = field(default_factory=Counter)
    num_repeated_dialogues: int = 0
    num_repeated_utterances: int = 0
    suspicions: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    first: list[list[int]] = field(default_factory=list)
    seen_dialogues: set[int] = field(default_factory=set)
    seen_utterances: set[int] = field(default_factory=set)
    num_seen: int = 0

    def add(self, dialogue: Dialogue, token_ids: list[int], name: str) -> None:
        """记下一段对话。

        Args:
            dialogue: 文字。
            token_ids: 它的编码，含 [CLS] 与各 [SEP]。
            name: 所在文件的名字。
        """
        self.num_seen += 1
        if len(self.first) < 2:
            self.first.append(token_ids)
        keys = [hash(utterance) for utterance in dialogue.utterances]
        key = hash(tuple(keys))
        self.num_repeated_dialogues += key in self.seen_dialogues
        self.seen_dialogues.add(key)
        for key in keys:
            self.num_repeated_utterances += key in self.seen_utterances
            self.seen_utterances.add(key)
        if special_ids(self.tokenizer).unk in token_ids:
            for utterance in dialogue.utterances:
                self._count_unknown(utterance)
        for index, utterance in enumerate(dialogue.utterances):
            for suspicion in find_suspicions(utterance):
                self.suspicions[suspicion] += 1
                places = self.places.setdefault(suspicion, [])
                if len(places) < MAX_PLACES:
                    places.append(
                        f"{name} {_where(dialogue, index, self.num_seen)}：{utterance[:30]}"
                    )

    def _count_unknown(self, utterance: str) -> None:
        """记下这一句里词表没有的字；一个词只有个别字不认得时只记那几个字。"""
        encoding = self.tokenizer.encode(utterance, add_special_tokens=False)
        unk = special_ids(self.tokenizer).unk
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == unk:
                word = utterance[start:end]
                chars = [c for c in word if not self._is_known(c.lower())]
                self.unknown.update(chars or [word])

    def _is_known(self, char: str) -> bool:
        known = self.tokenizer.token_to_id
        return known(char) is not None or known(f"##{char}") is not None

    def report(self, tallies: Sequence[Tally]) -> list[str]:
        """给用户看的各行。"""
        found = self.statistics
        num_long = found.num_longer_than(self.max_len)
        lines = [
            f"对话 {found.num_dialogues:,} 段，共 {found.num_utterances:,} 句、"
            f"{found.num_tokens:,} 个 token",
            f"每段句数：{_quantiles(found.turns)}",
            f"每段 token 数：{_quantiles(found.lengths)}",
            f"超过 --max_len {self.max_len} 的：{_share(num_long, found.num_dialogues)}",
            f"[UNK]：{_share(found.num_unk, found.num_tokens)}"
            + "".join(f"  {char!r}×{count}" for char, count in self.unknown.most_common(10)),
            f"重复的对话：{_share(self.num_repeated_dialogues, found.num_dialogues)}",
            f"重复的句子：{_share(self.num_repeated_utterances, found.num_utterances)}",
        ]
        for suspicion, count in self.suspicions.most_common():
            lines.append(f"可疑（{suspicion}）：{_share(count, found.num_utterances)}")
            lines += [f"    {place!s}" for place in map(_printable, self.places[suspicion])]
        for number, token_ids in enumerate(self.first, 1):
            lines.append(f"第 {number} 段按这样训练：{self._as_trained(token_ids)}")
        found = [
            *collect_warnings(tallies),
            *self._advice(is_unbroken=bool(find_unbroken(tallies))),
        ]
        return lines + [f"建议：{advice}" for advice in found or [_FINE]]

    def _as_trained(self, token_ids: Sequence[int]) -> str:
        """截断之后、标出特殊 token 的样子。"""
        ids = special_ids(self.tokenizer)
        parts: list[str] = []
        text: list[int] = []
        for token_id in token_ids[: self.max_len]:
            if token_id in (ids.cls, ids.sep, ids.unk):
                parts += [
                    decode_response(self.tokenizer, text),
                    self.tokenizer.id_to_token(token_id),
                ]
                text = []
            else:
                text.append(token_id)
        return "".join([*parts, decode_response(self.tokenizer, text)])

    def _advice(self, *, is_unbroken: bool) -> list[str]:
        """可以用哪些选项；多半是忘了分段的，先不劝人把 --max_len 调大。"""
        found = self.statistics
        advice = []
        if num_single := found.turns[1]:
            advice.append(f"{num_single:,} 段对话只有一句话，可用 --min_turns 2 去掉")
        if self.num_repeated_dialogues:
            repeated = f"{self.num_repeated_dialogues:,}"
            advice.append(f"{repeated} 段对话与前面的完全相同，可用 --drop_duplicates 去掉")
        num_long = found.num_longer_than(self.max_len)
        if 20 * num_long > found.num_dialogues and not is_unbroken:
            advice.append(
                f"{num_long:,} 段对话比 --max_len {self.max_len} 长，"
                "训练时会切成几截，可把 train.py 的 --max_len 调大"
            )
        if 100 * found.num_unk > found.num_tokens:
            advice.append("[UNK] 超过百分之一，可用 --build_vocab 13317 由语料学一份词表")
        if self.suspicions["乱码"]:
            advice.append("有乱码，请看看上面几行；若整篇如此，用 --encoding 指定真正的编码")
        if others := [name for name in self.suspicions if name != "乱码"]:
            advice.append(f"有可疑的句子（{'、'.join(others)}），请看看上面几行，可用 --clean 清洗")
        return advice


def find_suspicions(utterance: str) -> list[str]:
    """一句话可疑在哪里；没有就是空列表。"""
    found = [name for name, pattern in SUSPICIONS.items() if pattern.search(utterance)]
    if len(utterance) > LONG_UTTERANCE:
        found.append("太长")
    if not _LETTER.search(utterance):
        found.append("没有文字")
    return found


def _where(dialogue: Dialogue, index: int, number: int) -> str:
    if dialogue.lines and dialogue.lines[index]:
        return f"第 {dialogue.lines[index]} 行"
    return f"第 {number} 段"


def _printable(text: str) -> str:
    """控制字符写成转义，免得弄乱终端。"""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _share(count: int, total: int) -> str:
    return f"{count:,}（{100 * count / max(total, 1):.2f}%）"


def quantile(counts: Counter[int], share: float) -> int:
    """从小到大排在 share 处的值；counts 是值到个数，不空。"""
    rank = share * (counts.total() - 1)
    for value in sorted(counts):
        rank -= counts[value]
        if rank < 0:
            return value
    return max(counts)


def _quantiles(counts: Counter[int]) -> str:
    mean = sum(value * count for value, count in counts.items()) / counts.total()
    parts = [f"平均 {mean:.1f}", f"最少 {min(counts)}"]
    parts += [f"{share:.0%} 不超过 {quantile(counts, share)}" for share in (0.5, 0.9, 0.99)]
    return "，".join([*parts, f"最多 {max(counts)}"])


def save_length_histogram(path: Path, lengths: Counter[int], max_len: int) -> None:
    """把每段对话的 token 数画成直方图（PNG）。

    Raises:
        UserError: 没有安装 matplotlib。
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("画图需要 matplotlib：请 pip install matplotlib，或去掉 --plot") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    values = list(lengths)
    axes.hist(values, bins=60, weights=[lengths[value] for value in values])
    axes.axvline(max_len, color="tab:red", label=f"--max_len {max_len}")
    axes.set(xlabel="tokens per dialogue", ylabel="dialogues", yscale="log")
    axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
