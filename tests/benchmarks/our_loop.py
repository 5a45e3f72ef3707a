"""本项目的训练循环，去掉日志、存档和续训，供各个测速脚本使用。"""

import json

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from chitchat.architecture import zero_projections
from chitchat.training.loaders import build_loaders
from chitchat.training.loss import LossModule
from chitchat.training.optimizers import build_optimizers
from chitchat.training.plan import choose_precision
from chitchat.training.processes import Processes
from chitchat.training.splitting import MAX_PADDING, MIN_PADDING, split_rows
from chitchat.training.updater import Updater


def build_model(config_path, device, *, seed=0, starts_at_zero=True, **fields):
    """随机初始化的模型，同一个 seed 每次相同；fields 改换结构。

    starts_at_zero 是像 train.py 那样，各层最后的投影从零开始；别的做法比较时不这样。
    """
    torch.manual_seed(seed)
    config = json.loads(config_path.read_text(encoding="utf-8")) | fields
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=101, eos_token_id=102))
    return (zero_projections(model) if starts_at_zero else model).to(device)


def load_batches(
    table, *, train_window, val_window, val_num, train_tokens=0, seed=0, width_multiple=1
):
    """训练集和验证集的 DataLoader；seed 也决定留出哪些。"""
    return build_loaders(
        table,
        val_num=val_num,
        train_window=train_window,
        train_tokens=train_tokens,
        val_window=val_window,
        num_workers=0,
        seed=seed,
        processes=Processes(),
        max_len=150,
        pad_id=0,
        sep_id=102,
        width_multiple=width_multiple,
    )


def build_updater(model, device, *, optimizer, lr, lr_factor=lambda step: 1.0, precision="auto"):
    """与 train.py 的默认值相同的一次参数更新；lr_factor 由更新次数给出学习率相对峰值的倍数。"""
    optimizers = build_optimizers(model.train(), optimizer, lr=lr, eps=1e-9)
    precision = choose_precision(precision, device)
    return Updater(
        LossModule(model, precision=precision),
        optimizers,
        [LambdaLR(optimizer, lr_factor) for optimizer in optimizers],
        max_grad_norm=2.0,
        processes=Processes(),
        device=device,
        max_padding=MAX_PADDING,
    )


def count_cells(batch, device, max_padding=MAX_PADDING):
    """一个窗口分成几次前向，连补齐在内共多少个位置。"""
    lengths = batch.lengths
    parts = split_rows(
        lengths,
        max_rows=len(lengths),
        max_padding=max_padding,
        min_padding=MIN_PADDING.get(device.type, 0),
    )
    return len(parts), sum(max(lengths[i:j]) * (j - i) for i, j in parts)
