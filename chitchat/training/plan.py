"""开始训练之前定下来、此后不变的：优化器、学习率曲线、精度、更新的次数。"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from chitchat.devices import has_fast_bf16
from chitchat.training.loss import LossModule
from chitchat.training.optimizer_choice import choose_optimizer
from chitchat.training.optimizers import (
    DEFAULT_LR,
    build_optimizers,
    build_schedulers,
)
from chitchat.training.processes import Processes, parallelize
from chitchat.training.updater import Updater

MAX_WARMUP_STEPS = 4000  # 参考实现的固定值，这里作上限
FINE_TUNING_LR = 1e-4  # 从已有的权重继续时的学习率：再大就会忘掉已经学会的


@dataclass(frozen=True)
class Plan:
    """一次训练的安排；``auto`` 和 None 由 settle 定下来。

    Attributes:
        total_steps: 全部更新次数。
        optimizer: ``auto``、``adamw`` 或 ``muon``。
        lr: 学习率的峰值。
        lr_schedule: 预热之后怎样变，见 learning_rate_factor。
        warmup_steps: 预热的更新次数，0 表示不预热。
        eps: AdamW 的 eps。
        max_grad_norm: 梯度 L2 范数的上限。
        max_padding: 一次前向里补齐超过这个比例就拆开，1 表示从不。
        precision: 前向的精度，``auto`` 或 PRECISIONS 之一。
    """

    total_steps: int
    optimizer: str
    lr: float | None
    lr_schedule: str
    warmup_steps: int | None
    eps: float
    max_grad_norm: float
    max_padding: float
    precision: str

    def settle(
        self, model: nn.Module, loader: DataLoader, processes: Processes, *, is_fine_tuning: bool
    ) -> Plan:
        """定下精度、优化器、学习率和预热步数，各进程相同；不修改自己。

        Args:
            model: GPT2LMHeadModel，已在训练所用的设备上。
            loader: 训练集的。
            processes: 进程分工。
            is_fine_tuning: 从已有的权重继续。
        """
        precision = processes.share(lambda: choose_precision(self.precision, model.device))
        optimizer = self.optimizer
        if optimizer == "auto" and is_fine_tuning:
            optimizer = "adamw"
        elif optimizer == "auto":
            loss_module = LossModule(model, precision=precision)
            optimizer = processes.share(
                lambda: choose_optimizer(loss_module, loader, num_processes=processes.world_size)
            )
        lr, warmup_steps = self.lr, self.warmup_steps
        if lr is None:
            lr = FINE_TUNING_LR if is_fine_tuning else DEFAULT_LR[optimizer]
        if warmup_steps is None:
            warmup_steps = min(MAX_WARMUP_STEPS, self.total_steps // 10)
        return dataclasses.replace(
            self, precision=precision, optimizer=optimizer, lr=lr, warmup_steps=warmup_steps
        )

    def build_updater(
        self, model: nn.Module, devices: list[torch.device], processes: Processes
    ) -> Updater:
        """模型套上损失和并行，配好优化器与学习率曲线；全部定下来之后才能用。"""
        optimizers = build_optimizers(model, self.optimizer, lr=self.lr, eps=self.eps)
        return Updater(
            parallelize(LossModule(model, precision=self.precision), devices, processes),
            optimizers,
            build_schedulers(
                optimizers,
                self.lr_schedule,
                warmup_steps=self.warmup_steps,
                total_steps=self.total_steps,
            ),
            max_grad_norm=self.max_grad_norm,
            processes=processes,
            device=devices[0],
            max_padding=self.max_padding,
        )


def choose_precision(name: str, device: torch.device) -> str:
    """把 ``auto`` 变成具体的精度。

    bf16 快就用 bf16；较老的 GPU 用 fp16；别的 CPU 用 fp32，在那里 bf16 慢两倍到几十倍。
    """
    if name != "auto":
        return name
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"
