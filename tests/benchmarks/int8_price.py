"""int8 的代价：一份语料上的 loss 与 fp32 差多少，常用的话的回复变没变。

用法: python -m tests.benchmarks.int8_price --model_path model/epoch13 --corpus_path 语料.txt
loss 是全部对话里每个位置（[CLS] 之后的每个 token）的平均，nat/token；相差达到 1% 时退出码是 1。
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import Engine
from chitchat.chat.loading import load_engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.scoring import score_continuations
from chitchat.checkpoint import load_model_tokenizer
from chitchat.corpus.reader import read_dialogues
from chitchat.tokens.tokenizer import encode_dialogues, encode_utterances

PROMPTS = (
    *("你好", "你是谁", "在干嘛", "今天好累啊", "晚上吃什么好"),
    *("外面下雨了", "讲个笑话", "推荐个电影吧", "周末去哪玩", "晚安"),
)
LIMIT = 0.01


def read_rows(bot: Chatbot, path: Path, max_len: int, max_dialogues: int) -> list[list[int]]:
    """每段对话去掉 [CLS] 之后的 token，与训练时一样截到 max_len；由短到长。"""
    dialogues = list(read_dialogues(path))
    if 0 < max_dialogues < len(dialogues):
        dialogues = random.Random(0).sample(dialogues, max_dialogues)
    rows = [
        [token for utterance in dialogue for token in (*utterance, bot.ids.sep)][: max_len - 1]
        for dialogue in encode_dialogues(bot.tokenizer, dialogues)
    ]
    return sorted(rows, key=len)


def mean_loss(engine: Engine, rows: list[list[int]], bot: Chatbot) -> float:
    """每个 token 的平均 loss，nat。"""
    pairs = [([bot.ids.cls], row) for row in rows]
    log_prob_sum = sum(score_continuations(engine, pairs, bot.ids.pad))
    return -log_prob_sum / sum(map(len, rows))


def greedy_reply(bot: Chatbot, prompt: str) -> str:
    history = encode_utterances(bot.tokenizer, [prompt])
    reply = bot.reply(history, SamplingOptions(greedy=True), random.Random(0))
    return "".join(reply)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default="model/epoch13")
    parser.add_argument("--corpus_path", type=Path, default=Path("data/train.txt"))
    parser.add_argument("--max_len", type=int, default=150, help="每段对话最多用多少 token")
    parser.add_argument("--max_dialogues", type=int, default=0, help="随机取几段，0 表示全部")
    args = parser.parse_args()
    tokenizer = load_model_tokenizer(args.model_path, None)
    bots = {
        precision: Chatbot(
            load_engine(args.model_path, precision=precision, device=torch.device("cpu")),
            tokenizer,
        )
        for precision in ("fp32", "int8")
    }
    max_len = min(args.max_len, bots["fp32"].max_positions)
    rows = read_rows(bots["fp32"], args.corpus_path, max_len, args.max_dialogues)
    losses = {}
    print(f"{len(rows)} 段，{sum(map(len, rows))} 个 token")
    print("\n| 精度 | loss，nat/token | 秒 |\n| --- | --: | --: |")
    for precision, bot in bots.items():
        start = time.perf_counter()
        losses[precision] = mean_loss(bot.engine, rows, bot)
        print(f"| {precision} | {losses[precision]:.5f} | {time.perf_counter() - start:.1f} |")
    change = losses["int8"] / losses["fp32"] - 1
    print(f"\n相差 {change:+.3%}，上限 {LIMIT:.0%}")
    print("\n| 上文 | fp32 | int8 | 相同 |\n| --- | --- | --- | --- |")
    num_equal = 0
    for prompt in PROMPTS:
        replies = [greedy_reply(bot, prompt) for bot in bots.values()]
        num_equal += replies[0] == replies[1]
        print(
            f"| {prompt} | {' | '.join(replies)} | {'是' if replies[0] == replies[1] else '否'} |"
        )
    print(f"\n{len(PROMPTS)} 句里 {num_equal} 句相同")
    return int(abs(change) >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
