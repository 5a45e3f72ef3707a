"""训练数据：取出对话（长的切成几块），补齐成批次。

形状记号: B 批内对话数   T 批内最长对话的 token 数   D 对话总数
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from chitchat.tokens.token_table import TokenTable
from chitchat.training.batching import Window
from chitchat.training.pieces import (
    Pieces,
    ReversedTable,
    count_reply_tokens,
    cut_pieces,
    is_in_reply,
)

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # 与 torch 交叉熵的默认 ignore_index 一致


def reverse_dialogues(table: TokenTable, sep_id: int) -> ReversedTable:
    """把每段对话的各句倒过来，句内次序不变：``[CLS] uN [SEP] … u1 [SEP]``；不复制、不修改入参。

    反向模型由此学会“先有回复、再猜上文”，对话时用来挑选候选回复。

    Args:
        table: 全部对话，每段是 ``[CLS] u1 [SEP] … uN [SEP]``，与 preprocess.py 写的一样。
        sep_id: [SEP] 的 id。

    来源: Li et al. 2016, arXiv:1510.03055 §4.2 的 MMI-bidi；DialoGPT, arXiv:1911.00536 §3.2。
    """
    return ReversedTable(table, sep_id)


class Batch(NamedTuple):
    """一个窗口的张量。"""

    input_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)，补齐处为 IGNORE_INDEX
    lengths: list[int]  # 每段对话的 token 数，不含补齐，共 B 个
    num_targets: int  # 见 Window


class DialogueDataset(Dataset[Batch]):
    """按 Window 取出一批对话（长的切成几块）并补齐；与 ``DataLoader(batch_size=None)`` 搭配。

    Attributes:
        pieces: 各块在语料的哪里；下标就是 Window 里的下标，共 P 块。
        num_targets: 每块要预测的 token 数，形状 (P,)。
    """

    def __init__(
        self,
        table: TokenTable | ReversedTable,
        indices: np.ndarray,
        *,
        max_len: int,
        pad_id: int,
        sep_id: int,
        is_only_replies: bool = False,
        width_multiple: int = 1,
    ) -> None:
        """建立数据集。

        Args:
            table: 全部对话。
            indices: 属于本数据集的对话下标，形状 (D,)。
            max_len: 一块最多的 token 数，见 cut_pieces。
            pad_id: [PAD] 的 id。
            sep_id: [SEP] 的 id。
            is_only_replies: 只预测第 2、4、… 句；没有这样的句子的块不要。
            width_multiple: 批次的宽度补齐到它的倍数。
        """
        self.table = table
        self.indices = indices
        self.pad_id = pad_id
        self.sep_id = sep_id
        self.is_only_replies = is_only_replies
        self.width_multiple = width_multiple
        self.pieces = cut_pieces(table, indices, max_len=max_len, sep_id=sep_id)
        self.num_targets = self.pieces.num_targets
        if is_only_replies:
            counts = count_reply_tokens(table, self.pieces, sep_id)
            dialogues, spans, *rest = self.pieces
            self.pieces = Pieces(dialogues[counts > 0], spans[counts > 0], *rest)
            self.num_targets = counts[counts > 0]
        self.lengths = self.pieces.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, window: Window) -> Batch:
        rows, labels = [], []
        for i in window.indices:
            token_ids, targets = self._read(i)
            rows.append(token_ids)
            labels.append(targets)
        return collate(
            rows,
            window.num_targets,
            labels=labels,
            pad_id=self.pad_id,
            width_multiple=self.width_multiple,
        )

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """一块的 token id 和 labels，形状都是 (T,)；不预测的是 IGNORE_INDEX。"""
        context, start, stop = self.pieces.spans[index].tolist()
        row = self.table[self.pieces.dialogues[index]][:stop].astype(np.int64)
        targets = row.copy()
        if self.is_only_replies:
            targets[~is_in_reply(row, self.sep_id)] = IGNORE_INDEX
        targets[context:start] = IGNORE_INDEX
        if context == 1:
            return row, targets
        skipped = slice(1, context)  # [CLS] 和上文之间的
        return np.delete(row, skipped), np.delete(targets, skipped)


def collate(
    rows: Sequence[np.ndarray],
    num_targets: int,
    *,
    pad_id: int,
    labels: Sequence[np.ndarray] | None = None,
    width_multiple: int = 1,
) -> Batch:
    """右侧补齐成矩形；没有对话时给出一行全是补齐的占位，多进程的梯度同步才不会少一方。

    Args:
        rows: 每段对话的 token id，长度可不同，可为空。
        num_targets: 原样放进结果。
        pad_id: input_ids 的补齐值。
        labels: 各段的 labels，长度与 rows 相同；None 表示就是 rows，每个 token 都预测。
        width_multiple: 宽度补齐到它的倍数。
    """
    lengths = [len(row) for row in rows] or [0]
    width = -(-max(2, *lengths) // width_multiple) * width_multiple
    input_ids = torch.full((len(lengths), width), pad_id, dtype=torch.long)
    padded_labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (row, targets) in enumerate(zip(rows, labels or rows, strict=True)):
        input_ids[i, : len(row)] = torch.from_numpy(row)
        padded_labels[i, : len(row)] = torch.from_numpy(targets)
    return Batch(input_ids, padded_labels, lengths, num_targets)
