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
from chitchat.tokens.token_table import TokenTable
from chitchat.training.batching import LengthBucketSampler, Window
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


def reverse_dialogues(table: TokenTable, sep_id: int) -> TokenTable:
    """把每段对话的各句倒过来，句内次序不变：``[CLS] uN [SEP] … u1 [SEP]``；不修改入参。

    反向模型由此学会“先有回复、再猜上文”，对话时用来挑选候选回复。

    Args:
        table: 全部对话，每段是 ``[CLS] u1 [SEP] … uN [SEP]``，与 preprocess.py 写的一样。
        sep_id: [SEP] 的 id。

    来源: Li et al. 2016, arXiv:1510.03055 §4.2 的 MMI-bidi；DialoGPT, arXiv:1911.00536 §3.2。
    """
    dialogues = []
    for row in table:
        ends = np.flatnonzero(row == sep_id) + 1
        utterances = np.split(row[1:], ends - 1)
        dialogues.append(np.concatenate([row[:1], *utterances[::-1]]))
    return TokenTable.from_dialogues(dialogues)


class Batch(NamedTuple):
    """一个窗口的张量。"""

    input_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)，补齐处为 IGNORE_INDEX
    lengths: list[int]  # 每段对话的 token 数，不含补齐，共 B 个
    num_targets: int  # 见 Window


class DialogueDataset(Dataset[Batch]):
    """按 Window 取出一批对话并补齐；与 ``DataLoader(batch_size=None)`` 搭配。"""

    def __init__(
        self,
        table: TokenTable,
        indices: np.ndarray,
        *,
        max_len: int,
        pad_id: int,
        width_multiple: int = 1,
    ) -> None:
        """建立数据集。

        Args:
            table: 全部对话。
            indices: 属于本数据集的对话下标，形状 (D,)。
            max_len: 每段对话最多保留的 token 数，多余的截去。
            pad_id: [PAD] 的 id。
            width_multiple: 批次的宽度补齐到它的倍数。
        """
        self.table = table
        self.indices = indices
        self.max_len = max_len
        self.pad_id = pad_id
        self.width_multiple = width_multiple
        self.lengths = np.minimum(table.lengths[indices], max_len)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, window: Window) -> Batch:
        rows = [
            self.table[self.indices[i]][: self.max_len].astype(np.int64) for i in window.indices
        ]
        return collate(
            rows,
            window.num_targets,
            pad_id=self.pad_id,
            width_multiple=self.width_multiple,
        )


def collate(
    rows: Sequence[np.ndarray],
    num_targets: int,
    *,
    pad_id: int,
    width_multiple: int = 1,
) -> Batch:
    """右侧补齐成矩形；没有对话时给出一行全是补齐的占位，多进程的梯度同步才不会少一方。

    Args:
        rows: 每段对话的 token id，长度可不同，可为空。
        num_targets: 原样放进结果。
        pad_id: input_ids 的补齐值。
        width_multiple: 宽度补齐到它的倍数。
    """
    lengths = [len(row) for row in rows] or [0]
    width = -(-max(2, *lengths) // width_multiple) * width_multiple
    input_ids = torch.full((len(lengths), width), pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        tokens = torch.from_numpy(row)
        input_ids[i, : len(row)] = tokens
        labels[i, : len(row)] = tokens
    return Batch(input_ids, labels, lengths, num_targets)


def _ignore_stop_signals(worker_id: int) -> None:
    """停下的信号由主进程处理：它先存好状态，再让读数据的子进程结束。"""
    for signum in stop_signal_numbers():
        signal.signal(signum, signal.SIG_IGN)


def build_loaders(
    table: TokenTable,
    *,
    val_num: int,
    train_window: int,
    val_window: int,
    num_workers: int,
    seed: int,
    processes: Processes,
    **options: int,
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

    def build(indices: np.ndarray, window_size: int, *, shuffle: bool) -> DataLoader:
        dataset = DialogueDataset(table, indices, **options)
        sampler = LengthBucketSampler(
            dataset.lengths,
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
        build(train_indices, train_window, shuffle=True),
        build(val_indices, val_window, shuffle=False),
    )
