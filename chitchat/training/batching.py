"""怎样把对话分组：长度相近的放进一个窗口（一次参数更新）。

形状记号: D 对话总数
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Window(NamedTuple):
    """一次参数更新所用的对话；多进程时只含本进程的一份。"""

    indices: list[int]
    num_targets: int  # 整个窗口（所有进程合计）要预测的 token 数，loss 以它为分母


class LengthBucketSampler(Sampler[Window]):
    """把长度相近的对话放进同一个窗口，几乎没有补齐；每轮每段对话恰好出现一次。

    每轮先随机打乱再按长度稳定排序，切成窗口后打乱窗口的次序。轮次由 ``epoch`` 决定，
    同一个 (seed, epoch) 总给出同样的次序，断点续训因此能从任意窗口接着走。
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        window_size: int,
        seed: int,
        num_targets: np.ndarray | None = None,
        window_tokens: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """建立采样器。

        Args:
            lengths: 每段对话（或切成的一块）的 token 数，形状 (D,)。
            window_size: 每个窗口的对话数，所有进程合计。
            seed: 随机种子，所有进程相同。
            num_targets: 每段要预测的 token 数，形状 (D,)；None 表示除第一个之外的全部。
            window_tokens: 一个窗口大约多少 token，所有进程合计；0 表示按 window_size 分。
            shuffle: False 时按长度固定排列，用于验证。
            rank: 本进程的编号。
            world_size: 进程数。
        """
        self.lengths = lengths
        # 按长度排好之后各窗口的边界；长度总是那些，所以每轮相同。
        if window_tokens:
            ordered = np.sort(lengths)
            number = (np.cumsum(ordered) - ordered) // window_tokens  # 开头落在第几个窗口
            starts = np.flatnonzero(np.diff(number, prepend=-1))
        else:
            starts = np.arange(0, len(lengths), window_size)
        self._borders = np.append(starts, len(lengths))
        self.seed = seed
        self.num_targets = (lengths - 1).clip(min=0) if num_targets is None else num_targets
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0  # 从本轮的第几个窗口开始，断点续训用

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __iter__(self) -> Iterator[Window]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = np.arange(len(self.lengths))
        if self.shuffle:
            generator.shuffle(order)
        order = order[np.argsort(self.lengths[order], kind="stable")]
        windows = np.arange(len(self))
        if self.shuffle:
            generator.shuffle(windows)
        for i in windows[self.start :]:
            window = order[self._borders[i] : self._borders[i + 1]]
            num_targets = int(self.num_targets[window].sum())
            yield Window(window[self.rank :: self.world_size].tolist(), num_targets)
