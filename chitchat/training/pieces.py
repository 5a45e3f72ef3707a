"""长对话切成几块：在句子的边界上切，每个 token 恰好预测一次；反向模型用的倒序也在这里。

形状记号: D 对话总数   P 块数   T 一段对话的 token 数
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chitchat.tokens.token_table import TokenTable

DIALOGUES_AT_ONCE = 2**16  # 数回复的 token 时一次看这么多段


@dataclass(frozen=True)
class ReversedTable:
    """各段对话的各句倒过来，取用时才倒，不另存一份；其余与 TokenTable 相同。"""

    table: TokenTable
    sep_id: int

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> np.ndarray:
        row = self.table[index]
        ends = np.flatnonzero(row == self.sep_id) + 1
        return np.concatenate([row[:1], *np.split(row[1:], ends - 1)[::-1]])

    @property
    def lengths(self) -> np.ndarray:
        """每段对话的 token 数，形状 (D,)，int64。"""
        return self.table.lengths


class Pieces(NamedTuple):
    """一些对话切成的块：[CLS] 之后是 ``context`` 到 ``stop``，其中 ``start`` 之前的只作上文。

    Attributes:
        dialogues: 各块属于哪一段对话，形状 (P,)，int64；同一段的各块相邻，次序不变。
        spans: 各块在对话里的 ``context``、``start``、``stop``，形状 (P, 3)，int32。
        num_cut: 自己就放不下、被截去一截的句子数。
        num_lost: 因此没有用上的 token 数。
    """

    dialogues: np.ndarray
    spans: np.ndarray
    num_cut: int
    num_lost: int

    @property
    def lengths(self) -> np.ndarray:
        """每块的 token 数，连同 [CLS] 和上文，形状 (P,)。"""
        return 1 + self.spans[:, 2] - self.spans[:, 0]

    @property
    def num_targets(self) -> np.ndarray:
        """每块要预测的 token 数，形状 (P,)。"""
        return (self.spans[:, 2] - self.spans[:, 1]).clip(min=0)


def cut_pieces(
    table: TokenTable | ReversedTable, indices: np.ndarray, *, max_len: int, sep_id: int
) -> Pieces:
    """把每段对话切成不超过 max_len 的块；只读放不下的那些对话。

    Args:
        table: 全部对话，每段是 ``[CLS] u1 [SEP] … uN [SEP]``。
        indices: 要切的对话，一维。
        max_len: 一块最多的 token 数，至少 2。
        sep_id: [SEP] 的 id。
    """
    lengths = table.lengths[indices]
    is_long = lengths > max_len
    cuts = [cut_dialogue(table[i], max_len, sep_id) for i in indices[is_long]]
    counts = np.ones(len(indices), np.int64)
    counts[is_long] = [len(spans) for spans, _, _ in cuts]
    spans = np.ones((counts.sum(), 3), np.int32)
    spans[:, 2] = np.repeat(lengths, counts)
    if cuts:
        spans[np.repeat(is_long, counts)] = np.concatenate([spans for spans, _, _ in cuts])
    num_cut, num_lost = (sum(cut[i] for cut in cuts) for i in (1, 2))
    return Pieces(np.repeat(indices, counts), spans, num_cut, num_lost)


def cut_dialogue(
    row: np.ndarray, max_len: int, sep_id: int
) -> tuple[list[tuple[int, int, int]], int, int]:
    """把一段对话切成块，每块尽量多装整句，放得下时带上前一句作上文。

    Args:
        row: 形状 (T,)，[CLS] 开头。
        max_len: 一块最多的 token 数，连同 [CLS] 和上文。
        sep_id: [SEP] 的 id。

    Returns:
        各块的 ``(context, start, stop)``，被截去一截的句子数，没有用上的 token 数。
    """
    ends = (np.flatnonzero(row == sep_id) + 1).tolist()
    if not ends or ends[-1] < len(row):
        ends.append(len(row))
    borders = [1, *ends]  # 第 i 句是 row[borders[i]:borders[i+1]]
    room = max_len - 1
    spans, num_cut, num_lost, first = [], 0, 0, 0
    while first < len(ends):
        start = context = borders[first]
        if first and ends[first] - borders[first - 1] <= room:
            context = borders[first - 1]
        after = bisect_right(ends, context + room)  # 装得下的句子到它为止
        if after > first:
            spans.append((context, start, ends[after - 1]))
            first = after
            continue
        spans.append((start, start, start + room))
        num_cut += 1
        num_lost += ends[first] - start - room
        first += 1
    return spans, num_cut, num_lost


def is_in_reply(row: np.ndarray, sep_id: int) -> np.ndarray:
    """每个 token 是否在第 2、4、… 句里（句末的 [SEP] 算这一句的），形状 (T,)。"""
    is_end = row == sep_id
    return (np.cumsum(is_end) - is_end) % 2 == 1


def count_reply_tokens(table: TokenTable, pieces: Pieces, sep_id: int) -> np.ndarray:
    """每块里属于回复、要预测的 token 数，形状 (P,)；语料从头到尾看一遍，不复制。"""
    counts = np.zeros(len(pieces.dialogues), np.int64)
    order = np.argsort(pieces.dialogues, kind="stable")
    ordered = pieces.dialogues[order]
    for first in range(0, len(table), DIALOGUES_AT_ONCE):
        begin, end = np.searchsorted(ordered, [first, first + DIALOGUES_AT_ONCE])
        group = order[begin:end]
        if not len(group):
            continue
        offsets = table.offsets[first : first + DIALOGUES_AT_ONCE + 1]
        is_end = table.tokens[offsets[0] : offsets[-1]] == sep_id
        number = np.cumsum(is_end) - is_end  # 此前有几个 [SEP]
        number -= np.repeat(number[offsets[:-1] - offsets[0]], np.diff(offsets))
        total = np.concatenate([[0], np.cumsum(number % 2)])  # 第 2、4、… 句的 number 是奇数
        before = offsets[pieces.dialogues[group] - first] - offsets[0]
        starts, stops = pieces.spans[group, 1], pieces.spans[group, 2]
        counts[group] = total[before + stops] - total[before + starts]
    return counts
