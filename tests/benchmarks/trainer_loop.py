"""transformers 的 Trainer，配上合理的设定，供各个测速脚本比较；要先 pip install accelerate。"""

import tempfile
import time

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from chitchat.devices import has_fast_bf16

MAX_GRAD_NORM = 2.0


class Counter:
    """把一批对话补齐成矩形，数出其中要预测的和补齐的 token。"""

    def __init__(self):
        self.num_tokens = self.num_padding = 0

    def __call__(self, rows):
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=0)
        targets = sum(len(row) - 1 for row in ids)
        self.num_tokens += targets
        self.num_padding += input_ids.numel() - len(ids) - targets
        return {
            "input_ids": input_ids,
            "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
        }


class Clock(TrainerCallback):
    """到时间就停，头 warmup 秒不算；学习率由外面的曲线按已用的时间给出。"""

    def __init__(self, seconds, counter, warmup):
        self.seconds, self.started, self.num_steps = seconds, None, 0
        self.counter, self.warmup = counter, warmup

    @property
    def elapsed(self):
        return time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.num_steps += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.warmup and self.elapsed >= self.warmup:
            self.warmup = 0.0
            self.num_steps = self.counter.num_tokens = self.counter.num_padding = 0
            self.started = time.perf_counter()
        control.should_training_stop = not self.warmup and self.elapsed >= self.seconds


def train(
    model,
    dialogues,
    *,
    seconds,
    device,
    batch_size,
    lr=1e-3,
    lr_factor=None,
    max_len=150,
    warmup=0.0,
):
    """按长度分组、批次 batch_size、有 bf16 就用，训练给定的秒数；此前的 warmup 秒不算。

    Args:
        lr_factor: 由已用时间的比例（0 到 1）给出学习率相对峰值的倍数；None 表示不变。

    Returns:
        训练过的 token 数（不含补齐）、补齐的 token 数、实际秒数、更新次数。
    """
    rows = [{"input_ids": row[:max_len], "length": len(row[:max_len])} for row in dialogues]
    counter = Counter()
    clock = Clock(seconds, counter, warmup)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)

    def factor(_step):
        share = 0.0 if clock.started is None else clock.elapsed / seconds
        return 1.0 if lr_factor is None else lr_factor(share)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=10**6,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=has_fast_bf16(device),
            use_cpu=device.type == "cpu",
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            options,
            train_dataset=rows,
            data_collator=counter,
            optimizers=(optimizer, scheduler),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return counter.num_tokens, counter.num_padding, clock.elapsed, clock.num_steps
