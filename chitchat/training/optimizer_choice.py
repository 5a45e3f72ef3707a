"""``--optimizer auto``：量一量正交化和前向、反向各要多久，由它决定用 Muon 还是 AdamW。"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from chitchat.training.batching import Window
from chitchat.training.dataset import Batch, DialogueDataset
from chitchat.training.failures import is_out_of_memory
from chitchat.training.loss import LossModule
from chitchat.training.optimizers import hidden_matrices, orthogonalize

logger = logging.getLogger(__name__)

MAX_MUON_COST = 1.2  # 正交化的时间最多是前向和反向的几倍；再多，少走的步数就抵不上了
ENOUGH_SECONDS = 1.5  # 一次前向和反向有这么久，就不必再量更大的


def choose_optimizer(loss_module: LossModule, loader: DataLoader, *, num_processes: int) -> str:
    """给出 ``adamw`` 或 ``muon``。

    同样多的步数 Muon 总是更好，但正交化的时间只取决于模型，前向和反向的则随一次更新的 token 数
    增长，另有一份与 token 数无关：小模型或大批次才划算。前向和反向由各进程分摊，正交化却每个进程
    都做一遍。

    Args:
        loss_module: 没有套上并行的；权重、梯度和随机数都不会变。
        loader: 训练集的。
        num_processes: 有多少个进程。
    """
    tokens_per_update = loader.dataset.lengths.sum() / len(loader) / num_processes
    num_rows = max(1, len(loader.dataset) // len(loader) // num_processes)
    batch = _middle_batch(loader.dataset, num_rows)
    orthogonalizing = measure_orthogonalizing(loss_module.model)
    training = measure_training(loss_module, batch, tokens_per_update)
    logger.info(
        "optimizer auto: seconds per update: forward and backward=%.3f orthogonalizing=%.3f",
        *(training, orthogonalizing),
    )
    return "muon" if orthogonalizing <= MAX_MUON_COST * training else "adamw"


def _middle_batch(dataset: DialogueDataset, num_rows: int) -> Batch:
    """长度居中的 num_rows 段。"""
    start = max(0, (len(dataset) - num_rows) // 2)
    indices = np.argsort(dataset.lengths, kind="stable")[start : start + num_rows]
    return dataset[Window(indices.tolist(), 0)]


def measure_orthogonalizing(model: nn.Module) -> float:
    """Muon 每次更新为模型做正交化要多少秒。"""
    shapes = Counter(param.shape for param in hidden_matrices(model))
    device = next(model.parameters()).device
    total = 0.0
    for shape, count in shapes.items():
        matrices = torch.ones(count, *shape, device=device)
        orthogonalize(matrices[:1])  # 头一次要准备
        total += _measure(device, lambda matrices=matrices: orthogonalize(matrices))
    return total


def measure_training(loss_module: LossModule, batch: Batch, num_tokens: float) -> float:
    """num_tokens 个 token 的前向和反向要多少秒；由少到多地量，照最后两种大小之间的斜率推算。

    读权重、写梯度的时间与 token 数无关：大模型只看几十个 token 时，按比例推算会多出几倍。
    每种大小量两次，取短的：新的形状头一次要准备。
    """
    device = loss_module.model.device
    points = [(0, 0.0)]

    def run(num_rows: int) -> None:
        input_ids, labels = batch.input_ids[:num_rows], batch.labels[:num_rows]
        loss_module(input_ids.to(device), labels.to(device))[0, 0].backward()

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        num_rows = 1
        while True:
            try:
                seconds = min(_measure(device, functools.partial(run, num_rows)) for _ in range(2))
            except RuntimeError as error:
                if len(points) == 1 or not is_out_of_memory(error):
                    raise
                break
            points.append((sum(batch.lengths[:num_rows]), seconds))
            has_slope = len(points) > 2  # 除了 (0, 0) 还有两种大小
            if num_rows >= len(batch.lengths) or (has_slope and seconds >= ENOUGH_SECONDS):
                break
            num_rows *= 2
    loss_module.zero_grad(set_to_none=True)
    (fewer, shorter), (more, longer) = points[-2:]
    return longer + max(0.0, longer - shorter) / (more - fewer) * (num_tokens - more)


def _measure(device: torch.device, run: Callable[[], object]) -> float:
    """run 一次要多少秒；GPU 上等到算完。"""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
