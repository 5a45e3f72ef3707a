"""推理引擎的各层：线性层（int8 或不量化）、Transformer 的一层，以及把它们变成 TorchScript。

形状记号: B 一组的行数   T 一组每行送入的 token 数   S 缓存里已有的位置数   N 各组 B·T 之和
          C 隐藏宽度   H 头数   D 每头宽度   I、O 线性层的输入、输出宽度
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, List, Optional  # noqa: UP035  TorchScript 只认这种写法

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from chitchat.errors import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), lambda: nn.GELU(approximate="tanh")
    ),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


class DenseLinear(nn.Module):
    """不量化的线性层。"""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """记下权重 (O, I) 和偏置 (O,)。"""
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """计算 ``x @ weight.T + bias``，形状 (..., I) 变成 (..., O)。"""
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """int8 权重、int8 激活的线性层：权重每个输出一个尺度，激活每行一个尺度，输入输出是 float32。

    激活按行量化，整数乘加没有舍入，所以一行的结果与同批有几行逐位无关，成批生成与单独生成一致。
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
        """计算 ``x @ weight.T + bias``，形状 (..., I) 变成 (..., O)。"""
        peaks = x.abs().amax(dim=[-1], keepdim=True).clamp_min_(self.tiny)  # (..., 1)
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

    def forward(self, x: Tensor, slots: List[Tensor], windows: List[Tensor]) -> Tensor:  # noqa: UP006
        """送入各组新 token 的隐藏状态，形状不变。

        Args:
            x: 各组依次排开，形状 (N, C)，N 是各组 B·T 之和。
            slots: 每组缓存里属于新 token 的部分，会被填入，形状 (2, B, H, T, D)。
            windows: 每组缓存里看得到的部分，末尾就是 slot，形状 (2, B, H, S+T, D)。
        """
        qkv = self.attention_in(self.norm_1(x))  # (N, 3C)
        attended: List[Tensor] = []  # noqa: UP006
        start = 0
        for i, slot in enumerate(slots):
            batch_size, num_tokens = slot.size(1), slot.size(3)
            end = start + batch_size * num_tokens
            part = qkv[start:end].view(batch_size, num_tokens, 3, self.num_heads, -1)
            part = part.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            slot.copy_(part[1:])
            attended.append(attend(part[0], windows[i][0], windows[i][1]).reshape(end - start, -1))
            start = end
        x = x + self.attention_out(attended[0] if len(attended) == 1 else torch.cat(attended))
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm_2(x))))


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """因果注意力：最后 T 个位置的 query (B, H, T, D) 看各自和之前的键、值 (B, H, S+T, D)。

    Returns:
        形状 (B, T, H·D)；只有一个 query 时是 (B·H, 1, D)，元素的次序相同。
    """
    num_tokens, num_keys = queries.size(2), keys.size(2)
    if num_tokens == 1:
        # 只有一个 query 时，CPU 上两次 bmm 比 scaled_dot_product_attention 快。
        rows = queries.size(0) * queries.size(1)
        scores = torch.bmm(queries.reshape(rows, 1, -1), keys.flatten(0, 1).transpose(1, 2))
        return torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))
    mask: Optional[Tensor] = None  # noqa: UP045
    if num_keys > num_tokens:  # is_causal 只会从左上角对齐，缓存里已有的就看不全了
        visible = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=queries.device)
        mask = visible.tril(num_keys - num_tokens)
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=1.0
    )
    return attended.transpose(1, 2).flatten(2)


class Blocks(nn.Module):
    """全部的层和最后的归一化。"""

    def __init__(self, blocks: list[Block], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(
        self, x: Tensor, slots: List[List[Tensor]], windows: List[List[Tensor]]  # noqa: UP006
    ) -> Tensor:  # fmt: skip
        """各参数同 Block，slots 与 windows 每层一个列表；返回 (N, C)。"""
        for i, block in enumerate(self.blocks):
            x = block(x, slots[i], windows[i])
        return self.norm(x)


def to_torchscript(module: nn.Module) -> nn.Module:
    """变成 TorchScript：每个 token 几百个小算子不再经过 Python，CPU 上省下三分之一的时间。

    不需要编译器。哪个版本的 Python 或 torch 不再支持它，就原样返回，结果相同，只是慢些。
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 建议改用 torch.compile，它要用户装有 C++ 编译器
        try:
            return torch.jit.script(module)
        except (RuntimeError, OSError):
            return module


def build_activation(config: Mapping[str, Any]) -> nn.Module:
    """config.json 所说的激活函数。"""
    name = config.get("activation_function", "gelu_new")
    if name not in ACTIVATIONS:
        raise UserError(
            f"config.json 的 activation_function 是 {name}，只支持 {'、'.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]()
