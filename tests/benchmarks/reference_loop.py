"""参考实现的训练算法，用今天的库重写成几行，供各个测速脚本比较。"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import get_linear_schedule_with_warmup

from tests.benchmarks.stopwatch import Stopwatch

BATCH_SIZE = 4
ACCUMULATION = 4
LR = 2.6e-5
EPS = 1e-9
WARMUP_STEPS = 4000
MAX_GRAD_NORM = 2.0


def train(model, dialogues, *, seconds, device, max_len=150, batch_size=BATCH_SIZE, warmup=0.0):
    """随机组成批次、补齐、float32、整块 logits，训练给定的秒数；此前的 warmup 秒不算。

    Returns:
        训练过的 token 数（不含补齐）、补齐的 token 数、实际秒数。
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS)
    scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, 10**6)
    generator = np.random.default_rng(0)
    model.train()
    step = 0
    clock = Stopwatch(seconds, warmup=warmup)
    while True:
        order = generator.permutation(len(dialogues))
        for start in range(0, len(order), batch_size):
            rows = [torch.tensor(dialogues[i][:max_len]) for i in order[start : start + batch_size]]
            input_ids = pad_sequence(rows, batch_first=True, padding_value=0).to(device)
            labels = pad_sequence(rows, batch_first=True, padding_value=-100).to(device)
            outputs = model(input_ids, labels=labels)
            count_correct(outputs.logits, labels)
            (outputs.loss / ACCUMULATION).backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            step += 1
            if step % ACCUMULATION == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            targets = sum(len(row) - 1 for row in rows)
            if clock.add(targets, input_ids.numel() - len(rows) - targets):
                return clock.num_tokens, clock.num_padding, clock.elapsed


def count_correct(logits, labels):
    """参考实现每步都算一次准确率。"""
    prediction = logits[:, :-1].argmax(dim=-1)
    targets = labels[:, 1:]
    return ((prediction == targets) & (targets != -100)).sum().item()
