"""预处理的速度和内存：本项目、一次编码的普通脚本、参考实现的算法。

python tests/benchmarks/preprocess_speed.py 语料.txt [--times 1 4 16]
每一格是一个新进程的用时和内存峰值；参考实现只跑语料的一小截，看它怎样随长度增长。
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
CLS, SEP = 101, 102


def plain(corpus: Path, out: Path) -> None:
    """读完，编码一次，序列化。"""
    from chitchat.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "vocab/vocab.txt")
    text = corpus.read_text(encoding="utf-8")
    dialogues = [block.split("\n") for block in text.strip("\n").split("\n\n")]
    flat = [utterance for dialogue in dialogues for utterance in dialogue]
    encoded = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    rows = []
    for dialogue in dialogues:
        row = [CLS]
        for _ in dialogue:
            row += next(encoded).ids
            row.append(SEP)
        rows.append(row)
    with out.open("wb") as file:
        pickle.dump(rows, file, protocol=4)


def reference(corpus: Path, out: Path) -> None:
    """参考实现：每段对话都扫一遍全文（看用的是哪种换行），每句调用一次 encode。"""
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast(vocab=str(ROOT / "vocab/vocab.txt"))
    data = corpus.read_bytes().decode("utf-8")
    separator = "\r\n\r\n" if "\r\n" in data else "\n\n"
    rows = []
    for dialogue in data.split(separator):
        utterances = dialogue.split("\r\n") if "\r\n" in data else dialogue.split("\n")
        row = [CLS]
        for utterance in utterances:
            row += tokenizer.encode(utterance, add_special_tokens=False)
            row.append(SEP)
        rows.append(row)
    with out.open("wb") as file:
        pickle.dump(rows, file)


# 经过一个很小的进程再启动：Linux 把父进程的内存峰值也算在子进程头上。
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
code = subprocess.run(sys.argv[1:], **quiet).returncode
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


def measure(command: list[str]) -> tuple[float, float]:
    """新进程的用时（秒）和内存峰值（MB）。"""
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    output = subprocess.run(launcher, capture_output=True, text=True, check=True).stdout
    seconds, memory = map(float, output.split())
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=1, help="取最快的一次")
    parser.add_argument("--reference_dialogues", type=int, default=3000)
    parser.add_argument("--run", choices=["plain", "reference"], help="内部使用")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.run:
        {"plain": plain, "reference": reference}[args.run](args.corpus, args.out)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = args.corpus.read_bytes().strip(b"\n") + b"\n"
        print("| 语料 | 做法 | 秒 | 内存峰值 MB |\n| --- | --- | --- | --- |", flush=True)
        for times in args.times:
            text = folder / "corpus.txt"
            text.write_bytes(b"\n".join([whole] * times))
            ours = [sys.executable, str(ROOT / "preprocess.py"), "--train_path", str(text)]
            ours += ["--log_path", str(folder / "log"), "--save_path"]
            script = [sys.executable, __file__, str(text), "--out", str(folder / "p.pkl")]
            script += ["--run", "plain"]
            for label, command in (
                ("本项目 .pkl", [*ours, str(folder / "o.pkl")]),
                ("本项目 文件夹", [*ours, str(folder / "table")]),
                ("普通脚本 .pkl", script),
            ):
                runs = [measure(command) for _ in range(args.repeats)]
                row = f"{min(r[0] for r in runs):.1f} | {min(r[1] for r in runs):.0f}"
                print(f"| {times}× | {label} | {row} |", flush=True)
            if times == 1:
                same = (folder / "o.pkl").read_bytes(), (folder / "p.pkl").read_bytes()
                print(
                    f"| | 两个 .pkl 内容相同 | {pickle.loads(same[0]) == pickle.loads(same[1])} | |"
                )
        blocks = whole.split(b"\n\n")
        for factor in (1, 2, 4):
            num = args.reference_dialogues * factor
            text = folder / "slice.txt"
            text.write_bytes(b"\n\n".join(blocks[:num]))
            command = [sys.executable, __file__, str(text), "--out", str(folder / "r.pkl")]
            seconds, memory = measure([*command, "--run", "reference"])
            print(f"| {num} 段 | 参考实现的算法 | {seconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
