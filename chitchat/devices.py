"""设备与随机种子；torch 在用到时才导入。"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from chitchat.errors import UserError

if TYPE_CHECKING:
    import torch


def select_devices(device: str, *, no_cuda: bool) -> list[torch.device]:
    """把 ``--device 0,1`` 变成设备列表。

    Args:
        device: 逗号分隔的 GPU 编号，第一个是主卡。
        no_cuda: True 时总是用 CPU。

    Returns:
        至少一个设备；没有可用的 CUDA 时是 ``[cpu]``。

    Raises:
        UserError: 写法不对、编号重复，或本机没有这个编号的 GPU。
    """
    import torch

    numbers = [part.strip() for part in device.split(",")]
    is_valid = all(number.isascii() and number.isdecimal() for number in numbers)
    if not is_valid or len({int(number) for number in numbers}) < len(numbers):
        raise UserError(
            f"--device 应为逗号分隔且不重复的 GPU 编号（如 0 或 0,1），得到 {device!r}；"
            "只用 CPU 请加 --no_cuda"
        )
    if no_cuda or not torch.cuda.is_available():
        return [torch.device("cpu")]
    num_gpus = torch.cuda.device_count()
    missing = [number for number in numbers if int(number) >= num_gpus]
    if missing:
        raise UserError(
            f"--device 指定的 GPU {','.join(missing)} 不存在：本机有 {num_gpus} 块，"
            f"编号 0 到 {num_gpus - 1}；只用 CPU 请加 --no_cuda"
        )
    return [torch.device("cuda", int(number)) for number in numbers]


def seed_everything(seed: int) -> None:
    """设定 Python、NumPy 和 torch（含全部 GPU）的随机种子。"""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
