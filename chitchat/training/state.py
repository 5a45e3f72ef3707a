"""训练状态的文件：走到了哪里，续训时不能变的是什么，读回来时怎样核对。"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel

from chitchat.cli import notify
from chitchat.errors import UserError
from chitchat.tokens.token_table import TokenTable
from chitchat.tokens.tokenizer import vocab_text
from chitchat.training.meters import TokenAverage
from chitchat.training.processes import Processes

logger = logging.getLogger(__name__)

STATE_NAME = "training_state.pt"
PREVIOUS_NAME = "training_state.previous.pt"  # 上一次存下的；最新的坏了，就从它接着走
DAMAGED_NAME = "training_state.damaged.pt"
STATE_KEYS = ("progress", "model", "updater", "random_states")


@dataclass
class Progress:
    """训练走到了哪里。

    Attributes:
        epoch: 正在进行的轮，从 0 开始。
        window: 本轮已经训练的窗口数。
        step: 参数更新的总次数。
        average: 本轮到目前为止的累计。
        best_loss: 最低的验证 loss，轮中的也算。
        num_bad_epochs: 验证 loss 连续没有变好的轮数。
        is_better: 本轮里验证 loss 有没有变好过。
        validated_step: 上一次轮中验证是在第几步之后。
        train_losses: 已完成各轮的训练 loss。
        val_losses: 已完成各轮的验证 loss。
    """

    epoch: int = 0
    window: int = 0
    step: int = 0
    average: TokenAverage = field(default_factory=TokenAverage)
    best_loss: float = math.inf
    num_bad_epochs: int = 0
    is_better: bool = False
    validated_step: int = 0
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)

    def advance(self) -> None:
        """又做完了一个窗口。"""
        self.window += 1
        self.step += 1

    def is_validation_due(self, eval_steps: int) -> bool:
        """每 eval_steps 步验证一次的话，现在是不是该验证；eval_steps 为 0 表示从不。"""
        is_multiple = eval_steps > 0 and self.step % eval_steps == 0
        return is_multiple and self.validated_step != self.step

    def record_validation(self, val_loss: float) -> bool:
        """记下一次验证的 loss，返回它是不是目前最低的。"""
        is_best = val_loss < self.best_loss
        self.best_loss = min(self.best_loss, val_loss)
        self.is_better |= is_best
        self.validated_step = self.step
        return is_best

    def finish_epoch(self, val_loss: float) -> bool:
        """记下一轮的结果，转到下一轮的开头；返回验证 loss 是不是目前最低的。"""
        is_best = self.record_validation(val_loss)
        self.num_bad_epochs = 0 if self.is_better else self.num_bad_epochs + 1
        self.is_better = False
        self.train_losses.append(self.average.loss)
        self.val_losses.append(val_loss)
        self.epoch += 1
        self.window = 0
        self.average = TokenAverage()
        return is_best

    def should_stop(self, patience: int) -> bool:
        """是否已经连续 patience 轮没有变好；patience 为 0 表示从不。"""
        return 0 < patience <= self.num_bad_epochs

    @classmethod
    def from_dict(cls, saved: dict) -> Progress:
        """由 dataclasses.asdict 的结果恢复。"""
        return cls(**{**saved, "average": TokenAverage(**saved["average"])})


def fingerprint(table: TokenTable, tokenizer: Tokenizer, model: GPT2LMHeadModel) -> dict[str, str]:
    """语料、词表、模型结构的指纹；续训时三者都不能变。"""
    corpus = hashlib.sha256(table.offsets.data)  # data 不复制：语料可能映射在内存里，有好几 GB
    corpus.update(table.tokens.data)
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name.startswith(("n_", "vocab_size", "activation", "layer_norm", "scale_attn"))
    }
    texts = {
        "vocab_path": vocab_text(tokenizer),
        "model_config": json.dumps(config, sort_keys=True),
    }
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {"train_path": corpus.hexdigest(), **hashes}


class DamagedStateError(Exception):
    """训练状态的文件坏了，读不出来；内容是哪个文件。"""


def find_state(folder: Path, identity: dict, processes: Processes) -> dict | None:
    """读最新的完好的训练状态，没有时是 None；只有主进程读文件，别的机器上不必有它。

    最新的坏了，就改名留在一边，从前一次存下的接着走，并告诉用户。

    Args:
        folder: 训练状态所在的文件夹。
        identity: 续训时不能变的选项和指纹；值是 ``auto`` 的，存下的是什么都行。
        processes: 进程分工。

    Raises:
        UserError: 文件都坏了，或不能变的选项变了（指出是哪一个）。
    """
    state = processes.share(lambda: _load_newest(folder, identity))
    if state is None:
        logger.info("resume: no %s, starting afresh", folder / STATE_NAME)
    return state


def _load_newest(folder: Path, identity: dict) -> dict | None:
    newest = Path(os.path.realpath(folder / STATE_NAME))  # 可以是链接；前一次的在它所指的那边
    previous = newest.with_name(PREVIOUS_NAME)
    damaged = []
    for path in (newest, previous):
        if not path.is_file():
            continue
        try:
            state = read_state(path)
        except DamagedStateError:
            damaged.append(path)
            continue
        check_identity(path, state["identity"], identity)
        if path == previous and damaged:
            aside = newest.with_name(DAMAGED_NAME)
            newest.replace(aside)  # 不然下一次存的时候，它会盖住完好的这一份
            notify(f"训练状态 {newest} 已损坏，改名为 {aside.name}；从前一次存下的 {path} 接着训练")
        elif path == previous:
            notify(f"没有 {newest}，从前一次存下的 {path} 接着训练")
        return state
    if damaged:
        raise UserError(
            f"训练状态 {'、'.join(map(str, damaged))} 已损坏："
            "请删去，去掉 --resume 重新训练；可用 --pretrained_model 从已有的检查点开始"
        )
    return None


def read_state(path: Path) -> dict:
    """读一个训练状态，核对校验和。

    Raises:
        DamagedStateError: 文件坏了。
        UserError: 不是这个版本写的。
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save 写的是 zip，每一项都有 CRC-32
            damaged = archive.testzip()
        if damaged:
            raise DamagedStateError(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        is_whole = set(state) == {*STATE_KEYS, "identity"}
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # 文件坏在哪里，抛出的异常就各种各样
        # zip 里的位置坏了，读的时候也是 OSError；真正的读盘错误有别的编号。
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DamagedStateError(path) from error
    if not is_whole:
        raise UserError(f"{path} 不是这个版本的训练状态：请删去它，去掉 --resume 重新训练")
    return state


def check_identity(path: Path, saved: object, identity: dict) -> None:
    """确认不能变的选项与上次相同；参数同 find_state。"""
    if not isinstance(saved, dict) or set(saved) != set(identity):
        raise UserError(f"{path} 不是这个版本的训练状态：请删去它，去掉 --resume 重新训练")
    for name, value in identity.items():
        if value not in (saved.get(name), "auto"):
            was = f"上次是 {saved.get(name)}，这次是 {value}"
            if name in ("train_path", "vocab_path", "model_config"):
                was = "内容与上次不同"
            raise UserError(
                f"不能接着 {path} 训练：--{name} {was}；请改回去，"
                "或去掉 --resume、换一个 --save_model_path 重新训练"
            )


def check_tensors(state: dict, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """确认权重和优化器里各个张量的形状与现在的模型一致：形状不对的，torch 会越界读写。

    Raises:
        UserError: 有一个不一致。
    """
    advice = "与这个模型不符，请删去文件夹里的 training_state*.pt，去掉 --resume 重新训练"
    try:
        found = {name: tensor.shape for name, tensor in state["model"].items()}
        saved = state["updater"]["optimizers"]
        is_same = found == {name: tensor.shape for name, tensor in model.state_dict().items()}
        is_same &= len(saved) == len(optimizers)
        for optimizer, own in zip(optimizers, saved, strict=False):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for index, values in own["state"].items():
                tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
                is_same &= all(t.ndim == 0 or t.shape == params[index].shape for t in tensors)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"训练状态里缺少东西（{error!r}）：{advice}") from error
    if not is_same:
        raise UserError(f"训练状态里张量的形状不对：{advice}")
