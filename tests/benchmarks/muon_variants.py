"""Muon 的各种改法，更新次数相同时谁的验证 loss 低；与机器忙不忙无关。

用法: python -m tests.benchmarks.muon_variants --train_path lccc.pkl [--updates 300] [--seeds 0 1]
cautious 只在更新与权重同号处衰减（arXiv:2510.12402）；normuon 正交化之后各行再除以自己的
均方根（arXiv:2510.05491）；no_clip 只裁剪 AdamW 的参数；zero_init 各层最后的投影从零开始
（已经采用，见 zero_projections）；
growing 窗口是 8、16、32 段，各用三分之一的 token；averaged 取最后 15% 各次更新的权重的平均。
"""

import argparse
from pathlib import Path

import torch

from chitchat.tokens.token_table import load_token_table
from chitchat.training.meters import evaluate
from chitchat.training.optimizers import (
    DEFAULT_LR,
    Muon,
    hidden_matrices,
    learning_rate_factor,
    orthogonalize,
)
from tests.benchmarks import our_loop

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZE = {"n_layer": 6, "n_embd": 256, "n_head": 4}
BETA2 = 0.95  # NorMuon 的各行均方的衰减
AVERAGED = 0.15  # averaged 取最后多少更新


class Variant(Muon):
    """可以改的 Muon。"""

    def __init__(self, params, *, lr, weight_decay, is_cautious, is_normalised):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.is_cautious, self.is_normalised = is_cautious, is_normalised

    def _update(self, params, group, found_inf):
        momenta = self._stack_momenta(params)
        grads = torch.stack([param.grad for param in params])
        momenta.lerp_(grads, 1 - group["momentum"])
        updates = orthogonalize(grads.lerp_(momenta, group["momentum"]))
        if self.is_normalised:
            updates = self._normalise(params, updates)
        decay = group["lr"] * group["weight_decay"]
        lr = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
        for param, update in zip(params, updates, strict=True):
            shrinks = (update * param > 0).float() if self.is_cautious else 1.0
            param.sub_(param * shrinks * decay)
            param.add_(update, alpha=-lr)

    def _normalise(self, params, updates):
        """各行除以自己的均方根，总的大小不变。"""
        rows = updates.square().mean(dim=2, keepdim=True)
        state = self.state[params[0]]
        average = state.setdefault("rows", torch.zeros_like(rows))
        average.lerp_(rows, 1 - BETA2)
        scaled = updates / (average.sqrt() + 1e-8)
        return scaled * (updates.norm(dim=(1, 2)) / scaled.norm(dim=(1, 2)))[:, None, None]


VARIANTS = {
    "此前的": {},
    "weight_decay 0.1": {"weight_decay": 0.1},
    "cautious 0.1": {"weight_decay": 0.1, "is_cautious": True},
    "normuon": {"is_normalised": True},
    "no_clip": {"is_clipped": False},
    "zero_init": {"starts_at_zero": True},
    "growing": {"windows": (8, 16, 32)},
    "averaged": {"is_averaged": True},
}


def batches(table, windows, seed, num_tokens):
    """各种窗口各用同样多的 token，给出窗口和用去的份额。"""
    seen = 0
    for number, window in enumerate(windows, 1):
        loader, _ = our_loop.load_batches(
            table, train_window=window, val_window=64, val_num=200, seed=seed
        )
        loader.sampler.epoch = number if number > 1 else 0
        while seen < num_tokens * number / len(windows):
            for batch in loader:
                yield batch, seen / num_tokens
                seen += batch.num_targets
                if seen >= num_tokens * number / len(windows):
                    break
            loader.sampler.epoch += 10


def train(
    table, seed, num_tokens, *, weight_decay=0.01, is_cautious=False, is_normalised=False,
    is_clipped=True, starts_at_zero=False, windows=(16,), is_averaged=False,
):  # fmt: skip
    """训练一种改法，返回更新次数和模型。"""
    model = our_loop.build_model(
        ROOT / "model/config.json", CPU, seed=seed, starts_at_zero=starts_at_zero, **SIZE
    )
    hidden = hidden_matrices(model)
    progress = 0.0

    def factor(_step):
        step = int(1000 * progress)
        return learning_rate_factor(step, schedule="linear", warmup_steps=100, total_steps=1000)

    updater = our_loop.build_updater(
        model, CPU, optimizer="muon", lr=DEFAULT_LR["muon"], lr_factor=factor, precision="fp32"
    )
    own = Variant(
        hidden, lr=DEFAULT_LR["muon"], weight_decay=weight_decay,
        is_cautious=is_cautious, is_normalised=is_normalised,
    )  # fmt: skip
    updater.optimizers[1] = own
    updater.schedulers[1] = torch.optim.lr_scheduler.LambdaLR(own, factor)
    if not is_clipped:
        is_hidden = set(map(id, hidden))
        updater._params = [p for p in updater._params if id(p) not in is_hidden]
    average = torch.optim.swa_utils.AveragedModel(model) if is_averaged else None
    num_updates = 0
    for batch, progress in batches(table, windows, seed, num_tokens):
        updater.step(batch)
        num_updates += 1
        if average is not None and progress >= 1 - AVERAGED:
            average.update_parameters(model)
    return num_updates, model if average is None else average.module


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    table = load_token_table(args.train_path, 13317)
    print("| 改法 | 种子 | 更新 | 验证 loss |\n| --- | --: | --: | --: |")
    for seed in args.seeds:
        loader, held_out = our_loop.load_batches(
            table, train_window=16, val_window=64, val_num=200, seed=seed
        )
        num_tokens = args.updates * 16 * int(loader.dataset.lengths.mean() - 1)
        for name in args.variants:
            num_updates, model = train(table, seed, num_tokens, **VARIANTS[name])
            evaluator = our_loop.build_updater(
                model, CPU, optimizer="adamw", lr=1.0, precision="fp32"
            )
            loss = evaluate(evaluator, held_out).loss
            print(f"| {name} | {seed} | {num_updates} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
