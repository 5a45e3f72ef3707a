"""核对校验和占读取的百分之几：50 万段的训练数据、12 层的检查点和训练状态。

用法: python -m tests.benchmarks.checksum_cost [--dialogues 500000]
语料是 data/train.txt 反复若干遍；文件都在内存的缓存里，读盘慢的话百分比更小。
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from chitchat.architecture import build_model
from chitchat.chat.loading import load_engine
from chitchat.checkpoint import save_checkpoint
from chitchat.checksums import CHECKSUMS_NAME, file_checksum
from chitchat.cli import quiet_transformers
from chitchat.corpus.reader import read_dialogues
from chitchat.tokens.token_table import load_token_table
from chitchat.tokens.token_writer import OFFSETS_NAME, TOKENS_NAME
from chitchat.tokens.tokenizer import load_tokenizer
from chitchat.training.state import STATE_KEYS, read_state
from preprocess import main as preprocess

ROOT = Path(__file__).resolve().parents[2]


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """run 一次要多少秒，几次里最短的。"""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def check(paths: list[Path]) -> None:
    """核对各个文件；训练状态是 zip，核对它自己的校验和。"""
    for path in paths:
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                archive.testzip()
        else:
            file_checksum(path)


def answer_one(folder: Path) -> None:
    """从命令到答完一句。"""
    options = ["--no_cuda", "--model_path", "model", "--log_path", "log"]
    command = [sys.executable, str(ROOT / "interact.py"), *options]
    subprocess.run(command, cwd=folder, input="你好\n", text=True, capture_output=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=int, default=500_000)
    args = parser.parse_args()
    quiet_transformers()
    tokenizer = load_tokenizer(ROOT / "vocab/vocab.txt")
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = itertools.cycle(list(read_dialogues(ROOT / "data/train.txt")))
        text = "\n\n".join("\n".join(d) for d in itertools.islice(corpus, args.dialogues))
        (folder / "corpus.txt").write_text(text + "\n", encoding="utf-8")
        for save_path in ("train.pkl", "train"):
            options = ["--train_path", folder / "corpus.txt", "--save_path", folder / save_path]
            options += ["--vocab_path", ROOT / "vocab/vocab.txt", "--log_path", folder / "log"]
            preprocess([str(option) for option in options])
        model = build_model(ROOT / "model/config.json", tokenizer)
        save_checkpoint(folder / "model", model, tokenizer)
        state = {key: {} for key in (*STATE_KEYS, "identity")}
        moments = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
        state |= {"model": model.state_dict(), "updater": [moments, dict(moments)]}
        torch.save(state, folder / "state.pt")
        weights = [p for p in (folder / "model").iterdir() if p.name != CHECKSUMS_NAME]
        arrays = [folder / "train" / n for n in (TOKENS_NAME, OFFSETS_NAME)]

        pickled, state_path = folder / "train.pkl", folder / "state.pt"
        steps = {
            "train.pkl": ([pickled], lambda: load_token_table(pickled, 13317)),
            "映射的文件夹": (arrays, lambda: load_token_table(folder / "train", 13317)),
            "12 层的检查点，读权重": (
                weights,
                lambda: load_engine(str(folder / "model"), precision="int8", device=device),
            ),
            "12 层的检查点，interact.py 答一句": (weights, lambda: answer_one(folder)),
            "12 层的训练状态": ([state_path], lambda: read_state(state_path)),
        }
        print("| 读什么 | MB | 核对，秒 | 整个读取，秒 | 占 |\n| --- | --: | --: | --: | --: |")
        for step, (paths, read) in steps.items():
            size = sum(path.stat().st_size for path in paths) / 1e6
            checking, reading = seconds(lambda p=paths: check(p)), seconds(read)
            share = checking / reading
            print(f"| {step} | {size:.0f} | {checking:.2f} | {reading:.2f} | {share:.1%} |")


if __name__ == "__main__":
    main()
