"""一个窗口分几次前向：补齐太多的拆开；内存放不下时拆得更小，从头再算。

形状记号: B 窗口里的对话数   T 本窗口最长对话的 token 数
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chitchat.errors import UserError
from chitchat.training.dataset import Batch
from chitchat.training.failures import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_PADDING = 0.05  # 一次前向里补齐超过这个比例，就拆成两次
MIN_ROWS = 16  # 但每次不少于这么多段对话，太小的前向反而慢
# GPU 上一次前向的固定开销（启动上千个核函数）约等于多算这么多个位置；省不下这么多就不拆。
MIN_PADDING = {"cuda": 2**14}


class Part(NamedTuple):
    """一次前向的输入。"""

    input_ids: Tensor  # (b, t)，b ≤ B，t ≤ T
    labels: Tensor  # (b, t)


class Splitter:
    """把窗口拆成一次前向放得下的几份。

    Attributes:
        max_rows: 一次前向最多的对话数；显存（内存）不足时减半并记住，None 表示不限。
    """

    def __init__(self, device: torch.device, *, max_padding: float = 1.0) -> None:
        """建立拆分器。

        Args:
            device: 前向所在的设备。
            max_padding: 一次前向里补齐超过这个比例就拆开，见 split_rows；1 表示从不。
        """
        self.device = device
        self.max_padding = max_padding
        self.max_rows: int | None = None

    def run(self, batch: Batch, compute: Callable[[list[Part]], Tensor]) -> Tensor:
        """把 batch 拆开交给 compute；放不下时减半，从头再算，所以 compute 要能重来。

        Raises:
            UserError: 单独一段对话也放不下。
        """
        while True:
            try:
                return compute(self.split(batch))
            except RuntimeError as error:  # torch.OutOfMemoryError 也是它的子类
                if not is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            # 离开 except 之后，失败的那次前向才会被释放。
            self._shrink(batch, reason)

    def split(self, batch: Batch) -> list[Part]:
        """batch 的各份，依次盖住所有对话；每份按自己的最长补齐。"""
        rows = self.max_rows or len(batch.lengths)
        if self.max_padding >= 1:
            pairs = zip(batch.input_ids.split(rows), batch.labels.split(rows), strict=True)
            return [Part(*pair) for pair in pairs]
        parts = []
        pairs = split_rows(
            batch.lengths,
            max_rows=rows,
            max_padding=self.max_padding,
            min_padding=MIN_PADDING.get(self.device.type, 0),
        )
        for start, stop in pairs:
            width = max(2, *batch.lengths[start:stop])
            parts.append(
                Part(batch.input_ids[start:stop, :width], batch.labels[start:stop, :width])
            )
        return parts

    def count_cells(self, batch: Batch) -> int:
        """拆开之后各次前向的位置数之和，连同补齐。"""
        return sum(part.input_ids.numel() for part in self.split(batch))

    def _shrink(self, batch: Batch, reason: str) -> None:
        rows = min(len(batch.lengths), self.max_rows or len(batch.lengths))
        if rows == 1:
            raise UserError(
                f"一段 {batch.input_ids.size(1)} 个 token 的对话也放不下（{reason}）："
                "请减小 --max_len、换小一些的模型，或加 --gradient_checkpointing"
            )
        self.max_rows = (rows + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory: max dialogues per forward=%d", self.max_rows)


def split_rows(
    lengths: Sequence[int], *, max_rows: int, max_padding: float, min_padding: int = 0
) -> list[tuple[int, int]]:
    """把一个窗口分成几次前向：先按 max_rows 切，补齐仍太多的再对半切，每份按自己的最长补齐。

    对话按长度排好，只有最长的几个窗口里长短悬殊，所以几乎不增加前向的次数。

    Args:
        lengths: 每段对话的 token 数，可为 0（多进程时的占位）。
        max_rows: 一次前向最多的对话数。
        max_padding: 补齐占的比例超过它才对半切，0 到 1；切出来的不少于 MIN_ROWS 段。
        min_padding: 补齐的位置不到这么多个也不切。

    Returns:
        各次前向的首尾 ``(start, stop)``，依次盖住所有对话。
    """
    parts = []
    waiting = [(i, min(i + max_rows, len(lengths))) for i in range(0, len(lengths), max_rows)]
    while waiting:
        start, stop = waiting.pop(0)
        width = max(lengths[start:stop])
        num_padding = width * (stop - start) - sum(lengths[start:stop])
        middle = (start + stop) // 2
        is_padded = num_padding > max(min_padding, max_padding * width * (stop - start))
        if middle - start >= MIN_ROWS and is_padded:
            waiting[:0] = [(start, middle), (middle, stop)]
        else:
            parts.append((start, stop))
    return parts
