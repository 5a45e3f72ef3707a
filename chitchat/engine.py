"""推理引擎：只为生成而写的 GPT-2，权重预先打包，缓存预先分配，每个 token 只做非做不可的事。

与 transformers 的 GPT2LMHeadModel 算同一个函数，CPU 与 GPU 通用；不导入 transformers。

形状记号: B 批大小   T 本次送入的 token 数   S 缓存里已有的位置数   L 层数   C 隐藏宽度
          H 头数   D 每头宽度   V 词表大小   I、O 线性层的输入、输出宽度
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, List, Optional  # noqa: UP035  TorchScript 只认这种写法

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from chitchat.runtime import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), lambda: nn.GELU(approximate="tanh")
    ),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
PRECISIONS = ("auto", "fp32", "bf16", "int8")
# 一次只算一行时瓶颈是读内存：线程再多，分到的一份还抵不上一次同步。
MAX_THREADS = 8


def choose_precision(precision: str, device: torch.device) -> str:
    """把 ``auto`` 变成具体的精度：CPU 上 int8，GPU 上 bf16。

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
    return "bf16"


class DenseLinear(nn.Module):
    """不量化的线性层。"""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """记下权重 (O, I) 和偏置 (O,)。"""
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """计算 ``x @ weight.T + bias``，形状 (B, T, I) 变成 (B, T, O)。"""
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """int8 权重、int8 激活的线性层：权重每个输出一个尺度，激活每行一个尺度，输入输出是 float32。

    激活按行量化，所以一行的结果与同批的其他行无关，成批生成与单独生成一致。
    整数乘加用 torch 自带的 fbgemm；换一种打包格式只需改这一个类。
    """

    # 没有 VNNI 的 CPU 把两个 u8×s8 的积加成 int16：激活只用 7 位（1 至 127）才不会溢出。
    zero_point = 64
    limit = 63
    tiny = 1e-12  # 全零的行不能除以零
    __constants__ = ("zero_point", "limit", "tiny")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """量化并打包权重 (O, I) 和偏置 (O,)；之后不再引用 weight。"""
        super().__init__()
        num_outputs = weight.size(0)
        self.register_buffer("bias", bias)
        scales = weight.abs().amax(dim=1).clamp_min(self.tiny).double() / 127
        zero_points = torch.zeros(num_outputs, dtype=torch.long)
        with warnings.catch_warnings():
            # torch 打算改在 torchao 里做量化，那里还没有能替代 fbgemm 的 CPU 内核。
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
        torch.backends.quantized.engine = "fbgemm"
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)

    def forward(self, x: Tensor) -> Tensor:
        """计算 ``x @ weight.T + bias``，形状 (B, T, I) 变成 (B, T, O)。"""
        if x.numel() == x.size(-1):
            low, high = x.aminmax()
            peak = max(max(-float(low), float(high)), self.tiny)
            return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                x, peak / self.limit, self.zero_point, self.packed
            )
        peaks = x.abs().amax(dim=[-1], keepdim=True).clamp_min_(self.tiny)  # (B, T, 1)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / peaks, 1 / self.limit, self.zero_point, self.packed
        )
        # y = Wx/peaks + bias，所以 bias + peaks · (y - bias) = Wx + bias。
        return torch.lerp(self.bias, y, peaks)


class Block(nn.Module):
    """一层 Transformer。"""

    def __init__(
        self, norms: tuple[nn.Module, nn.Module], linears: list[nn.Module],
        activation: nn.Module, num_heads: int,
    ) -> None:  # fmt: skip
        """linears 依次是注意力的输入、输出和 MLP 的输入、输出；注意力的缩放已乘进 query 的权重。"""
        super().__init__()
        self.norm_1, self.norm_2 = norms
        self.attention_in, self.attention_out, self.mlp_in, self.mlp_out = linears
        self.activation = activation
        self.num_heads = num_heads

    def forward(self, x: Tensor, slot: Tensor, window: Tensor, mask: Optional[Tensor]) -> Tensor:  # noqa: UP045
        """送入 T 个新 token 的隐藏状态 (B, T, C)，形状不变。

        Args:
            x: 隐藏状态。
            slot: 缓存里属于新 token 的部分，会被填入，形状 (2, B, H, T, D)。
            window: 缓存里看得到的部分，末尾就是 slot，形状 (2, B, H, S+T, D)。
            mask: 加到注意力分数上，形状 (B, 1, T, S+T)；None 是因果的。
        """
        batch_size, num_tokens, _ = x.shape
        qkv = self.attention_in(self.norm_1(x)).view(batch_size, num_tokens, 3, self.num_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        slot.copy_(qkv[1:])
        queries, keys, values = qkv[0], window[0], window[1]
        if num_tokens > 1:
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=1.0
            ).transpose(1, 2)  # (B, T, H, D)
        else:
            # 只有一个 query 时，CPU 上两次 bmm 比 scaled_dot_product_attention 快。
            rows = batch_size * self.num_heads
            scores = torch.bmm(queries.reshape(rows, 1, -1), keys.flatten(0, 1).transpose(1, 2))
            if mask is not None:
                scores = (scores.view(batch_size, self.num_heads, 1, -1) + mask).view(rows, 1, -1)
            attended = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))  # (B·H, 1, D)
        x = x + self.attention_out(attended.reshape(x.shape))
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm_2(x))))


class Blocks(nn.Module):
    """全部的层和最后的归一化。"""

    def __init__(self, blocks: list[Block], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(
        self, x: Tensor, slots: List[Tensor], windows: List[Tensor], mask: Optional[Tensor]  # noqa: UP006, UP045
    ) -> Tensor:  # fmt: skip
        """各参数同 Block，slots 与 windows 每层一个；返回 (B, T, C)。"""
        for i, block in enumerate(self.blocks):
            x = block(x, slots[i], windows[i], mask)
        return self.norm(x)


def to_torchscript(module: nn.Module) -> nn.Module:
    """变成 TorchScript：每个 token 几百个小算子不再经过 Python，CPU 上省下三分之一的时间。

    不需要编译器。哪个版本的 Python 或 torch 不再支持它，就原样返回，结果相同，只是慢些。
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 建议改用 torch.compile，它要用户装有 C++ 编译器
        try:
            return torch.jit.script(module)
        except (RuntimeError, NotImplementedError, OSError, TypeError):
            return module


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
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.device = torch.device(device)
        self.n_positions: int = config["n_positions"]
        self._num_heads: int = config["n_head"]
        self._head_width: int = config["n_embd"] // config["n_head"]
        make_linear = Int8Linear if precision == "int8" else DenseLinear

        def get(name: str) -> Tensor:
            key = f"transformer.{name}" if f"transformer.{name}" in weights else name
            return weights[key].detach().to(self.device, dtype)

        def norm(name: str) -> nn.Module:
            layer = nn.LayerNorm(config["n_embd"], config.get("layer_norm_epsilon", 1e-5))
            layer.weight = nn.Parameter(get(f"{name}.weight"), requires_grad=False)
            layer.bias = nn.Parameter(get(f"{name}.bias"), requires_grad=False)
            return layer

        def linear(name: str, query_scale: float = 1.0) -> nn.Module:
            # GPT-2 的 Conv1D 把权重存成 (I, O)。
            weight, bias = get(f"{name}.weight").T.clone(), get(f"{name}.bias").clone()
            # 注意力分数的缩放预先乘进产生 query 的前 C 行。
            weight[: config["n_embd"]] *= query_scale
            bias[: config["n_embd"]] *= query_scale
            return make_linear(weight, bias)

        def block(i: int) -> Block:
            linears = [
                linear(f"h.{i}.attn.c_attn", query_scale=self._attention_scale(config, i)),
                *(linear(f"h.{i}.{part}") for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
            ]
            norms = norm(f"h.{i}.ln_1"), norm(f"h.{i}.ln_2")
            return Block(norms, linears, _activation(config), self._num_heads)

        self._token_embedding = get("wte.weight")  # (V, C)
        self._position_embedding = get("wpe.weight")  # (n_positions, C)
        self._num_layers: int = config["n_layer"]
        blocks = Blocks([block(i) for i in range(self._num_layers)], norm("ln_f")).eval()
        self._blocks = to_torchscript(blocks) if self.device.type == "cpu" else blocks
        head = get("lm_head.weight" if "lm_head.weight" in weights else "wte.weight")
        self._head = make_linear(head, head.new_zeros(head.size(0)))

    @property
    def vocab_size(self) -> int:
        """词表大小 V。"""
        return self._token_embedding.size(0)

    def _attention_scale(self, config: Mapping[str, Any], layer: int) -> float:
        scale = self._head_width**-0.5 if config.get("scale_attn_weights", True) else 1.0
        return scale / (layer + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1)

    def new_cache(self, batch_size: int, max_tokens: int) -> KeyValueCache:
        """分配空的缓存，放得下 batch_size 行、每行 max_tokens 个位置。"""
        shape = (2, batch_size, self._num_heads, max_tokens, self._head_width)
        return KeyValueCache(self._token_embedding.new_empty(self._num_layers, *shape))

    @torch.inference_mode()
    def hidden(
        self,
        input_ids: Tensor,
        cache: KeyValueCache,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """送入新的 token，填好缓存，给出它们的隐藏状态。

        Args:
            input_ids: 形状 (B, T)；缓存非空时 T 必须是 1。
            cache: 会被填入 T 个位置。
            positions: 位置编号，形状 (B, T)；默认接着缓存往后数。
            mask: 加到注意力分数上，形状 (B, 1, T, S+T)，看不见处是 -inf；默认是因果的。

        Returns:
            最后一层归一化之后的隐藏状态，形状 (B, T, C)。
        """
        start, end = cache.length, cache.length + input_ids.size(1)
        if positions is None:
            position_embedding = self._position_embedding[start:end]
        else:
            position_embedding = self._position_embedding[positions]
        x = F.embedding(input_ids, self._token_embedding) + position_embedding  # (B, T, C)
        slots = list(cache.data[..., start:end, :].unbind(0))
        windows = list(cache.data[..., :end, :].unbind(0))
        cache.length = end
        return self._blocks(x, slots, windows, mask)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """下一个 token 的分数：隐藏状态 (..., C) 变成 float32 的 (..., V)。"""
        return self._head(hidden).float()


def _check_config(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """确认 config.json 的数目与权重的形状一致。"""
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


def _activation(config: Mapping[str, Any]) -> nn.Module:
    """config.json 所说的激活函数。"""
    name = config.get("activation_function", "gelu_new")
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json 的 activation_function 是 {name}，只支持 {'、'.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]()
