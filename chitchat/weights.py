"""模型文件夹里的权重文件：认出根本不是权重的，读懂别的程序存下的样子。不导入 transformers。"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chitchat.errors import UserError
from chitchat.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

# DataParallel、torch.compile 和训练框架给每个名字加上的
WRAPPERS = ("module.", "_orig_mod.", "model.")
NESTS = ("state_dict", "model_state_dict", "model")
AGAIN = "请从原处重新下载或复制"
# config.json 的字段 → 由哪个权重的哪一维看出它
DIMENSIONS = {
    "n_embd": ("wpe.weight", 1),
    "vocab_size": ("wte.weight", 0),
    "n_positions": ("wpe.weight", 0),
    "n_inner": ("h.0.mlp.c_fc.weight", 1),
}


def check_weight_files(directory: Path) -> None:
    """文件夹里会被读的权重都要完整。

    Raises:
        UserError: 有一个是 Git LFS 的指针、网页、空的、没传完的，或别的东西；或缺了几片。
    """
    _check_shards(directory)
    for path in _weight_files(directory):
        with path.open("rb") as file:
            head = file.read(512)
        if not head:
            raise UserError(f"{path} 是空文件：{AGAIN}")
        if head.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path} 是 Git LFS 的指针，不是权重：请在那个仓库里运行 git lfs pull，"
                "或从网页下载原文件"
            )
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            raise UserError(f"{path} 是一个网页，不是权重：下载时可能要登录，{AGAIN}")
        if path.suffix == ".safetensors":
            _read_shapes(path)
        elif head.startswith(b"PK"):
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path} 不完整，下载或复制时断了：{AGAIN}")
        elif not head.startswith(b"\x80"):
            raise UserError(f"{path} 不是 torch 存下的权重：{AGAIN}")


def _check_shards(directory: Path) -> None:
    """分成好几片的权重，目录里列出的每一片都要在。"""
    for path in sorted(directory.glob("*.index.json")):
        try:
            names = set(parse_json(path.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in names if not (directory / name).is_file())
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} 已损坏，看不出权重分成了哪几片：{AGAIN}") from None
        if missing:
            raise UserError(
                f"{directory} 的权重分成 {len(names)} 片，缺少 {missing[0]} 等 {len(missing)} 片："
                f"{AGAIN}"
            )


def read_weights(directory: Path) -> dict[str, Tensor] | None:
    """读出 pytorch_model.bin，或名字带着 ``module.`` 之类前缀的 safetensors。

    Returns:
        标准的名字 → 张量；safetensors 本来就标准，或分成好几个文件时是 None，由 transformers 去读。

    Raises:
        UserError: 文件读不出，或里面没有权重。
    """
    path, *others = _weight_files(directory)
    if others:
        return None
    if path.suffix == ".safetensors":
        if not any(name.startswith(WRAPPERS) for name in _read_shapes(path)):
            return None
        from safetensors.torch import load_file

        return unwrap(load_file(path))
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} 已损坏，读不出权重：{AGAIN}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} 里除了张量还有别的对象，为安全起见不读：请用原来的程序只存下 state_dict"
        ) from error
    weights = unwrap(state) if isinstance(state, Mapping) else {}
    if not weights:
        raise UserError(f"{path} 里没有权重：应是 state_dict，即名字到张量的字典")
    return weights


def unwrap(state: Mapping[str, object]) -> dict[str, Tensor]:
    """取出训练字典里的 state_dict，去掉名字的前缀；不修改入参。"""
    import torch

    while nest := next((name for name in NESTS if isinstance(state.get(name), Mapping)), None):
        state = state[nest]
    weights = {}
    for name, value in state.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if isinstance(value, torch.Tensor):
            weights[name] = value
    return weights


def check_sizes(directory: Path, config: Mapping, weights: Mapping[str, Tensor] | None) -> None:
    """config.json 的各个大小要与权重的一致。

    Args:
        directory: 模型文件夹，供错误信息使用。
        config: config.json 的内容；没有写的字段不检查。
        weights: 标准的权重；None 表示由文件夹里的 safetensors 的头部看出。

    Raises:
        UserError: 有一个字段与权重不一致，或权重里一层也没有。
    """
    if weights is None:
        paths = [path for path in _weight_files(directory) if path.suffix == ".safetensors"]
        shapes = {name: shape for path in paths for name, shape in _read_shapes(path).items()}
    else:
        shapes = {name: weight.shape for name, weight in weights.items()}
    names = list(shapes)
    shapes = {name.removeprefix("transformer."): tuple(shape) for name, shape in shapes.items()}
    for field, (name, dimension) in DIMENSIONS.items():
        if isinstance(config.get(field), int) and len(shapes.get(name, ())) > dimension:
            _compare(directory, field, config[field], shapes[name][dimension])
    layers = [name.split(".")[1] for name in shapes if name.startswith("h.")]
    num_layers = max((int(layer) for layer in layers if layer.isdecimal()), default=-1) + 1
    if shapes and not num_layers:
        raise UserError(
            f"{directory} 的权重里没有 GPT-2 的层（h.0.attn.c_attn.weight 等），"
            f"只有 {min(names)} 等 {len(names)} 项："
            f"不是 GPT-2 的，或名字带着不认得的前缀；{AGAIN}"
        )
    if shapes and isinstance(config.get("n_layer"), int):
        _compare(directory, "n_layer", config["n_layer"], num_layers)


def gpt2_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """GPT-2 各个权重的名字和形状；名字不带 ``transformer.``，没有可以与词向量共用的 lm_head。

    Args:
        config: config.json 的内容；缺了要用的字段时抛 KeyError。
    """
    width = config["n_embd"]
    inner = config.get("n_inner") or 4 * width
    linears = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    norms = ["ln_f"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], width),
        "wpe.weight": (config["n_positions"], width),
    }
    for layer in range(config["n_layer"]):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, shape in linears.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = shape[1:]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    return shapes


def is_complete(config: Mapping, weights: Mapping[str, Tensor]) -> bool:
    """各个权重都在，形状也对；名字带不带 ``transformer.`` 都行。"""
    found = {name.removeprefix("transformer."): tuple(w.shape) for name, w in weights.items()}
    return gpt2_shapes(config).items() <= found.items()


def _compare(directory: Path, field: str, wanted: int, found: int) -> None:
    if wanted != found:
        raise UserError(
            f"{directory} 的 config.json 与权重不符：{field} 写的是 {wanted}，权重里是 {found}；"
            f"训练之后不能改它，请改回 {found}"
        )


def _weight_files(directory: Path) -> list[Path]:
    """会被读的权重文件；两种都有时 transformers 只读 safetensors。"""
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    return next((files for p in patterns if (files := sorted(directory.glob(p)))), [])


def _read_shapes(path: Path) -> dict[str, Sequence[int]]:
    """由 safetensors 的头部读出各个权重的形状，确认文件没有断。"""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length)) if length <= size - 8 else {}
        header.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in header.values())
        shapes = {name: entry["shape"] for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        end, shapes = -1, {}
    if 8 + length + end != size:
        raise UserError(f"{path} 不完整或不是 safetensors 文件，下载或复制时断了：{AGAIN}")
    return shapes
