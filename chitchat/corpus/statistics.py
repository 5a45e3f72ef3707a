"""语料的统计：每次预处理都数的。"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chitchat.corpus.formats.base import Dialogue
from chitchat.tokens.batch_encoder import EncodedBatch


@dataclass
class Statistics:
    """一边编码一边记的数目；内存只随不同的长度、句数增长。

    Attributes:
        unk_id: [UNK] 的 id。
        lengths: token 数 → 对话数。
        turns: 句数 → 对话数。
        num_unk: [UNK] 的个数。
    """

    unk_id: int
    lengths: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    num_unk: int = 0

    def add(self, dialogues: Sequence[Dialogue], encoded: EncodedBatch) -> None:
        """记下一批。"""
        self.lengths.update(encoded.lengths.tolist())
        self.turns.update(len(dialogue.utterances) for dialogue in dialogues)
        self.num_unk += int((encoded.tokens == self.unk_id).sum())

    @property
    def num_dialogues(self) -> int:
        """对话总数。"""
        return self.lengths.total()

    @property
    def num_utterances(self) -> int:
        """句子总数。"""
        return sum(turns * count for turns, count in self.turns.items())

    @property
    def num_tokens(self) -> int:
        """token 总数。"""
        return sum(length * count for length, count in self.lengths.items())

    def num_longer_than(self, max_len: int) -> int:
        """超过 max_len 个 token 的对话数。"""
        return sum(count for length, count in self.lengths.items() if length > max_len)

    def log_lines(self, max_len: int) -> list[str]:
        """语料的概况，每项一行，写进日志。"""
        ordered = sorted(self.lengths)
        ranks = list(itertools.accumulate(self.lengths[length] for length in ordered))
        middle = [
            next(length for length, rank in zip(ordered, ranks, strict=True) if rank > position)
            for position in ((self.num_dialogues - 1) // 2, self.num_dialogues // 2)
        ]
        mean = self.num_tokens / self.num_dialogues
        share = 100 * self.num_unk / self.num_tokens
        return [
            f"dialogues={self.num_dialogues}",
            f"utterances={self.num_utterances}",
            f"tokens={self.num_tokens}",
            f"length_mean={mean:.1f} length_median={statistics.mean(middle):g}"
            f" length_max={ordered[-1]}",
            f"unk_tokens={self.num_unk} unk_share={share:.4f}%",
            f"dialogues_longer_than_{max_len}={self.num_longer_than(max_len)}",
        ]
