"""训练状态：断点续训所需的一切，存成一个文件，从任何一刻接着训练。"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from chitchat.errors import UserError
from chitchat.files import atomic_file
from chitchat.tokens.token_table import TokenTable
from chitchat.tokens.tokenizer import vocab_text
from chitchat.training.meters import EarlyStopping, TokenAverage
from chitchat.training.processes import Processes
from chitchat.training.updater import Updater

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
        best_loss: 最低的验证 loss。
        num_bad_epochs: 验证 loss 连续没有变好的轮数。
        train_losses: 已完成各轮的训练 loss。
        val_losses: 已完成各轮的验证 loss。
    """

    epoch: int = 0
    window: int = 0
    step: int = 0
    average: TokenAverage = field(default_factory=TokenAverage)
    best_loss: float = float("inf")
    num_bad_epochs: int = 0
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)

    def finish_epoch(
        self, average: TokenAverage, validation: TokenAverage, stopping: EarlyStopping
    ) -> None:
        """记下一轮的结果，转到下一轮的开头。"""
        self.train_losses.append(average.loss)
        self.val_losses.append(validation.loss)
        self.best_loss, self.num_bad_epochs = stopping.best_loss, stopping.num_bad_epochs
        self.epoch += 1
        self.window = 0
        self.average = TokenAverage()

    def early_stopping(self, patience: int) -> EarlyStopping:
        """由记下的数恢复早停的计数器。"""
        stopping = EarlyStopping(patience)
        stopping.best_loss, stopping.num_bad_epochs = self.best_loss, self.num_bad_epochs
        return stopping


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


def save_state(
    path: Path,
    *,
    model: GPT2LMHeadModel,
    updater: Updater,
    progress: Progress,
    identity: dict,
    processes: Processes,
    device: torch.device,
) -> None:
    """存下训练状态，整个出现或不出现；所有进程都要调用，由主进程写。

    Args:
        path: 目标文件。
        model: 未包装的模型。
        updater: 优化器、学习率曲线等的状态由它给出。
        progress: 走到了哪里。
        identity: 续训时不能变的选项和指纹。
        processes: 进程分工。
        device: 本进程的设备，随机状态取自 CPU 和它。
    """
    random_states = processes.gather(_random_state(device))
    if not processes.is_main:
        return
    state = {
        "identity": identity,
        "progress": asdict(progress),
        "model": model.state_dict(),
        "updater": updater.state_dict(),
        "random_states": random_states,
    }
    with atomic_file(path) as partial:
        torch.save(state, partial)


def find_state(path: Path, identity: dict, processes: Processes) -> dict | None:
    """读训练状态，没有时是 None；只有主进程读文件，别的机器上不必有它。参数同 load_state。"""
    state = processes.share(lambda: load_state(path, identity) if path.is_file() else None)
    if state is None:
        logger.info("resume: no %s, starting afresh", path)
    return state


def set_aside(path: Path) -> None:
    """从头训练时，把上一次训练的状态改名：这一次还没存下状态就中断的话，不能接到它上面去。"""
    if path.is_file():
        names = (path.with_suffix(f".old{i}{path.suffix}") for i in itertools.count(1))
        old = next(name for name in names if not name.exists())
        path.rename(old)
        logger.info("training state of an earlier run is now %s", old)


def load_state(path: Path, identity: dict) -> dict:
    """读训练状态，并确认这次的选项与上次相同。

    Args:
        path: save_state 写的文件。
        identity: 同 save_state；precision 是 ``auto`` 时存下的是什么都行。

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
        is_free = (name, value) == ("precision", "auto")
        if saved.get(name) != value and not is_free:
            was = f"上次是 {saved.get(name)}，这次是 {value}"
            if name in ("train_path", "vocab_path", "model_config"):
                was = "内容与上次不同"
            raise UserError(
                f"不能接着 {path} 训练：--{name} {was}；请改回去，"
                "或去掉 --resume、换一个 --save_model_path 重新训练"
            )
    return state


def restore_state(
    state: dict,
    *,
    model: GPT2LMHeadModel,
    updater: Updater,
    processes: Processes,
    device: torch.device,
    peak_lr: float | None = None,
) -> Progress:
    """把 load_state 读到的状态放回模型、优化器和随机数发生器，返回走到了哪里。

    peak_lr 是新的学习率峰值，None 表示不变。
    """
    model.load_state_dict(state["model"])
    updater.load_state_dict(state["updater"], peak_lr=peak_lr)
    if len(state["random_states"]) == processes.world_size:
        own = state["random_states"][processes.rank]
        torch.set_rng_state(own["cpu"])
        if device.type == "cuda" and own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"], device)
    saved = dict(state["progress"])
    progress = Progress(**{**saved, "average": TokenAverage(**saved["average"])})
    logger.info("resume: epoch=%d step=%d", progress.epoch + 1, progress.step)
    return progress


def _random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
