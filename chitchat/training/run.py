"""一次训练：模型、更新器、走到了哪里，以及怎样存下、怎样接上。"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from chitchat.checkpoint import save_checkpoint
from chitchat.files import atomic_file
from chitchat.model_card import describe_model
from chitchat.training.plan import Plan
from chitchat.training.processes import Processes
from chitchat.training.state import PREVIOUS_NAME, STATE_NAME, Progress, check_tensors
from chitchat.training.updater import Updater

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """属于同一次训练的东西。

    Attributes:
        folder: 检查点和训练状态所在的文件夹。
        model: 未包装的模型。
        tokenizer: 训练所用的 tokenizer。
        plan: 开始时定下来的安排。
        updater: 做一次参数更新。
        identity: 续训时不能变的选项和指纹，随状态存下。
        progress: 走到了哪里。
        overview: 设定和语料的数目，见 overview。
    """

    folder: Path
    model: GPT2LMHeadModel
    tokenizer: Tokenizer
    plan: Plan
    updater: Updater
    identity: dict
    progress: Progress = field(default_factory=Progress)
    overview: dict[str, object] = field(default_factory=dict)

    @property
    def processes(self) -> Processes:
        """进程分工。"""
        return self.updater.processes

    def save_checkpoint(self, name: str) -> None:
        """以文件夹名存下现在的模型；只有主进程写。"""
        if not self.processes.is_main:
            return
        progress = self.progress
        card = describe_model(
            self.model.config.to_dict(), self.overview, progress.train_losses, progress.val_losses
        )
        save_checkpoint(self.folder / name, self.model, self.tokenizer, card=card)

    def save_state(self) -> None:
        """存下训练状态，整个出现或不出现；所有进程都要调用，由主进程写。"""
        random_states = self.processes.gather(_random_state(self.updater.device))
        if not self.processes.is_main:
            return
        state = {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "updater": self.updater.state_dict(),
            "random_states": random_states,
        }
        with atomic_file(self.folder / STATE_NAME, previous=PREVIOUS_NAME) as partial:
            torch.save(state, partial)

    def restore(self, state: dict, *, peak_lr: float | None = None) -> None:
        """把 find_state 读到的放回模型、优化器和随机数发生器，从那里接着走。

        Args:
            state: find_state 的结果。
            peak_lr: 新的学习率峰值，None 表示不变。
        """
        check_tensors(state, self.model, self.updater.optimizers)
        self.model.load_state_dict(state["model"])
        self.updater.load_state_dict(state["updater"], peak_lr=peak_lr)
        self.plan = replace(self.plan, lr=self.updater.peak_lr)
        device = self.updater.device
        if len(state["random_states"]) == self.processes.world_size:
            own = state["random_states"][self.processes.rank]
            torch.set_rng_state(own["cpu"])
            if device.type == "cuda" and own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"], device)
        self.progress = Progress.from_dict(state["progress"])
        logger.info("resume: epoch=%d step=%d", self.progress.epoch + 1, self.progress.step)


def overview(
    run: Run, loaders: tuple[DataLoader, DataLoader], devices: Sequence[torch.device]
) -> dict[str, object]:
    """这次训练的设定和语料的数目，开始时写进日志，也写进各个检查点的 README.md。"""
    train_loader, val_loader = loaders
    return {
        "num_params": run.model.num_parameters(),
        "train_dialogues": len(train_loader.dataset.indices),
        "val_dialogues": len(val_loader.dataset.indices),
        "train_tokens_per_epoch": int(train_loader.dataset.lengths.sum()),
        "dialogues_per_update": round(len(train_loader.dataset) / len(train_loader)),
        "updates": run.plan.total_steps,
        "optimizer": run.plan.optimizer,
        "peak_learning_rate": f"{run.plan.lr:g}",
        "warmup_steps": run.plan.warmup_steps,
        "precision": run.plan.precision,
        "devices": ",".join(map(str, devices)),
        "processes": run.processes.world_size,
    }


def _random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
