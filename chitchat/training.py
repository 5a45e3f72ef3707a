"""训练的零件：一次参数更新、验证、早停、指标、进程分工。"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from chitchat.dataset import Batch
from chitchat.runtime import UserError


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


class EarlyStopping:
    """验证 loss 连续 patience 轮没有变好就停。"""

    def __init__(self, patience: int) -> None:
        """建立计数器；patience 为 0 表示从不停。"""
        self.patience = patience
        self.best_loss = math.inf
        self.num_bad_epochs = 0

    def update(self, val_loss: float) -> bool:
        """记下一轮的验证 loss，返回它是不是目前最好的。"""
        is_best = val_loss < self.best_loss
        self.best_loss = min(self.best_loss, val_loss)
        self.num_bad_epochs = 0 if is_best else self.num_bad_epochs + 1
        return is_best

    @property
    def should_stop(self) -> bool:
        """是否已经连续 patience 轮没有变好。"""
        return 0 < self.patience <= self.num_bad_epochs


class MetricWriter:
    """把指标写进 TensorBoard；``log_dir`` 为 None 时什么也不做。"""

    def __init__(self, log_dir: Path | None) -> None:
        self._writer = None
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(log_dir))

    def write(self, step: int, **metrics: float) -> None:
        """写一组数；名字里的第一个下划线换成斜线，``train_loss`` 记作 ``train/loss``。"""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name.replace("_", "/", 1), value, step)

    def close(self) -> None:
        """把缓冲写完。"""
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True)
class Processes:
    """torchrun 启动的一组进程中本进程的位置；不用 torchrun 时是唯一的一个。"""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """读 torchrun 设置的环境变量。"""
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        return cls(*(int(os.environ.get(name, value)) for name, value in defaults.items()))

    @property
    def is_main(self) -> bool:
        """写日志和文件的那一个。"""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """各进程的同名张量相加，返回每个进程都有的和。"""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


class Meter:
    """一轮训练中的累计：全轮的平均，以及上次读取以来的平均和速度。

    各步的和先留在设备上，读取时才取回，因此不必每步等待 GPU。
    """

    def __init__(self, device: torch.device, processes: Processes) -> None:
        self._processes = processes
        self._recent = torch.zeros(3, dtype=torch.float64, device=device)
        self._epoch = TokenAverage()
        self._started = self._last_read = time.perf_counter()

    def add(self, sums: Tensor) -> None:
        """加上一步的三个和，形状 (3,)。"""
        self._recent += sums

    def read_recent(self) -> tuple[TokenAverage, float]:
        """上次读取以来的平均，以及每秒训练的 token 数（不含补齐）。"""
        recent, now = TokenAverage(), time.perf_counter()
        sums = self._processes.sum(self._recent)
        recent.add(sums)
        self._epoch.add(sums)
        speed = recent.num_tokens / max(now - self._last_read, 1e-9)
        self._recent.zero_()
        self._last_read = now
        return recent, speed

    def read_epoch(self) -> tuple[TokenAverage, float]:
        """整轮的平均，以及每秒训练的 token 数（不含补齐）。"""
        self.read_recent()
        return self._epoch, self._epoch.num_tokens / max(self._last_read - self._started, 1e-9)


def train_step(
    loss_module: nn.Module,
    batch: Batch,
    optimizers: list[Optimizer],
    schedulers: list[LRScheduler],
    *,
    max_grad_norm: float,
    processes: Processes,
    device: torch.device,
) -> tuple[Tensor, float]:
    """一次参数更新：前向、反向、裁剪一次、走一步。

    Args:
        loss_module: LossModule 或它的 DataParallel / DistributedDataParallel。
        batch: 本进程的一份。
        optimizers: 全部优化器。
        schedulers: 与之对应的学习率曲线。
        max_grad_norm: 梯度的 L2 范数上限。
        processes: 进程分工。
        device: 输入所在的设备。

    Returns:
        三个和（形状 (3,)，本进程的 loss 之和、token 数、猜对数），以及裁剪前的梯度范数。

    Raises:
        UserError: loss 或梯度不是有限数；此时参数还没有被这一步改动。
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    sums = loss_module(batch.input_ids.to(device), batch.labels.to(device)).sum(dim=0)
    # DistributedDataParallel 对各进程的梯度取平均，乘回进程数才是整个窗口的平均。
    (sums[0] * (processes.world_size / max(1, batch.num_targets))).backward()
    params = [param for group in _groups(optimizers) for param in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(params, max_grad_norm)
    if not math.isfinite(grad_norm):
        raise UserError(
            f"loss 或梯度不是有限数（loss 之和 {sums[0]:g}，梯度范数 {grad_norm:g}），"
            "已在更新参数前停下；请减小 --lr，或检查 --pretrained_model 的权重"
        )
    for optimizer in optimizers:
        optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    return sums.detach(), float(grad_norm)


def _groups(optimizers: list[Optimizer]) -> Iterable[dict]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


@torch.no_grad()
def evaluate(
    loss_module: nn.Module, batches: Iterable[Batch], *, processes: Processes, device: torch.device
) -> TokenAverage:
    """在全部验证对话上各算一次，多进程时每个进程算自己的一份再相加。"""
    loss_module.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        sums += loss_module(batch.input_ids.to(device), batch.labels.to(device)).sum(dim=0)
    loss_module.train()
    average = TokenAverage()
    average.add(processes.sum(sums))
    return average
