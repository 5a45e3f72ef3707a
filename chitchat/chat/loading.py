"""模型文件夹 → 推理引擎。"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from chitchat.chat.engine import Engine
from chitchat.checkpoint import load_model
from chitchat.checksums import check_folder
from chitchat.cli import quiet_transformers
from chitchat.errors import UserError
from chitchat.files import parse_json
from chitchat.weights import check_sizes, is_complete


def load_engine(name_or_dir: str, *, precision: str, device: torch.device) -> Engine:
    """读模型并打包成推理引擎。

    标准的文件夹直接读 safetensors，不导入 transformers；其余的（pytorch_model.bin、分片、hub 上的
    名字、有毛病的文件夹）交给 load_model，由它读出或说明毛病。

    Args:
        name_or_dir: 与 load_model 相同。
        precision: ``fp32``、``bf16`` 或 ``int8``。
        device: 放在哪个设备上。

    Raises:
        UserError: 与 load_model 相同；或内存放不下，或引擎不支持它的结构。
    """
    parts = _read_standard_folder(Path(name_or_dir))
    if parts is None:
        quiet_transformers()
        model = load_model(name_or_dir)
        parts = model.config.to_dict(), model.state_dict()
    return _pack(name_or_dir, *parts, precision, device)


def _read_standard_folder(directory: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """config.json 和 model.safetensors 的内容；不是标准的 GPT-2 文件夹时是 None。"""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = parse_json((directory / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] != "gpt2":
            return None
        check_sizes(directory, config, None)
        check_folder(directory)
        weights = load_file(directory / "model.safetensors")
        return (config, weights) if is_complete(config, weights) else None
    except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _pack(
    name_or_dir: str, config: dict, weights: dict, precision: str, device: torch.device
) -> Engine:
    try:
        return Engine(config, weights, precision=precision, device=device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} 放不下模型 {name_or_dir}：请关掉别的程序，或加 --no_cuda 改用 CPU"
        ) from error
    except UserError as error:
        raise UserError(f"{name_or_dir}：{error}") from error
