"""采样的旋钮：命令行参数、/set 和程序共用同一张表。本模块不加载 torch。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from chitchat.cli import bounded
from chitchat.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """采样的旋钮，名字与命令行参数的含义相同。

    Attributes:
        temperature: 大于 0；1 为原样，越小越保守。
        top_k: 只从概率最高的这么多个 token 中采样；0 表示不限。
        top_p: 只从累计概率达到它的最可能的 token 中采样；0 表示不限。
        min_p: 只从概率不小于最大概率的这么多倍的 token 中采样；0 表示不限。
        repetition_penalty: 大于 0；1 表示不惩罚，只看本轮回复已生成的 token。
        no_repeat_ngram_size: 本轮回复里不重复这么长的一串 token；0 表示不限。
        max_len: 回复最多的 token 数。
        max_history_len: 上下文里最多的历史句数，双方合计。
        greedy: True 时总取最可能的 token。
    """

    temperature: float = 1.0
    top_k: int = 8
    top_p: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_len: int = 25
    max_history_len: int = 3
    greedy: bool = False


class Knob(NamedTuple):
    """一个采样旋钮，命令行参数和 /set 共用。"""

    field: str  # SamplingOptions 的字段名
    parse: Callable[[str], float]
    description: str


KNOBS = {
    "temperature": Knob("temperature", bounded(float, above=0), "采样温度，越小越保守"),
    "topk": Knob("top_k", bounded(int, minimum=0), "只从最可能的 K 个 token 中采样，0 表示不限"),
    "topp": Knob(
        "top_p",
        bounded(float, minimum=0, maximum=1),
        "只从累计概率达到 P 的最可能的 token 中采样，0 表示不限",
    ),
    "min_p": Knob(
        "min_p",
        bounded(float, minimum=0, maximum=1),
        "只从概率不小于最大概率 P 倍的 token 中采样，0 表示不限",
    ),
    "repetition_penalty": Knob(
        "repetition_penalty", bounded(float, above=0), "对本轮回复里已有 token 的惩罚，1 表示不惩罚"
    ),
    "no_repeat_ngram_size": Knob(
        "no_repeat_ngram_size",
        bounded(int, minimum=0),
        "本轮回复里不重复连续 N 个 token，0 表示不限",
    ),
    "max_len": Knob("max_len", bounded(int, minimum=1), "每句回复最多的 token 数"),
    "max_history_len": Knob(
        "max_history_len", bounded(int, minimum=1), "上下文里最多的历史句数，双方合计"
    ),
}


def check_max_len(max_len: int, n_positions: int) -> None:
    """确认回复之外至少还放得下 [CLS]、一个 token 和 [SEP]，否则给出怎样改的一句话。"""
    most = n_positions - 3
    if max_len > most:
        raise UserError(
            f"max_len {max_len} 太大：模型只有 {n_positions} 个位置，回复最多 {most} 个 token"
        )
