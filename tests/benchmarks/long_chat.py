"""聊得很久：一次聊天里连说一千句，内存和回复时间在第 10、100、1000 句有没有变。

用法: python -m tests.benchmarks.long_chat --model_path model/epoch13
用 REPL 自己的 Repl、Transcript 和日志：历史照留，聊天记录照写。
"""

import argparse
import itertools
import random
import resource
import statistics
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import MAX_THREADS, choose_precision
from chitchat.chat.loading import load_engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.terminal.repl import Repl
from chitchat.chat.transcript import Transcript
from chitchat.checkpoint import load_model_tokenizer
from chitchat.cli import configure_logging
from chitchat.corpus.reader import read_dialogues

ROOT = Path(__file__).resolve().parents[2]
TURNS = (10, 100, 1000)
REACH = 5  # 取前后各几句的中位数


def memory() -> float:
    """现在占用的物理内存（RSS），MB。"""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * resource.getpagesize() / 1e6


def talk(repl: Repl, num_turns: int) -> tuple[list[float], list[float]]:
    """用自带语料里的话一句接一句地说，给出每句的秒数和说完之后的内存。"""
    dialogues = read_dialogues(ROOT / "data" / "train.txt")
    lines = itertools.cycle([utterance for dialogue in dialogues for utterance in dialogue])
    seconds, memories = [], []
    for line in itertools.islice(lines, num_turns):
        start = time.perf_counter()
        if not repl.handle(line):
            raise RuntimeError(line)
        seconds.append(time.perf_counter() - start)
        memories.append(memory())
    return seconds, memories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default="model/epoch13")
    parser.add_argument("--max_history_len", type=int, default=SamplingOptions.max_history_len)
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    device = torch.device("cpu")
    tokenizer = load_model_tokenizer(args.model_path, None)
    precision = choose_precision("auto", device)
    loading: Future[Chatbot] = Future()
    loading.set_result(
        Chatbot(load_engine(args.model_path, precision=precision, device=device), tokenizer)
    )
    shown, told = [], []  # 屏幕上的字也留着数一数
    with tempfile.TemporaryDirectory() as directory:
        configure_logging(Path(directory) / "interact.log", console=False)
        repl = Repl(
            tokenizer,
            loading,
            SamplingOptions(max_history_len=args.max_history_len),
            Transcript(Path(directory)),
            random.Random(0),
            show=lambda piece: shown.append(len(piece)),
            tell=lambda text: told.append(len(text)),
        )
        seconds, memories = talk(repl, TURNS[-1] + REACH)
        repl.transcript.close()
        num_lines = (Path(directory) / "sample.txt").read_text(encoding="utf-8").count("\n")
        configure_logging(None, console=False)
    print("| 第几句 | 内存 MB | 每句 ms |\n| --: | --: | --: |")
    for turn in TURNS:
        near = slice(max(0, turn - 1 - REACH), turn + REACH)
        medians = statistics.median(memories[near]), 1000 * statistics.median(seconds[near])
        print(f"| {turn} | {medians[0]:.1f} | {medians[1]:.1f} |")
    print(
        f"\n历史 {len(repl.history)} 句，聊天记录 {num_lines} 行，"
        f"显示 {sum(shown)} 字，提示放不下 {len(told)} 次"
    )


if __name__ == "__main__":
    main()
