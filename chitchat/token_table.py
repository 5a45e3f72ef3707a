"""token 表：全部对话的 token id，以及 train.pkl 的读写。

形状记号: D 对话总数   N token 总数
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chitchat.runtime import UserError, atomic_file


@dataclass(frozen=True)
class TokenTable:
    """全部对话的 token，首尾相接存成一个数组，比 list[list[int]] 省内存几十倍。

    Attributes:
        tokens: 形状 (N,)，无符号整数。
        offsets: 形状 (D+1,)，int64；第 i 段对话是 ``tokens[offsets[i]:offsets[i+1]]``。
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """每段对话的 token 数，形状 (D,)，int64。"""
        return np.diff(self.offsets)

    @classmethod
    def from_dialogues(cls, dialogues: Iterable[Sequence[int]]) -> TokenTable:
        """由 token id 列表的列表构造。"""
        rows = [np.asarray(token_ids, dtype=np.uint32) for token_ids in dialogues]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows) if rows else np.zeros(0, np.uint32), offsets)


class _ListUnpickler(pickle.Unpickler):
    """只认列表和整数的 Unpickler：train.pkl 里不需要任何类，有类就拒绝，代码不会被执行。"""

    def find_class(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"{module}.{name}")


def save_token_lists(path: Path, dialogues: list[list[int]]) -> None:
    """把 ``list[list[int]]`` 写成 train.pkl（pickle 协议 4），整个出现或不出现。"""
    with atomic_file(path) as partial, partial.open("wb") as file:
        pickle.dump(dialogues, file, protocol=4)


def load_token_table(path: Path, vocab_size: int) -> TokenTable:
    """读 train.pkl，检查内容，返回 token 表。

    Args:
        path: preprocess.py 生成的文件。
        vocab_size: 模型的词表大小，所有 token id 必须小于它。

    Raises:
        UserError: 文件不存在、不是 pickle、带有代码、不是 list[list[int]]、没有对话，或 id 越界。
    """
    advice = "请重新运行 python preprocess.py"
    if not path.is_file():
        raise UserError(
            f"找不到训练数据 {path}：请先运行 python preprocess.py，或用 --train_path 指定"
        )
    try:
        with path.open("rb") as file:
            dialogues = _ListUnpickler(file).load()
    except Exception as error:  # 损坏的 pickle 可以抛出任何异常
        raise UserError(
            f"{path} 不是可信的 train.pkl，没有读取：应当只含列表和整数，发现 {error}；{advice}"
        ) from error
    is_nested_list = isinstance(dialogues, list) and all(isinstance(row, list) for row in dialogues)
    if not is_nested_list or not all(type(token) is int for row in dialogues for token in row):
        raise UserError(f"{path} 的内容不是 list[list[int]]；{advice}")
    if not any(dialogues):
        raise UserError(f"{path} 里没有对话；请检查 preprocess.py 的 --train_path 指向的语料")
    smallest = min(min(row) for row in dialogues if row)
    largest = max(max(row) for row in dialogues if row)
    if smallest < 0 or largest >= vocab_size:
        raise UserError(
            f"{path} 里的 token id 从 {smallest} 到 {largest}，超出词表大小 {vocab_size}："
            "预处理和训练用的词表不同，请用同一个 --vocab_path 重新运行 python preprocess.py"
        )
    return TokenTable.from_dialogues(row for row in dialogues if row)
