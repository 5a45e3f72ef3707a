"""训练状态的文件：走到了哪里，续训时不能变的是什么，读回来时怎样核对。"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from chitchat.errors import UserError
from chitchat.tokens.token_table import TokenTable
from chitchat.tokens.tokenizer import vocab_text
from chitchat.training.meters import TokenAverage
from chitchat.training.processes import Processes

logger = logging.getLogger(__name__)

STATE_NAME = "training_state.pt"
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


def find_state(path: Path, identity: dict, processes: Processes) -> dict | None:
    """读训练状态，没有时是 None；只有主进程读文件，别的机器上不必有它。参数同 load_state。"""
    state = processes.share(lambda: load_state(path, identity) if path.is_file() else None)
    if state is None:
        logger.info("resume: no %s, starting afresh", path)
    return state


def load_state(path: Path, identity: dict) -> dict:
    """读训练状态，并确认这次的选项与上次相同。

    Args:
        path: Run.save_state 写的文件。
        identity: 续训时不能变的选项和指纹；值是 ``auto`` 的，存下的是什么都行。

    Raises:
        UserError: 文件损坏，或不能变的选项变了（指出是哪一个）。
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["identity"])
        is_whole = set(state) == {*STATE_KEYS, "identity"} and set(saved) == set(identity)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # 文件坏在哪里，torch 抛出的异常就各种各样
        raise UserError(f"训练状态 {path} 已损坏：请删去它，去掉 --resume 重新训练") from error
    if not is_whole:
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
    return state
