"""一次参数更新：放不下就拆开、fp16 的 loss 缩放、裁剪、非有限数不更新。

形状记号: B 窗口里的对话数   T 本窗口最长对话的 token 数
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from chitchat.errors import UserError
from chitchat.training.batching import split_rows
from chitchat.training.dataset import Batch
from chitchat.training.processes import Processes

logger = logging.getLogger(__name__)

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # 最后一个是 ARM 的


class Updater:
    """对一个窗口做前向、反向，然后让各优化器走一步。

    Attributes:
        max_rows: 一次前向最多的对话数；显存（内存）不足时减半并记住。
    """

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
        self.max_padding = max_padding
        inner = getattr(loss_module, "module", loss_module)
        self._ignore_index = inner.ignore_index
        self.scaler = torch.amp.GradScaler(device.type, enabled=inner.dtype == torch.float16)
        self.max_rows: int | None = None
        self._largest_done = 0
        self._params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self._num_bad_steps = torch.zeros((), device=device)

    @property
    def lr(self) -> float:
        """现在的学习率。"""
        return self.optimizers[0].param_groups[0]["lr"]

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
        sums = self._until_it_fits(batch, self._forward_backward)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self._params, self.max_grad_norm, foreach=True)
        is_bad = (~torch.isfinite(grad_norm)).float()
        for optimizer in self.optimizers:
            optimizer.found_inf = is_bad  # 不为零时优化器在设备上跳过这一步，不必等待 GPU
            optimizer.step()
        if self.scaler.is_enabled():
            self._update_scale(is_bad)
        else:
            self._num_bad_steps += is_bad
        for scheduler in self.schedulers:
            scheduler.step()
        return sums, grad_norm

    def _update_scale(self, is_bad: Tensor) -> None:
        """按整个窗口的梯度调整 loss 的倍数；is_bad 是标量，不为零时减半。

        GradScaler 分别判断各优化器，一个里的 Inf 却会经过裁剪带坏另一个的梯度，范数也可能自己
        溢出：所以更新与否都由 is_bad 决定，它各自的判断改成同一个，也不用它的 step。
        """
        for optimizer in self.optimizers:
            for found_inf in self.scaler._found_inf_per_device(optimizer).values():
                found_inf.copy_(is_bad)
        self.scaler.update()

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """只算 loss，不更新；返回三个和，形状 (3,)，留在设备上。"""
        return self._until_it_fits(batch, self._sum_parts)

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

    def _until_it_fits(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """``compute(batch)``；放不下时减半，从头再算。"""
        while True:
            try:
                return compute(batch)
            except RuntimeError as error:  # torch.OutOfMemoryError 也是它的子类
                if not _is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            # 离开 except 之后，失败的那次前向才会被释放。
            rows = min(len(batch.input_ids), self.max_rows or len(batch.input_ids))
            if rows == 1:
                raise UserError(
                    f"一段 {batch.input_ids.size(1)} 个 token 的对话也放不下（{reason}）："
                    "请减小 --max_len、换小一些的模型，或加 --gradient_checkpointing"
                )
            self.max_rows = (rows + 1) // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning("out of memory: max dialogues per forward=%d", self.max_rows)

    def _sum_parts(self, batch: Batch) -> Tensor:
        sums = torch.zeros(3, device=self.device)
        for input_ids, labels in self._split(batch):
            sums += self._forward_part(input_ids, labels)
        return sums

    def _forward_backward(self, batch: Batch) -> Tensor:
        """前向和反向整个窗口；每次都从没有梯度开始，不漏算也不重复算。"""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts = self._split(batch)
        is_ddp = isinstance(self.loss_module, DistributedDataParallel)
        size = max(input_ids.numel() for input_ids, _ in parts)
        if is_ddp and size > self._largest_done:
            # 头一次遇到这么大的形状，可能放不下：先不同步地算完，再用一行空白触发梯度同步，
            # 这样一个进程重来时，别的进程只是在等它。
            input_ids, labels = parts[0]
            parts.append((input_ids[:1, :2], torch.full_like(labels[:1, :2], self._ignore_index)))
        sums = torch.zeros(3, device=self.device)
        for i, (input_ids, labels) in enumerate(parts):
            is_last = i == len(parts) - 1
            with self.loss_module.no_sync() if is_ddp and not is_last else contextlib.nullcontext():
                sums += self._micro_step(input_ids, labels, batch.num_targets)
        self._largest_done = max(self._largest_done, size)
        return sums

    def _split(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """一个窗口分几次前向：每次的 input_ids 和 labels，形状 (b, t)，b ≤ B，t ≤ T。"""
        rows = self.max_rows or len(batch.input_ids)
        if self.max_padding >= 1:
            return list(zip(batch.input_ids.split(rows), batch.labels.split(rows), strict=True))
        lengths = (batch.labels != self._ignore_index).sum(dim=1).tolist()
        parts = []
        for start, stop in split_rows(lengths, max_rows=rows, max_padding=self.max_padding):
            width = max(2, *lengths[start:stop])
            parts.append((batch.input_ids[start:stop, :width], batch.labels[start:stop, :width]))
        return parts

    def _micro_step(self, input_ids: Tensor, labels: Tensor, num_targets: int) -> Tensor:
        """一次前向和反向；input_ids 与 labels 形状 (B, T)，返回形状 (3,)。"""
        sums = self._forward_part(input_ids, labels)
        # DistributedDataParallel 对各进程的梯度取平均，乘回进程数才是整个窗口的平均。
        loss = sums[0] * (self.processes.world_size / max(1, num_targets))
        self.scaler.scale(loss).backward()
        return sums.detach()

    def _forward_part(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        input_ids = input_ids.to(self.device, non_blocking=True)
        return self.loss_module(input_ids, labels.to(self.device, non_blocking=True)).sum(dim=0)

    def state_dict(self) -> dict:
        """断点续训所需的状态。"""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "max_rows": self.max_rows,
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
        self.max_rows = state["max_rows"]


def choose_precision(name: str, device: torch.device) -> str:
    """把 ``auto`` 变成具体的精度。

    有 bf16 硬件用 bf16；较老的 GPU 用 fp16；别的 CPU 用 fp32，在那里 bf16 要慢几十倍。
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    # 有指令还不够：只有 oneDNN（mkldnn）的矩阵乘法会用它们。
    instructions = torch.cpu.get_capabilities()
    has_bf16 = any(instructions.get(name) for name in BF16_INSTRUCTIONS)
    return "bf16" if has_bf16 and torch.backends.mkldnn.is_available() else "fp32"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """GPU 显存不足，或 CPU 上申请不到内存。"""
    signs = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_sign = any(sign in str(error) for sign in signs)
    return isinstance(error, torch.OutOfMemoryError) or is_sign
