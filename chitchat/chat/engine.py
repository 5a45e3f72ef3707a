"""推理引擎：只为生成而写的 GPT-2，权重预先打包，缓存预先分配，每个 token 只做非做不可的事。

与 transformers 的 GPT2LMHeadModel 算同一个函数，CPU 与 GPU 通用；不导入 transformers。

一次可以送入好几组：组内各行一样长、共用一份缓存，组与组之间长短不拘、各到各的位置。
一行的结果与同批有谁无关：int8 逐位如此；fp32、bf16 的矩阵乘法随行数换用不同的累加次序，
fp32 相差约 1e-6，bf16 相差约 1e-2，抽样因此可能走上另一条路。

形状记号: B 一组的行数   T 一组每行送入的 token 数   S 缓存里已有的位置数   N 各组 B·T 之和
          L 层数   C 隐藏宽度   H 头数   D 每头宽度   V 词表大小   I、O 线性层的输入、输出宽度
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from chitchat.chat.layers import (
    Block,
    Blocks,
    DenseLinear,
    Int8Linear,
    build_activation,
    to_torchscript,
)
from chitchat.errors import UserError

# 一次只算一行时瓶颈是读内存：线程再多，分到的一份还抵不上一次同步。
MAX_THREADS = 8


def choose_precision(precision: str, device: torch.device) -> str:
    """把 ``auto`` 变成具体的精度：CPU 上 int8；GPU 上 bf16，老 GPU 没有它，用 fp32。

    Raises:
        UserError: GPU 上要 int8，或这台机器的 torch 没有 int8 内核。
    """
    is_cpu = device.type == "cpu"
    has_int8 = bool({"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines))
    if precision == "int8" and not (is_cpu and has_int8):
        raise UserError(
            "--precision int8 只能在 x86 的 CPU 上用：请加 --no_cuda，或改用 --precision bf16"
        )
    if precision != "auto":
        return precision
    if is_cpu:
        return "int8" if has_int8 else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


class KeyValueCache:
    """一次生成所用的键和值，位置预先分配好，逐个填入。"""

    def __init__(self, data: Tensor, length: int = 0) -> None:
        """data 形状 (L, 2, B, H, 最多的位置数, D)；length 是已填的位置数。"""
        self.data = data
        self.length = length

    def select(self, rows: Tensor) -> KeyValueCache:
        """取出若干行（下标可重复，形状 (B',)），得到新的缓存。"""
        shape = list(self.data.shape)
        shape[2] = len(rows)
        picked = self.data.new_empty(shape)
        for new, old in zip(picked, self.data, strict=True):
            new[..., : self.length, :] = old[:, rows, :, : self.length]
        return KeyValueCache(picked, self.length)


class Engine:
    """打包好的模型。"""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        *,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        """由 config.json 的字段和 GPT2LMHeadModel 的权重建立。

        Args:
            config: GPT2Config 的字段。
            weights: 权重，键名与 GPT2LMHeadModel 的相同，可以没有 ``transformer.`` 前缀。
            precision: ``fp32``、``bf16`` 或 ``int8``。
            device: 放在哪个设备上。
        """
        _check_config(config, weights)
        self.device = torch.device(device)
        self.n_positions: int = config["n_positions"]
        self._num_layers: int = config["n_layer"]
        self._num_heads: int = config["n_head"]
        self._head_width: int = config["n_embd"] // config["n_head"]
        packer = _Packer(config, weights, precision=precision, device=self.device)
        self._token_embedding = packer.tensor("wte.weight")  # (V, C)
        self._position_embedding = packer.tensor("wpe.weight")  # (n_positions, C)
        blocks = Blocks([packer.block(i) for i in range(self._num_layers)], packer.norm("ln_f"))
        self._blocks = to_torchscript(blocks.eval()) if self.device.type == "cpu" else blocks.eval()
        self._head = packer.head()

    @property
    def vocab_size(self) -> int:
        """词表大小 V。"""
        return self._token_embedding.size(0)

    def new_cache(self, batch_size: int, max_tokens: int) -> KeyValueCache:
        """分配空的缓存，放得下 batch_size 行、每行 max_tokens 个位置。"""
        shape = (2, batch_size, self._num_heads, max_tokens, self._head_width)
        return KeyValueCache(self._token_embedding.new_empty(self._num_layers, *shape))

    def hidden(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """同 hidden_groups，只有一组：(B, T) 变成 (B, T, C)。"""
        return self.hidden_groups([(input_ids, cache)])[0]

    @torch.inference_mode()
    def hidden_groups(self, groups: Sequence[tuple[Tensor, KeyValueCache]]) -> list[Tensor]:
        """送入各组的新 token，填好缓存，给出它们的隐藏状态；各组的长短互不相干，没有补齐。

        线性层把全部的 token 当作一批，注意力每组各算各的，形状与单独算这一组时相同。

        Args:
            groups: 每组的 input_ids (B, T) 和缓存；接着缓存里已有的位置往后算，会被填入 T 个位置。

        Returns:
            每组最后一层归一化之后的隐藏状态，形状 (B, T, C)。
        """
        token_ids = torch.cat([input_ids.flatten() for input_ids, _ in groups])  # (N,)
        positions, slots, windows = [], [], []
        for input_ids, cache in groups:
            start, end = cache.length, cache.length + input_ids.size(1)
            embedding = self._position_embedding[start:end]
            positions.append(embedding.repeat(input_ids.size(0), 1))
            slots.append(cache.data[..., start:end, :].unbind(0))
            windows.append(cache.data[..., :end, :].unbind(0))
            cache.length = end
        x = F.embedding(token_ids, self._token_embedding) + torch.cat(positions)  # (N, C)
        x = self._blocks(x, [list(s) for s in zip(*slots, strict=True)],
                         [list(w) for w in zip(*windows, strict=True)])  # fmt: skip
        parts = x.split([input_ids.numel() for input_ids, _ in groups])
        return [part.view(*ids.shape, -1) for part, (ids, _) in zip(parts, groups, strict=True)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """下一个 token 的分数：隐藏状态 (..., C) 变成 float32 的 (..., V)。"""
        return self._head(hidden).float()


class _Packer:
    """把 GPT2LMHeadModel 的权重取出、打包成各层。"""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        *,
        precision: str,
        device: torch.device,
    ) -> None:
        self._config = config
        self._weights = weights
        self._make_linear = Int8Linear if precision == "int8" else DenseLinear
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._device = device

    def tensor(self, name: str) -> Tensor:
        key = f"transformer.{name}" if f"transformer.{name}" in self._weights else name
        return self._weights[key].detach().to(self._device, self._dtype)

    def norm(self, name: str) -> nn.LayerNorm:
        config = self._config
        layer = nn.LayerNorm(config["n_embd"], config.get("layer_norm_epsilon", 1e-5))
        layer.weight = nn.Parameter(self.tensor(f"{name}.weight"), requires_grad=False)
        layer.bias = nn.Parameter(self.tensor(f"{name}.bias"), requires_grad=False)
        return layer

    def block(self, i: int) -> Block:
        norms = self.norm(f"h.{i}.ln_1"), self.norm(f"h.{i}.ln_2")
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        # GPT-2 的 Conv1D 把权重存成 (I, O)。
        weights = [self.tensor(f"h.{i}.{name}.weight").T.clone() for name in names]
        biases = [self.tensor(f"h.{i}.{name}.bias").clone() for name in names]
        # 注意力分数的缩放预先乘进产生 query 的前 C 行。
        for attention_in in (weights[0], biases[0]):
            attention_in[: self._config["n_embd"]] *= self._attention_scale(i)
        linears = [self._make_linear(*pair) for pair in zip(weights, biases, strict=True)]
        return Block(norms, linears, build_activation(self._config), self._config["n_head"])

    def head(self) -> nn.Module:
        name = "lm_head.weight" if "lm_head.weight" in self._weights else "wte.weight"
        weight = self.tensor(name)
        return self._make_linear(weight, weight.new_zeros(weight.size(0)))

    def _attention_scale(self, layer: int) -> float:
        config = self._config
        is_scaled = config.get("scale_attn_weights", True)
        scale = (config["n_embd"] // config["n_head"]) ** -0.5 if is_scaled else 1.0
        return scale / (layer + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1)


def _check_config(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """确认 config.json 的数目与权重的形状一致，权重都是有限数。"""
    prefix = "transformer." if "transformer.wte.weight" in weights else ""
    width = weights[f"{prefix}wte.weight"].size(1)
    layers = {key.removeprefix(prefix).split(".")[1] for key in weights if ".h." in f".{key}"}
    found = {
        "n_positions": weights[f"{prefix}wpe.weight"].size(0),
        "n_embd": width,
        "n_layer": len(layers),
    }
    for name, value in found.items():
        if config.get(name) != value:
            raise UserError(
                f"config.json 的 {name} 是 {config.get(name)!r}，权重却是 {value}：请改成一致"
            )
    num_heads = config.get("n_head")
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise UserError(f"config.json 的 n_head 应能整除 n_embd {width}，得到 {num_heads!r}")
    for name, weight in weights.items():
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise UserError(f"权重 {name} 里有 NaN 或 Inf：训练时出了错，请换一个检查点")
