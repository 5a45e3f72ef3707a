"""训练数据：划分，取出对话，补齐成批次。

形状记号: B 批内对话数   T 批内最长对话的 token 数   D 对话总数
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from chitchat.cli import stop_signal_numbers
from chitchat.errors import UserError
from chitchat.tokens.token_table import TokenTable
from chitchat.training.batching import LengthBucketSampler, Window
from chitchat.training.pieces import (
    Pieces,
    ReversedTable,
    count_reply_tokens,
    cut_pieces,
    is_in_reply,
)
from chitchat.training.processes import Processes

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # 与 torch 交叉熵的默认 ignore_index 一致


def split_indices(
    num_dialogues: int, val_num: int, seed: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """随机划分训练集和验证集。

    对话不足 10 × val_num 时改留十分之一（至少一段）；只有一段对话时两边都用它。

    Returns:
        训练集下标、验证集下标（都是一维 int64），以及验证集是否被缩小。
    """
    from sklearn.model_selection import train_test_split

    indices = np.arange(num_dialogues)
    if num_dialogues == 1:
        return indices, indices, True
    is_reduced = num_dialogues < 10 * val_num
    test_size = max(1, num_dialogues // 10) if is_reduced else val_num
    train, validation = train_test_split(indices, test_size=test_size, random_state=seed)
    return train, validation, is_reduced


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


def _ignore_stop_signals(worker_id: int) -> None:
    """停下的信号由主进程处理：它先存好状态，再让读数据的子进程结束。"""
    for signum in stop_signal_numbers():
        signal.signal(signum, signal.SIG_IGN)


def _report_pieces(datasets: Sequence[DialogueDataset]) -> None:
    """有放不下的对话时，说切成了多少块，丢了多少。

    Raises:
        UserError: 训练集里没有要预测的 token。
    """
    if not len(datasets[0]):
        raise UserError(
            "语料里没有回复：每段对话都只有一句，--loss_on replies 无从学起；请改用 --loss_on all"
        )
    num_dialogues = sum(len(np.unique(dataset.pieces.dialogues)) for dataset in datasets)
    num_pieces = sum(map(len, datasets))
    if num_pieces > num_dialogues:
        logger.info(
            "long dialogues were cut: dialogues=%d pieces=%d utterances_cut=%d tokens_lost=%d",
            *(num_dialogues, num_pieces),
            sum(dataset.pieces.num_cut for dataset in datasets),
            sum(dataset.pieces.num_lost for dataset in datasets),
        )


def build_loaders(
    table: TokenTable | ReversedTable,
    *,
    val_num: int,
    train_window: int,
    val_window: int,
    num_workers: int,
    seed: int,
    processes: Processes,
    **options: object,
) -> tuple[DataLoader, DataLoader]:
    """划分语料，给出训练集和验证集的 DataLoader。

    Args:
        table: 全部对话。
        val_num: 留作验证的对话数，见 split_indices。
        train_window: 一次参数更新的对话数，所有进程合计。
        val_window: 验证时一次前向的对话数，所有进程合计。
        num_workers: 读数据的子进程数，0 表示在主进程里读。
        seed: 划分和次序的种子。
        processes: 进程分工。
        options: DialogueDataset 的其余参数。
    """
    train_indices, val_indices, is_reduced = split_indices(len(table), val_num, seed)
    if is_reduced:
        logger.info("corpus is small: val_num=%d instead of %d", len(val_indices), val_num)

    datasets = [DialogueDataset(table, i, **options) for i in (train_indices, val_indices)]
    _report_pieces(datasets)

    def build(dataset: DialogueDataset, window_size: int, *, shuffle: bool) -> DataLoader:
        sampler = LengthBucketSampler(
            dataset.lengths,
            num_targets=dataset.num_targets,
            window_size=window_size,
            seed=seed,
            shuffle=shuffle,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=_ignore_stop_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # 不动用全局随机数，续训才能逐位相同
        )

    return (
        build(datasets[0], train_window, shuffle=True),
        build(datasets[1], val_window, shuffle=False),
    )
