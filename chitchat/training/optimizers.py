"""优化器与学习率：AdamW、Muon，以及先预热的学习率曲线。"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chitchat.devices import has_fast_bf16

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
FLAT_RATIO = 1.5  # 长边至少是短边的这么多倍，在短边上迭代的运算才少：4r + 34 对 20r + 10
DEFAULT_LR = {"adamw": 1e-3, "muon": 2e-3}  # 学习率的峰值，由 tests/benchmarks/time_to_loss.py 选定


class Muon(Optimizer):
    """对二维权重的动量做正交化再更新；形状相同的权重叠在一起算。

    与 ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw", nesterov=True)`` 的结果一致，
    但它的正交化固定用 bfloat16：没有 bf16 指令的 CPU 上，一个 256×1024 的权重要 700 毫秒以上，
    用 float32 只要 10 毫秒。这里哪种快用哪种，见 orthogonalize。

    来源: Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ ；
    按 AdamW 的幅度调整学习率: arXiv:2502.16982 §2.2。
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        # 形状 → 叠在一起的动量，和它的各片；每个参数的状态就是其中一片，不必每步叠起来再拆开。
        self._stacks: dict[torch.Size, tuple[Tensor, list[Tensor]]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """更新一次；没有梯度的参数不动，found_inf 不为零时什么都不动。"""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf:
                return
            found_inf = None
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    same_shape.setdefault(param.shape, []).append(param)
            for params in same_shape.values():
                self._update(params, group, found_inf)

    def _update(self, params: list[nn.Parameter], group: dict, found_inf: Tensor | None) -> None:
        """更新形状相同的一组参数；在 GPU 上，found_inf 不为零时各个量乘以零，不必等待。"""
        momenta = self._stack_momenta(params)
        grads = torch.stack([param.grad for param in params])  # 此后就地变成更新的方向
        weight, decay = 1 - group["momentum"], group["lr"] * group["weight_decay"]
        keep = None
        if found_inf is not None:
            keep = 1 - found_inf
            grads.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            weight, decay = weight * keep, decay * keep
        momenta.lerp_(grads, weight)
        updates = orthogonalize(grads.lerp_(momenta, group["momentum"]))  # Nesterov
        if keep is not None:
            updates = updates * keep
        torch._foreach_mul_(params, 1 - decay)
        lr = group["lr"] * 0.2 * math.sqrt(max(params[0].shape))
        for param, update in zip(params, updates, strict=True):
            param.add_(update, alpha=-lr)

    def _stack_momenta(self, params: list[nn.Parameter]) -> Tensor:
        """这些参数的动量叠在一起，形状 (K, A, B)；改它就是改各参数的状态。"""
        stack, pieces = self._stacks.get(params[0].shape, (None, []))
        owned = [self.state[param].get("momentum_buffer") for param in params]
        is_same = len(pieces) == len(owned)
        if not is_same or any(a is not b for a, b in zip(pieces, owned, strict=True)):
            # 头一次，或者刚读回了状态
            stack = torch.stack(
                [
                    torch.zeros_like(p) if o is None else o
                    for p, o in zip(params, owned, strict=True)
                ]
            )
            pieces = list(stack.unbind())
            self._stacks[params[0].shape] = stack, pieces
            for param, piece in zip(params, pieces, strict=True):
                self.state[param]["momentum_buffer"] = piece
        return stack


def orthogonalize(matrices: Tensor) -> Tensor:
    """用 Newton-Schulz 迭代求近似的正交因子（把奇异值都推到 1 附近）。

    Args:
        matrices: 形状 (K, A, B)，浮点；不会被修改。

    Returns:
        形状 (K, A, B)；bf16 矩阵乘法快的设备上是 bfloat16，别的 CPU 上是 float32。
    """
    is_bf16 = matrices.device.type != "cpu" or has_fast_bf16(matrices.device)
    is_tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if is_tall else matrices).to(torch.bfloat16 if is_bf16 else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # 在小的一边迭代要把舍入误差平方，bf16 的精度不够。
    is_flat = x.size(2) >= FLAT_RATIO * x.size(1)
    x = _iterate_small_side(x) if is_flat and not is_bf16 else _iterate(x)
    return x.mT if is_tall else x


def _iterate(x: Tensor) -> Tensor:
    """X ← a X + (b G + c G²) X，G = X Xᵀ；x 形状 (K, A, B)，A ≤ B。"""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_small_side(x: Tensor) -> Tensor:
    """与 _iterate 相同，但只有头尾两次乘法涉及长边 B；x 形状 (K, A, B)。

    每一步是 X ← M X，M = a I + b G + c G²。各个 M 都是最初的 G 的多项式，与 G 可交换，
    所以 G ← M G M = M² G；把各个 M 乘在一起，最后才乘 X。
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    gram = x @ x.mT  # (K, A, A)
    product = None
    for i in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ (factor @ gram)
    return product @ x


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """各层里的二维权重，Muon 只用于它们。"""
    return [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]


def build_optimizers(
    model: nn.Module, name: str, *, lr: float, eps: float, weight_decay: float = 0.01
) -> list[Optimizer]:
    """按名字建立优化器。

    权重衰减只作用于矩阵，不作用于偏置和归一化的参数。``muon`` 时，模型各层里的二维权重
    用 Muon，其余（词向量、位置向量、偏置、归一化）用 AdamW。

    Args:
        model: GPT2LMHeadModel。
        name: ``adamw`` 或 ``muon``。
        lr: 学习率的峰值，两种优化器通用（Muon 内部按 AdamW 的幅度调整）。
        eps: AdamW 的 eps。
        weight_decay: 权重衰减系数。

    Returns:
        一个或两个优化器，每个参数恰好属于其中一个。
    """
    hidden = hidden_matrices(model) if name == "muon" else []
    is_hidden = set(map(id, hidden))
    others = [param for param in model.parameters() if id(param) not in is_hidden]
    matrices = [param for param in others if param.ndim > 1]
    vectors = [param for param in others if param.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=lr, eps=eps, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, lr=lr, weight_decay=weight_decay))
    return optimizers


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """学习率相对峰值的倍数：先从 0 线性升到 1，再按 schedule 变化。

    Args:
        step: 已完成的更新次数，从 0 开始。
        schedule: ``linear`` 线性降到 0，``cosine`` 按余弦降到 0，``constant`` 保持不变。
        warmup_steps: 预热的更新次数，0 表示不预热。
        total_steps: 全部更新次数。
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    num_decay_steps = max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / num_decay_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    return max(0.0, (total_steps - step) / num_decay_steps)


def build_schedulers(
    optimizers: list[Optimizer], schedule: str, *, warmup_steps: int, total_steps: int
) -> list[LambdaLR]:
    """给每个优化器配上同一条学习率曲线，参数同 learning_rate_factor。"""
    factor = functools.partial(
        learning_rate_factor,
        schedule=schedule,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    return [LambdaLR(optimizer, factor) for optimizer in optimizers]
