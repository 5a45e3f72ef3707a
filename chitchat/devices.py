"""设备与随机种子；torch 在用到时才导入。"""

from __future__ import annotations

import os
import random
import re
from typing import TYPE_CHECKING

from chitchat.errors import UserError

if TYPE_CHECKING:
    import torch

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # 最后一个是 ARM 的


def select_devices(device: str, *, no_cuda: bool) -> list[torch.device]:
    """把 ``--device 0,1`` 变成设备列表；有 GPU 时，整个进程此后不用 cuDNN 的注意力。

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
    if advice := _find_mistake(device, numbers):
        raise UserError(f"--device {device!r} 不对：{advice}；只用 CPU 请加 --no_cuda")
    if no_cuda or not torch.cuda.is_available():
        return [torch.device("cpu")]
    # cuDNN 的注意力每遇到一种新形状都要先编译（H100 上约 0.1 秒），而对话的长短几乎每次都变。
    torch.backends.cuda.enable_cudnn_sdp(False)
    num_gpus = torch.cuda.device_count()
    missing = [number for number in numbers if int(number) >= num_gpus]
    if missing:
        is_hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        note = "（CUDA_VISIBLE_DEVICES 里的从 0 重新编号）" if is_hidden else ""
        raise UserError(
            f"--device 指定的 GPU {','.join(missing)} 不存在：本机有 {num_gpus} 块，"
            f"编号 0 到 {num_gpus - 1}{note}；"
            f"请改用 --device {num_gpus - 1}，只用 CPU 请加 --no_cuda"
        )
    return [torch.device("cuda", int(number)) for number in numbers]


def _find_mistake(device: str, numbers: list[str]) -> str:
    """--device 写错了什么、怎样改；没有错时是空的。"""
    if all(number.isascii() and number.isdecimal() for number in numbers):
        repeated = [n for i, n in enumerate(map(int, numbers)) if n in map(int, numbers[:i])]
        return f"GPU {repeated[0]} 写了不止一次，每块只写一次" if repeated else ""
    found = [str(int(number)) for number in re.findall(r"[0-9]+", device)]
    if not found or "-" in device:
        return "应为 GPU 的编号，例如 --device 0，两块是 --device 0,1"
    wanted = ",".join(dict.fromkeys(found))
    return f"应为 GPU 的编号，多块用英文逗号分隔，是不是想写 --device {wanted}"


def has_fast_bf16(device: torch.device) -> bool:
    """这个设备上 bf16 的矩阵乘法是不是比 fp32 的快。

    CPU 只看指令，不计时：同样的机器总是同样的答案，续训和各个进程才一致。
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities().get
    # 有 avx512_fp16 的至强（第四代起）靠 amx 算 bf16；虚拟机不给 amx 时，bf16 只有 fp32 的一半快。
    is_half_speed = has("avx512_fp16") and not has("amx_bf16")
    has_bf16 = any(has(name) for name in BF16_INSTRUCTIONS) and not is_half_speed
    # 有指令还不够：只有 oneDNN（mkldnn）的矩阵乘法会用它们。
    return has_bf16 and torch.backends.mkldnn.is_available()


def seed_everything(seed: int) -> None:
    """设定 Python、NumPy 和 torch（含全部 GPU）的随机种子。"""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
