"""采样的旋钮：命令行参数、/set、服务器的请求共用同一张表。本模块不加载 torch。"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Knob:
    """一个采样旋钮：命令行参数、/set、服务器的请求和网页的滑块都照它来。

    Attributes:
        name: 命令行参数和 /set 里的名字。
        field: SamplingOptions 的字段名，也是请求里的名字。
        kind: ``int`` 或 ``float``。
        description: 说明。
        minimum: 最小值（含），None 表示不限。
        above: 必须大于的值（不含），None 表示不限。
        maximum: 最大值（含），None 表示不限。
    """

    name: str
    field: str
    kind: type[int] | type[float]
    description: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None

    @property
    def default(self) -> float:
        """没有指定时的值。"""
        return getattr(SamplingOptions, self.field)

    @property
    def parse(self) -> Callable[[str], float]:
        """由文字得到值的函数，是 argparse 的 ``type=``；不合法时抛出 ArgumentTypeError。"""
        limits = {"minimum": self.minimum, "above": self.above, "maximum": self.maximum}
        return bounded(self.kind, **limits)

    def read(self, value: object) -> float:
        """由文字或 JSON 里的数得到值；不合法时抛出 UserError。"""
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise argparse.ArgumentTypeError(f"应为数，得到 {value!r}")
            is_whole = self.kind is int and isinstance(value, float) and value.is_integer()
            return self.parse(str(int(value) if is_whole else value))
        except argparse.ArgumentTypeError as error:
            raise UserError(str(error)) from None


_ALL = (
    Knob("temperature", "temperature", float, "采样温度，越小越保守", above=0),
    Knob("topk", "top_k", int, "只从最可能的 K 个 token 中采样，0 表示不限", minimum=0),
    Knob("topp", "top_p", float, "只从累计概率达到 P 的最可能的 token 中采样，0 表示不限",
         minimum=0, maximum=1),
    Knob("min_p", "min_p", float, "只从概率不小于最大概率 P 倍的 token 中采样，0 表示不限",
         minimum=0, maximum=1),
    Knob("repetition_penalty", "repetition_penalty", float,
         "对本轮回复里已有 token 的惩罚，1 表示不惩罚", above=0),
    Knob("no_repeat_ngram_size", "no_repeat_ngram_size", int,
         "本轮回复里不重复连续 N 个 token，0 表示不限", minimum=0),
    Knob("max_len", "max_len", int, "每句回复最多的 token 数", minimum=1),
    Knob("max_history_len", "max_history_len", int, "上下文里最多的历史句数，双方合计", minimum=1),
)  # fmt: skip
KNOBS = {knob.name: knob for knob in _ALL}


def check_max_len(max_len: int, n_positions: int) -> None:
    """确认回复之外至少还放得下 [CLS]、一个 token 和 [SEP]，否则给出怎样改的一句话。"""
    most = n_positions - 3
    if max_len > most:
        raise UserError(
            f"max_len {max_len} 太大：模型只有 {n_positions} 个位置，回复最多 {most} 个 token"
        )
