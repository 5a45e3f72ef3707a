"""同样的语料、模型和秒数，三种训练方法各能把验证 loss 降到多少。

用法: python tests/benchmarks/time_to_loss.py --train_path data/train.pkl --seconds 180
学习率曲线按时间铺满给定的秒数；参考实现用它自己的学习率和预热。
给 --pretrained_model 时从已有的权重继续（微调）。
"""

import argparse
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import our_loop  # noqa: E402
import reference_loop  # noqa: E402
import trainer_loop  # noqa: E402

from chitchat.checkpoint import load_model  # noqa: E402
from chitchat.cli import quiet_transformers  # noqa: E402
from chitchat.tokens.token_table import load_token_table  # noqa: E402
from chitchat.training.batching import LengthBucketSampler, Window  # noqa: E402
from chitchat.training.loss import LossModule  # noqa: E402
from chitchat.training.meters import evaluate  # noqa: E402
from chitchat.training.optimizer_choice import choose_optimizer  # noqa: E402
from chitchat.training.optimizers import DEFAULT_LR, learning_rate_factor  # noqa: E402
from chitchat.training.plan import choose_precision  # noqa: E402

DEFAULT_RECIPES = "reference,adamw:1e-3,adamw:2e-3,muon:1e-3,muon:2e-3,muon:4e-3"


def train_reference(model, loaders, args, device):
    """参考实现的做法；返回 token/s 和更新次数。"""
    with args.train_path.open("rb") as file:
        dialogues = pickle.load(file)
    held_out = set(loaders[1].dataset.indices.tolist())
    dialogues = [row for i, row in enumerate(dialogues) if i not in held_out]
    num_tokens, _, elapsed = reference_loop.train(
        model, dialogues, seconds=args.seconds, device=device
    )
    tokens_per_step = 16 * (loaders[0].dataset.lengths.mean() - 1)
    return num_tokens / elapsed, round(num_tokens / tokens_per_step)


def train_trainer(model, loaders, args, device, *, lr):
    """transformers 的 Trainer，同一条按时间铺满的学习率曲线；返回 token/s 和更新次数。"""
    table, indices = loaders[0].dataset.table, loaders[0].dataset.indices
    dialogues = [table[i].tolist() for i in indices]
    num_tokens, _, elapsed, num_steps = trainer_loop.train(
        model,
        dialogues,
        seconds=args.seconds,
        device=device,
        batch_size=args.batch_size,
        lr=lr,
        lr_factor=lr_share,
    )
    return num_tokens / elapsed, num_steps


def sort_in_pools(sampler, pool_size, window_size):
    """改成只在随机的一池之内按长度排好、切成窗口；池与池、窗口与窗口的次序都打乱。"""

    def windows():
        generator = np.random.default_rng((sampler.seed, sampler.epoch))
        order = generator.permutation(len(sampler.lengths))
        found = []
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool = pool[np.argsort(sampler.lengths[pool], kind="stable")]
            found += [pool[i : i + window_size] for i in range(0, len(pool), window_size)]
        for i in generator.permutation(len(found)):
            yield Window(found[i].tolist(), int(sampler.num_targets[found[i]].sum()))

    type(sampler).__iter__ = lambda self: windows() if self is sampler else original(self)


original = LengthBucketSampler.__iter__


def lr_share(share):
    """用去 share 的时间（0 到 1）时，学习率相对峰值的倍数。"""
    return learning_rate_factor(
        int(1000 * share), schedule="linear", warmup_steps=100, total_steps=1000
    )


def train_ours(model, loader, args, device, *, optimizer, lr):
    """学习率曲线按时间铺满给定的秒数；返回 token/s 和更新次数。"""
    started = time.perf_counter()

    def share():
        return (time.perf_counter() - started) / args.seconds

    def lr_factor(_step):
        return lr_share(share())

    if optimizer == "auto":
        module = LossModule(model.train(), precision=choose_precision("auto", device))
        optimizer = choose_optimizer(module, loader, num_processes=1)
        lr = lr or DEFAULT_LR[optimizer]
        print(f"auto: {optimizer}", file=sys.stderr)
    updater = our_loop.build_updater(model, device, optimizer=optimizer, lr=lr, lr_factor=lr_factor)
    num_tokens = num_steps = 0
    loader.sampler.epoch = 0
    while True:
        for batch in loader:
            updater.step(batch)
            num_tokens += batch.num_targets
            num_steps += 1
            if share() >= 1:
                return num_tokens / (share() * args.seconds), num_steps
        loader.sampler.epoch += 1


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, default=Path("data/train.pkl"))
    parser.add_argument("--model_config", type=Path, default=ROOT / "model/config.json")
    parser.add_argument("--pretrained_model", type=Path)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--recipes", default=DEFAULT_RECIPES)
    parser.add_argument("--batch_size", type=int, default=16, help="一次更新的对话数")
    parser.add_argument("--batch_tokens", type=int, default=0, help="一次更新的 token 数，代替前者")
    parser.add_argument("--pool_windows", type=int, default=0, help="只在这么多窗口之内按长度排")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = load_token_table(args.train_path, 13317)
    loaders = our_loop.load_batches(
        table,
        train_window=args.batch_size,
        train_tokens=args.batch_tokens,
        val_window=64,
        val_num=200,
        seed=args.seed,
    )
    if args.pool_windows:
        sort_in_pools(loaders[0].sampler, args.pool_windows * args.batch_size, args.batch_size)
    size = {name: getattr(args, name) for name in ("n_layer", "n_embd", "n_head")}
    print(f"{'recipe':14} updates  tokens/s  val_loss   ({args.seconds:g} s each)")
    for recipe in args.recipes.split(","):
        name, _, lr = recipe.partition(":")
        if args.pretrained_model:
            model = load_model(args.pretrained_model).to(device)
        else:
            is_ours = name not in ("reference", "trainer")
            model = our_loop.build_model(
                args.model_config, device, seed=args.seed, starts_at_zero=is_ours, **size
            )
        if name == "reference":
            speed, steps = train_reference(model, loaders, args, device)
        elif name == "trainer":
            speed, steps = train_trainer(model, loaders, args, device, lr=float(lr))
        else:
            speed, steps = train_ours(
                model, loaders[0], args, device, optimizer=name, lr=float(lr or 0)
            )
        evaluator = our_loop.build_updater(
            model, device, optimizer="adamw", lr=1.0, precision="fp32"
        )
        average = evaluate(evaluator, loaders[1])
        print(f"{recipe:14} {steps:7} {speed:9.0f} {average.loss:9.3f}", flush=True)


if __name__ == "__main__":
    main()
