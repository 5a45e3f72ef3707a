"""训练集和验证集的 DataLoader：划分语料，排好窗口。

形状记号: D 对话总数
"""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from chitchat.cli import stop_signal_numbers
from chitchat.errors import UserError
from chitchat.tokens.token_table import TokenTable
from chitchat.training.batching import LengthBucketSampler
from chitchat.training.dataset import DialogueDataset
from chitchat.training.pieces import ReversedTable
from chitchat.training.processes import Processes

logger = logging.getLogger(__name__)


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
    train_tokens: int = 0,
    num_workers: int,
    seed: int,
    processes: Processes,
    pin_memory: bool = False,
    **options: object,
) -> tuple[DataLoader, DataLoader]:
    """划分语料，给出训练集和验证集的 DataLoader。

    Args:
        table: 全部对话。
        val_num: 留作验证的对话数，见 split_indices。
        train_window: 一次参数更新的对话数，所有进程合计。
        train_tokens: 一次参数更新大约多少 token，代替 train_window；0 表示不用它。
        val_window: 验证时一次前向的对话数，所有进程合计。
        num_workers: 读数据的子进程数，0 表示在主进程里读。
        seed: 划分和次序的种子。
        processes: 进程分工。
        pin_memory: 张量放进锁页内存，送往 GPU 更快。
        options: DialogueDataset 的其余参数。
    """
    train_indices, val_indices, is_reduced = split_indices(len(table), val_num, seed)
    if is_reduced:
        logger.info("corpus is small: val_num=%d instead of %d", len(val_indices), val_num)

    datasets = [DialogueDataset(table, i, **options) for i in (train_indices, val_indices)]
    _report_pieces(datasets)

    build = functools.partial(
        _build_loader,
        num_workers=num_workers,
        seed=seed,
        processes=processes,
        pin_memory=pin_memory,
    )
    return (
        build(datasets[0], shuffle=True, window_size=train_window, window_tokens=train_tokens),
        build(datasets[1], shuffle=False, window_size=val_window),
    )


def _build_loader(
    dataset: DialogueDataset,
    *,
    num_workers: int,
    seed: int,
    processes: Processes,
    pin_memory: bool,
    **window: int,
) -> DataLoader:
    """一个数据集的 DataLoader；window 是 LengthBucketSampler 的其余参数。"""
    sampler = LengthBucketSampler(
        dataset.lengths,
        num_targets=dataset.num_targets,
        seed=seed,
        rank=processes.rank,
        world_size=processes.world_size,
        **window,
    )
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # 不动用全局随机数，续训才能逐位相同
    )
