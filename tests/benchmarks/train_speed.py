"""训练速度：参考实现的循环、transformers 的 Trainer 与本项目的循环，一次运行里先后计时。

用法: python tests/benchmarks/train_speed.py --train_path data/train.pkl
每种做法各开一个子进程，内存峰值因此互不影响。最后是一整轮里补齐占的比例，只排批次，不训练；
--seconds 0 时只有它。
"""

import argparse
import importlib.util
import json
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import our_loop  # noqa: E402
import reference_loop  # noqa: E402
import trainer_loop  # noqa: E402

from chitchat.cli import quiet_transformers  # noqa: E402
from chitchat.devices import has_fast_bf16, select_devices  # noqa: E402
from chitchat.tokens.token_table import load_token_table  # noqa: E402
from chitchat.training.loss import LossModule  # noqa: E402
from chitchat.training.optimizer_choice import choose_optimizer  # noqa: E402
from chitchat.training.plan import choose_precision  # noqa: E402
from chitchat.training.splitting import MAX_PADDING  # noqa: E402
from tests.benchmarks.stopwatch import Stopwatch  # noqa: E402
from train import COMPILED_WIDTH  # noqa: E402


def measure_padding(train_path, vocab_size, batch_sizes):
    """一整轮里补齐占的比例，不训练；打印一张表：整窗一次前向，和像 train.py 那样拆开。"""
    device = select_devices("0", no_cuda=False)[0]
    table = load_token_table(train_path, vocab_size)
    print(f"{'padding over one epoch':30} windows  one forward each  forwards  split as trained")
    for batch_size, accumulation in batch_sizes:
        window = batch_size * accumulation
        loader, _ = our_loop.load_batches(table, train_window=window, val_window=1, val_num=8000)
        shares = []
        for max_padding in (1.0, MAX_PADDING):
            counts = [our_loop.count_cells(batch, device, max_padding) for batch in loader]
            num_forwards, num_cells = map(sum, zip(*counts, strict=True))
            shares.append(1 - loader.dataset.lengths.sum() / num_cells)
        name = f"batch {batch_size} x {accumulation} (window {window})"
        print(f"{name:30} {len(loader):7} {shares[0]:17.2%} {num_forwards:9} {shares[1]:17.2%}")


def train_ours(model, table, args, *, window):
    """本项目的循环；--compile 时与 train.py 一样编译，编译的时间也在 --warmup 之内。"""
    device = select_devices("0", no_cuda=False)[0]
    width = COMPILED_WIDTH if args.compile else 1
    loader, _ = our_loop.load_batches(
        table, train_window=window, val_window=1, val_num=1, width_multiple=width
    )
    optimizer = args.optimizer
    if optimizer == "auto":
        precision = choose_precision(args.precision, device)
        module = LossModule(model.train(), precision=precision)
        optimizer = choose_optimizer(module, loader, num_processes=1)
        print(f"auto: {optimizer}", file=sys.stderr)
    updater = our_loop.build_updater(
        model, device, optimizer=optimizer, lr=1e-3, precision=args.precision
    )
    if args.compile:
        model.transformer.compile()
        updater.splitter.max_padding = 1.0
    clock = Stopwatch(args.seconds, warmup=args.warmup)
    while True:
        for batch in loader:
            updater.step(batch)
            num_cells = updater.splitter.count_cells(batch)
            num_dialogues = len(batch.input_ids)
            if clock.add(batch.num_targets, num_cells - batch.num_targets - num_dialogues):
                return clock.num_tokens, clock.num_padding, clock.elapsed
        loader.sampler.epoch += 1


def matrix_rate(device, dtype, size=2048, seconds=2.0):
    """大矩阵乘法的速度，FLOP 每秒。"""
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    matrix @ matrix
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return 2 * size**3 * count / elapsed


def run_variant(args):
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.variant == "rate":
        dtypes = [torch.float32, *[torch.bfloat16] * has_fast_bf16(device)]
        print(json.dumps({str(dtype)[6:]: matrix_rate(device, dtype) for dtype in dtypes}))
        return
    model = our_loop.build_model(args.model_config, device)
    if args.variant in ("trainer", "reference", "reference_equal"):
        with args.train_path.open("rb") as file:
            dialogues = pickle.load(file)
        size = reference_loop.BATCH_SIZE if args.variant == "reference" else args.batch_size
        loop = trainer_loop if args.variant == "trainer" else reference_loop
        num_tokens, num_padding, seconds, *_ = loop.train(
            model,
            dialogues,
            seconds=args.seconds,
            device=device,
            batch_size=size,
            warmup=args.warmup,
        )
    else:
        table = load_token_table(args.train_path, model.config.vocab_size)
        size, _, args.optimizer = args.variant.partition(":")
        window = 4 * 4 if size == "defaults" else args.batch_size
        num_tokens, num_padding, seconds = train_ours(model, table, args, window=window)
    positions = model.transformer.wpe.weight.numel()
    result = {
        "speed": num_tokens / seconds,
        "padding": num_padding / (num_tokens + num_padding),
        # 前向和反向每个 token 每个权重 6 次浮点运算；位置向量不参与矩阵乘法。
        "flops": 6 * (model.num_parameters() - positions) * num_tokens / seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if device.type == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, default=Path("data/train.pkl"))
    parser.add_argument("--model_config", type=Path, default=ROOT / "model/config.json")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--warmup", type=float, default=0, help="先跑这么多秒再计时，GPU 上用")
    parser.add_argument("--compile", action="store_true", help="本项目的各行像 --compile 那样编译")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--optimizers", default="adamw,muon,auto", help="本项目用哪几种，逗号分隔")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        run_variant(args)
        return
    if args.seconds:
        compare_speed(args)
    vocab_size = json.loads(args.model_config.read_text(encoding="utf-8"))["vocab_size"]
    batch_sizes = [(4, 4), (args.batch_size, 1), (args.batch_size, 4)]
    measure_padding(args.train_path, vocab_size, batch_sizes)


def compare_speed(args):
    """各种做法先后计时，打印一张表。"""

    def measure(variant):
        command = [sys.executable, *sys.argv, "--variant", variant]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return json.loads(output.strip().split("\n")[-1])

    rates = measure("rate")
    print("  ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    best = max(rates.values())
    rows = {
        "reference (batch 4 x 4)": measure("reference"),
        f"reference (batch {args.batch_size})": measure("reference_equal"),
    }
    if importlib.util.find_spec("accelerate"):
        rows[f"Trainer (batch {args.batch_size})"] = measure("trainer")
    else:
        print("没有 Trainer 的一行：它要 pip install accelerate")
    optimizers = args.optimizers.split(",")
    for optimizer in optimizers:
        rows[f"ours, {optimizer}, defaults (4 x 4)"] = measure(f"defaults:{optimizer}")
        rows[f"ours, {optimizer}, --batch_size {args.batch_size}"] = measure(f"ours:{optimizer}")
    base = rows["reference (batch 4 x 4)"]["speed"]
    print(f"{'':34} tokens/s   ratio  matrix rate  padding  peak memory")
    for name, row in rows.items():
        print(
            f"{name:34} {row['speed']:8.1f} {row['speed'] / base:6.2f}x {row['flops'] / best:11.0%}"
            f" {row['padding']:8.1%} {row['memory']:9.2f} GiB"
        )
    hours = 500_000 * 25 / max(row["speed"] for row in rows.values()) / 3600
    print(f"one epoch of 500,000 dialogues of 25 tokens: {hours:.1f} h")


if __name__ == "__main__":
    main()
