"""同样的语料、模型和秒数，三种训练方法各能把验证 loss 降到多少。

用法: python tests/benchmarks/time_to_loss.py --train_path data/train.pkl --seconds 180
学习率曲线按预先测出的速度铺满给定的时间；参考实现用它自己的学习率和预热。
"""

import argparse
import json
import pickle
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference_loop  # noqa: E402

from chitchat.dataset import build_loaders  # noqa: E402
from chitchat.loss import LossModule  # noqa: E402
from chitchat.optim import build_optimizers, build_schedulers  # noqa: E402
from chitchat.processes import Processes  # noqa: E402
from chitchat.runtime import quiet_transformers  # noqa: E402
from chitchat.token_table import load_token_table  # noqa: E402
from chitchat.training import evaluate  # noqa: E402
from chitchat.updater import Updater, choose_precision  # noqa: E402

SPEED_PROBE_SECONDS = 8


def make_updater(args, optimizer, lr, total_steps, device):
    torch.manual_seed(0)
    config = json.loads(args.model_config.read_text(encoding="utf-8"))
    config |= {"n_layer": args.n_layer, "n_embd": args.n_embd, "n_head": args.n_head}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=101, eos_token_id=102)).to(device)
    optimizers = build_optimizers(model, optimizer, lr=lr, eps=1e-9)
    return model.train(), Updater(
        LossModule(model),
        optimizers,
        build_schedulers(
            optimizers, "linear", warmup_steps=total_steps // 10, total_steps=total_steps
        ),
        max_grad_norm=2.0,
        precision=choose_precision("auto", device),
        processes=Processes(),
        device=device,
    )


def run_steps(updater, loader, *, seconds=None, steps=None):
    """训练到时间或步数用完，返回步数。"""
    done, started = 0, time.perf_counter()
    while True:
        for batch in loader:
            updater.step(batch)
            done += 1
            if done == steps or (seconds and time.perf_counter() - started > seconds):
                return done
        loader.sampler.epoch += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, default=Path("data/train.pkl"))
    parser.add_argument("--model_config", type=Path, default=ROOT / "model/config.json")
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--recipes", default="reference,adamw:1e-3,muon:1e-3")
    args = parser.parse_args()
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = load_token_table(args.train_path, 13317)
    loaders = build_loaders(
        table,
        val_num=200,
        max_len=150,
        train_window=16,
        val_window=64,
        pad_id=0,
        ignore_index=-100,
        width_multiple=1,
        num_workers=0,
        seed=0,
        processes=Processes(),
    )
    print(f"{'recipe':14} updates  tokens/s  val_loss   ({args.seconds:g} s each)")
    for recipe in args.recipes.split(","):
        name, _, lr = recipe.partition(":")
        started = time.perf_counter()
        if name == "reference":
            model, updater = make_updater(args, "adamw", 1e-3, 1, device)
            with args.train_path.open("rb") as file:
                dialogues = pickle.load(file)
            held_out = set(loaders[1].dataset.indices.tolist())
            dialogues = [row for i, row in enumerate(dialogues) if i not in held_out]
            num_tokens, _, elapsed = reference_loop.train(
                model, dialogues, seconds=args.seconds, device=device
            )
            steps, speed = "", num_tokens / elapsed
        else:
            loader = loaders[0]
            _, probe = make_updater(args, name, float(lr), 10**6, device)
            rate = run_steps(probe, loader, seconds=SPEED_PROBE_SECONDS) / SPEED_PROBE_SECONDS
            steps = int(rate * args.seconds)
            loader.sampler.epoch = 0
            model, updater = make_updater(args, name, float(lr), steps, device)
            started = time.perf_counter()
            run_steps(updater, loader, steps=steps)
            elapsed = time.perf_counter() - started
            mean = loader.dataset.lengths.mean() - 1
            speed = steps * loader.sampler.window_size * mean / elapsed
        average = evaluate(LossModule(model), loaders[1], processes=Processes(), device=device)
        print(f"{recipe:14} {steps!s:>7} {speed:9.0f} {average.loss:9.3f}   ({elapsed:.0f} s)")


if __name__ == "__main__":
    main()
