"""训练的衡量：按 token 平均、速度、验证。"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chitchat.training.dataset import Batch
from chitchat.training.processes import Processes
from chitchat.training.updater import Updater


@dataclass
class TokenAverage:
    """按 token 累计的 loss 与准确率：和与个数分别相加，最后只除一次。"""

    loss_sum: float = 0.0  # nat
    num_tokens: int = 0
    num_correct: int = 0

    def add(self, sums: Tensor) -> None:
        """加上 LossModule 给出的三个数，形状 (3,)。"""
        loss_sum, num_tokens, num_correct = sums.tolist()
        self.loss_sum += loss_sum
        self.num_tokens += int(num_tokens)
        self.num_correct += int(num_correct)

    def merge(self, other: TokenAverage) -> None:
        """加上另一份累计；不修改 other。"""
        self.loss_sum += other.loss_sum
        self.num_tokens += other.num_tokens
        self.num_correct += other.num_correct

    @property
    def loss(self) -> float:
        """平均 loss，nat 每 token；一个 token 也没有时是 NaN。"""
        return self.loss_sum / self.num_tokens if self.num_tokens else math.nan

    @property
    def accuracy(self) -> float:
        """猜对下一个 token 的比例，0 到 1。"""
        return self.num_correct / self.num_tokens if self.num_tokens else math.nan

    @property
    def ppl(self) -> float:
        """困惑度 exp(loss)；太大时是 inf。"""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Reading(NamedTuple):
    """上次读取以来。"""

    average: TokenAverage
    speed: float  # 每秒训练的 token 数，不含补齐
    padding: float  # 补齐占前向的比例，0 到 1


class Meter:
    """把各步的和取回来，记进一轮的累计，并给出速度。

    各步的和先留在设备上，读取时才取回，因此不必每步等待 GPU。
    """

    def __init__(self, device: torch.device, processes: Processes, epoch: TokenAverage) -> None:
        """开始累计。

        Args:
            device: 各步的和所在的设备。
            processes: 进程分工，读取时各进程相加。
            epoch: 本轮此前的累计；每次读取都加到它上面，它仍归调用者所有。
        """
        self._processes = processes
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._recent = TokenAverage()
        self._cells = torch.zeros(2, dtype=torch.float64)  # 前向的位置数，其中补齐的
        self._epoch = epoch
        self._num_resumed = epoch.num_tokens
        self._started = self._last_read = time.perf_counter()

    def add(self, sums: Tensor, *, num_cells: int = 0, num_padding: int = 0) -> None:
        """加上一步。

        Args:
            sums: 三个和，形状 (3,)。
            num_cells: 这一步的前向共多少个位置。
            num_padding: 其中多少个是补齐。
        """
        self._sums += sums
        self._cells += torch.tensor([num_cells, num_padding])

    def flush(self) -> None:
        """把还在设备上的和加进本轮的累计；下一次读取仍把它们算在内。"""
        fresh = TokenAverage()
        fresh.add(self._processes.sum(self._sums))
        self._sums.zero_()
        self._epoch.merge(fresh)
        self._recent.merge(fresh)

    def read(self) -> Reading:
        """上次读取以来的平均、速度和补齐；平均也加进本轮的累计。"""
        self.flush()
        recent, self._recent = self._recent, TokenAverage()
        num_cells, num_padding = self._processes.sum(self._cells).tolist()
        now = time.perf_counter()
        speed = recent.num_tokens / max(now - self._last_read, 1e-9)
        self._cells.zero_()
        self._last_read = now
        return Reading(recent, speed, num_padding / max(1, num_cells))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """其中的时间（例如轮中的验证）不算进速度。"""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._started += seconds
        self._last_read += seconds

    def read_epoch_speed(self) -> float:
        """本次运行里，这一轮每秒训练的 token 数（不含补齐）；先读取。"""
        self.read()
        seconds = max(self._last_read - self._started, 1e-9)
        return (self._epoch.num_tokens - self._num_resumed) / seconds


def evaluate(
    updater: Updater, batches: Iterable[Batch], should_stop: Callable[[], bool] = lambda: False
) -> TokenAverage | None:
    """在全部验证对话上各算一次，不更新；多进程时每个进程算自己的一份再相加。

    Args:
        updater: 只用它的前向。
        batches: 验证集的各批，每个进程的批数相同。
        should_stop: 每批之前问一次；任何一个进程说是，所有进程都停下。

    Returns:
        全部验证对话的平均；中途停下时是 None。
    """
    processes, loss_module = updater.processes, updater.loss_module
    was_training = loss_module.training
    loss_module.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=updater.device)
    is_stopped = False
    for batch in batches:
        is_stopped = processes.any(should_stop())
        if is_stopped:
            break
        sums += updater.forward(batch)
    loss_module.train(was_training)
    if is_stopped:
        return None
    average = TokenAverage()
    average.add(processes.sum(sums))
    return average
