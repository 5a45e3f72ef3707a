"""随机时刻 SIGKILL 再 --resume，直到训练完成；结果应与没有中断的训练逐位相同。

用法: python tests/benchmarks/kill_and_resume.py --train_path data/train.pkl --kills 10
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model_type": "gpt2",
    "vocab_size": 13317,
    "n_positions": 160,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "activation_function": "gelu_pytorch_tanh",
}


def digest(directory: Path) -> dict[str, str]:
    """每轮检查点的权重的指纹。"""
    files = sorted(directory.glob("*/model.safetensors"))
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, default=Path("data/train.pkl"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    is_equal = True
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(TINY), encoding="utf-8")
        command = [sys.executable, str(ROOT / "train.py"), "--no_cuda"]
        command += ["--train_path", args.train_path.resolve(), "--model_config", config]
        command += ["--epochs", args.epochs, "--optimizer", args.optimizer, "--save_steps", 5]

        def start(name: str, *options: str) -> subprocess.Popen:
            paths = ["--save_model_path", Path(folder, name), "--log_path", Path(folder, "log")]
            return subprocess.Popen(
                [str(part) for part in [*command, *paths, *options]],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        started = time.perf_counter()
        assert start("whole").wait() == 0
        seconds = time.perf_counter() - started
        print(f"uninterrupted: {seconds:.1f} s")
        for run in range(args.runs):
            kills = []
            while len(kills) < -(-args.kills // args.runs):
                process = start(f"run{run}", "--resume")
                delay = generator.uniform(0.1, 0.9) * seconds
                try:
                    process.wait(delay)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills.append(round(delay, 1))
            assert start(f"run{run}", "--resume").wait() == 0
            same = digest(Path(folder, f"run{run}")) == digest(Path(folder, "whole"))
            is_equal &= same
            print(f"run {run}: killed after {kills} s, weights identical: {same}")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
