"""DistributedDataParallel 的梯度什么时候同步；别的模型一概不管。"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chitchat.training.dataset import IGNORE_INDEX
from chitchat.training.splitting import Part


class GradientSync:
    """每个窗口只在最后一次反向时同步；各进程的前向次数因此可以不同。"""

    def __init__(self, loss_module: nn.Module) -> None:
        """loss_module 不是 DistributedDataParallel 时，schedule 只把各份原样交出。"""
        self._ddp = loss_module if isinstance(loss_module, DistributedDataParallel) else None
        self._largest_done = 0

    def schedule(self, parts: list[Part]) -> Iterator[tuple[Part, AbstractContextManager]]:
        """依次给出各份，以及它的前向和反向应当在哪个 context 里做。

        头一次遇到这么大的形状，可能放不下：先不同步地算完，再用一行空白触发同步，
        这样一个进程拆开重来时，别的进程只是在等它。
        """
        if self._ddp is None:
            yield from ((part, contextlib.nullcontext()) for part in parts)
            return
        size = max(part.input_ids.numel() for part in parts)
        if size > self._largest_done:
            input_ids, labels = parts[0]
            blank = torch.full_like(labels[:1, :2], IGNORE_INDEX)
            parts = [*parts, Part(input_ids[:1, :2], blank)]
        yield from ((part, self._ddp.no_sync()) for part in parts[:-1])
        yield parts[-1], contextlib.nullcontext()
        self._largest_done = max(self._largest_done, size)
