"""随机时刻 SIGKILL 再 --resume，直到训练完成；结果应与没有中断的训练逐位相同。

用法: python tests/benchmarks/kill_and_resume.py --train_path data/train.pkl --kills 10

每次在剩下的步数里抽一步，走到那一步之后再抽一个时刻；跑不到终点，所以要杀几次就真的杀几次。
四种时刻：第一份状态存下之前、启动途中、正在写文件时、任意时刻。只用于 Linux。
"""

import argparse
import contextlib
import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path

from training_process import TRAIN, TrainingProcess, write_config

SAVE_STEPS = 5
MOMENTS = ["writing a file", "any moment", "starting up"]  # 每个 run 的第一次是 before first state


def digest(directory):
    """每个检查点的权重的指纹。"""
    files = sorted(directory.glob("*/model.safetensors"))
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def half_written(directory, process):
    """这个进程正在写的文件和文件夹；此前被杀的进程留下的不算。"""
    found = []
    for path in directory.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):  # 刚好写完，换了名
            if path.stat().st_mtime > process.started_at:
                found.append(path.name)
    return sorted(found)


class Killer:
    """在随机的时刻杀死训练。"""

    def __init__(self, generator, *, total_steps, startup, seconds_per_step):
        self.generator = generator
        self.total_steps = total_steps
        self.startup = startup
        self.seconds_per_step = seconds_per_step

    def kill(self, process, directory, moment, *, done_steps, share):
        """等到抽中的时刻再 SIGKILL。

        Args:
            process: 刚启动的训练。
            directory: 它的检查点文件夹。
            moment: 哪一种时刻。
            done_steps: 它从第几步接着训练。
            share: 最晚走到全程的几分之几，给后面的几次留下步数。

        Returns:
            表里的一行；训练先结束了就是 None。
        """
        if moment == "starting up":
            time.sleep(self.generator.uniform(0, self.startup))
        else:
            if moment == "before first state":
                target = self.generator.randrange(SAVE_STEPS)
            else:
                last = max(done_steps + 1, int(self.total_steps * share))
                target = self.generator.randint(done_steps + 1, last)
            process.wait_until(lambda: process.step is not None and process.step >= target)
            if moment == "writing a file":
                process.wait_until(lambda: half_written(directory, process), interval=0)
                time.sleep(self.generator.uniform(0, 0.02))
            else:
                time.sleep(self.generator.random() * self.seconds_per_step)
        seconds = time.perf_counter() - process.started
        if not process.kill():
            return None
        return {
            "moment": moment,
            "seconds": seconds,
            "step": process.step,
            "left": " ".join(half_written(directory, process)),
        }


def kill_repeatedly(killer, start, directory, num_kills):
    """一个 run：杀 num_kills 次，每次之后都接着训练，最后让它走完；返回表里的各行。"""
    rows = []
    waiting = []  # 被杀之后还不知道从第几步接着训练的各行
    done_steps = 0
    while True:
        process = start()
        row = None
        if len(rows) < num_kills:
            moment = MOMENTS[(len(rows) - 1) % len(MOMENTS)] if rows else "before first state"
            share = (len(rows) + 1) / (num_kills + 1)
            row = killer.kill(process, directory, moment, done_steps=done_steps, share=share)
        code = process.wait()
        if process.resumed_from is not None:
            done_steps = process.resumed_from
            for earlier in waiting:
                earlier["resumed_from"] = done_steps
            waiting = []
        if row is None:
            assert code == 0, process.text
            return rows
        rows.append(row)
        waiting.append(row)


def print_rows(rows, run, num_earlier):
    """一个 run 的各次，每次一行；num_earlier 是此前的 run 里杀了几次。"""
    for number, row in enumerate(rows, num_earlier + 1):
        step = "-" if row["step"] is None else row["step"]
        print(
            f"{run:3} {number:4}  {row['moment']:18} {row['seconds']:8.2f}"
            f" {step:>8} {row['resumed_from']:13}  {row['left'] or '-'}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, default=Path("data/train.pkl"))
    parser.add_argument("--kills", type=int, default=10, help="总共至少杀几次")
    parser.add_argument("--runs", type=int, default=2, help="分在几次训练里")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [*TRAIN, "--train_path", args.train_path.resolve(), "--save_steps", SAVE_STEPS]
        command += ["--model_config", write_config(folder), "--epochs", args.epochs]
        command += ["--optimizer", args.optimizer]

        def start(name, *options):
            paths = ["--save_model_path", Path(folder, name), "--log_path", Path(folder, "log")]
            return TrainingProcess([*command, *paths, *options])

        whole = start("whole")
        whole.wait_until(lambda: whole.step is not None)
        startup = time.perf_counter() - whole.started
        assert whole.wait() == 0, whole.text
        seconds = time.perf_counter() - whole.started
        print(f"uninterrupted: {whole.step} steps, {seconds:.1f} s, state every {SAVE_STEPS} steps")
        killer = Killer(
            random.Random(args.seed),
            total_steps=whole.step,
            startup=startup,
            seconds_per_step=(seconds - startup) / whole.step,
        )
        expected = digest(Path(folder, "whole"))
        num_kills, num_inside, is_equal = 0, 0, True
        print("run kill  moment              seconds  at step  resumed from  half-written")
        for run in range(args.runs):
            share = -(-(args.kills - num_kills) // (args.runs - run))
            directory = Path(folder, f"run{run}")
            rows = kill_repeatedly(
                killer, lambda name=directory.name: start(name, "--resume"), directory, share
            )
            print_rows(rows, run + 1, num_kills)
            num_kills += len(rows)
            num_inside += sum(bool(row["left"]) for row in rows)
            is_same = digest(directory) == expected
            is_equal &= is_same
            print(f"run {run + 1}: weights of {', '.join(expected)} identical: {is_same}")
    print(f"{num_kills} kills ({args.kills} asked), {num_inside} of them while writing a file")
    return 0 if is_equal and num_kills >= args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
