"""一次参数更新：前向和反向、裁剪、各优化器走一步；非有限数时不更新。

放不下时怎样拆开在 splitting，多进程的梯度何时同步在 gradient_sync。
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from chitchat.errors import UserError
from chitchat.training.dataset import Batch
from chitchat.training.gradient_sync import GradientSync
from chitchat.training.processes import Processes
from chitchat.training.splitting import Part, Splitter


class Updater:
    """对一个窗口做前向、反向，然后让各优化器走一步。"""

    def __init__(
        self,
        loss_module: nn.Module,
        optimizers: list[Optimizer],
        schedulers: list[LRScheduler],
        *,
        max_grad_norm: float,
        processes: Processes,
        device: torch.device,
        max_padding: float = 1.0,
    ) -> None:
        """建立更新器。

        Args:
            loss_module: LossModule 或它的 DataParallel / DistributedDataParallel；
                精度是 ``fp16`` 时 loss 会自动缩放。
            optimizers: 全部优化器，都支持 ``found_inf``（fused AdamW 和本项目的 Muon）。
            schedulers: 与之对应的学习率曲线。
            max_grad_norm: 梯度 L2 范数的上限。
            processes: 进程分工。
            device: 输入所在的设备。
            max_padding: 一次前向里补齐超过这个比例就拆开，见 split_rows；1 表示从不。
        """
        self.loss_module = loss_module
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.max_grad_norm = max_grad_norm
        self.processes = processes
        self.device = device
        self.splitter = Splitter(device, max_padding=max_padding)
        self.gradient_sync = GradientSync(loss_module)
        dtype = getattr(loss_module, "module", loss_module).dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self._num_bad_steps = torch.zeros((), device=device)

    @property
    def lr(self) -> float:
        """上一次更新所用的学习率；还没有更新过时是第一次将用的。"""
        scheduler = self.schedulers[0]
        last_step = max(0, scheduler.last_epoch - 1)
        return scheduler.base_lrs[0] * scheduler.lr_lambdas[0](last_step)

    @property
    def peak_lr(self) -> float:
        """学习率的峰值。"""
        return self.schedulers[0].base_lrs[0]

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """一次参数更新。

        Returns:
            三个和（形状 (3,)，本进程的 loss 之和、token 数、猜对数），以及裁剪前的梯度范数
            （标量张量）；都留在设备上。梯度不是有限数时参数和优化器的状态不变。
        """
        forward_backward = functools.partial(self._forward_backward, batch.num_targets)
        sums = self.splitter.run(batch, forward_backward)
        grad_norm = self._clip()
        self._update(is_bad=(~torch.isfinite(grad_norm)).float())
        return sums, grad_norm

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """只算 loss，不更新；返回三个和，形状 (3,)，留在设备上。"""
        return self.splitter.run(batch, self._sum_parts)

    def _sum_parts(self, parts: list[Part]) -> Tensor:
        sums = torch.zeros(3, device=self.device)
        for part in parts:
            sums += self._forward_part(part)
        return sums

    def _forward_backward(self, num_targets: int, parts: list[Part]) -> Tensor:
        """前向和反向整个窗口；每次都从没有梯度开始，放不下而重来时不漏算也不重复算。"""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self.device)
        for part, context in self.gradient_sync.schedule(parts):
            with context:
                part_sums = self._forward_part(part)
                # DistributedDataParallel 对各进程的梯度取平均，乘回进程数才是整个窗口的平均。
                loss = part_sums[0] * (self.processes.world_size / max(1, num_targets))
                self.scaler.scale(loss).backward()
            sums += part_sums.detach()
        return sums

    def _forward_part(self, part: Part) -> Tensor:
        input_ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in part)
        return self.loss_module(input_ids, labels).sum(dim=0)

    def _clip(self) -> Tensor:
        """按全部参数的总范数裁剪，返回裁剪前的范数；先除去 fp16 的 loss 的倍数。"""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(self._params, self.max_grad_norm, foreach=True)

    def _update(self, is_bad: Tensor) -> None:
        """各优化器走一步；is_bad 是标量，不为零时在设备上跳过这一步，不必等待 GPU。"""
        for optimizer in self.optimizers:
            optimizer.found_inf = is_bad
            optimizer.step()
        if self.scaler.is_enabled():
            self._update_scale(is_bad)
        else:
            self._num_bad_steps += is_bad
        for scheduler in self.schedulers:
            scheduler.step()

    def _update_scale(self, is_bad: Tensor) -> None:
        """按整个窗口的梯度调整 loss 的倍数；is_bad 是标量，不为零时减半。

        GradScaler 分别判断各优化器，一个里的 Inf 却会经过裁剪带坏另一个的梯度，范数也可能自己
        溢出：所以更新与否都由 is_bad 决定，它各自的判断改成同一个，也不用它的 step。
        """
        for optimizer in self.optimizers:
            for found_inf in self.scaler._found_inf_per_device(optimizer).values():
                found_inf.copy_(is_bad)
        self.scaler.update()

    def check_finite(self) -> None:
        """确认此前各步都是有限数；GPU 上这要等待，所以隔几步才问一次。

        Raises:
            UserError: 出现过 NaN 或 Inf；那些步没有改动参数。
        """
        is_scale_lost = self.scaler.is_enabled() and self.scaler.get_scale() < 2**-10
        if self._num_bad_steps.item() or is_scale_lost:
            raise UserError(
                "loss 或梯度出现 NaN 或 Inf，已停下，参数没有被它改动："
                "请减小 --lr，检查 --pretrained_model 的权重，或用 --precision fp32"
            )

    def state_dict(self) -> dict:
        """断点续训所需的状态。"""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "max_rows": self.splitter.max_rows,
        }

    def load_state_dict(self, state: dict, *, peak_lr: float | None = None) -> None:
        """恢复 state_dict 给出的状态；学习率按现在的曲线重算，因此轮数可以增加。

        Args:
            state: state_dict 的结果。
            peak_lr: 学习率的峰值，None 表示与那时相同；其余超参数（eps 等）总用现在的。
        """
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            current = [
                {name: value for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ]
            optimizer.load_state_dict(saved)
            for group, own in zip(optimizer.param_groups, current, strict=True):
                group.update(own)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
            if peak_lr is not None:
                scheduler.base_lrs = [peak_lr] * len(scheduler.base_lrs)
            lrs = [
                base * f(scheduler.last_epoch)
                for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
        self.scaler.load_state_dict(state["scaler"])
        self.splitter.max_rows = state["max_rows"]
