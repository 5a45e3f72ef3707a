"""模型答得有多好：回复每个字要多少 nat（给出此前的各句），以及它对一组开场白的回答。

用法: python -m tests.benchmarks.reply_quality --model_path model/base
    --corpus_path tests/data/everyday.txt
--model_path 可以给出多个，逐行成表；--openings_path 的每一行各答一句，供人来读。
回复是每段对话的第 2、4、… 句，[SEP] 也计入，分母是回复的字数，与词表怎样切分无关。
"""

import argparse
import random
from pathlib import Path

import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.loading import load_engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.scoring import score_continuations
from chitchat.checkpoint import load_model_tokenizer
from chitchat.corpus.reader import read_dialogues
from chitchat.tokens.tokenizer import encode_dialogues, encode_utterances


def cost_per_character(bot, dialogues):
    """每个字平均多少 nat；放不下的上文从最早的 token 略去。"""
    pairs, num_characters = [], 0
    for history, dialogue in zip(
        encode_dialogues(bot.tokenizer, dialogues), dialogues, strict=True
    ):
        for i in range(1, len(history), 2):
            reply = [*history[i], bot.ids.sep]
            context = [token for utterance in history[:i] for token in (*utterance, bot.ids.sep)]
            room = bot.max_positions - len(reply) - 1
            pairs.append(([bot.ids.cls, *context[-room:]], reply))
            num_characters += len(dialogue[i])
    pairs.sort(key=lambda pair: sum(map(len, pair)))
    return -sum(score_continuations(bot.engine, pairs, bot.ids.pad)) / num_characters


def answer_openings(bot, openings, options, rng):
    """每句开场白各答一句。"""
    for opening, token_ids in zip(
        openings, encode_utterances(bot.tokenizer, openings), strict=True
    ):
        print(f"{opening} → {''.join(bot.reply([token_ids], options, rng))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", nargs="+", required=True)
    parser.add_argument("--corpus_path", nargs="*", type=Path, default=[])
    parser.add_argument("--openings_path", type=Path)
    parser.add_argument("--temperature", type=float, default=SamplingOptions.temperature)
    parser.add_argument("--top_k", type=int, default=SamplingOptions.top_k)
    parser.add_argument("--top_p", type=float, default=SamplingOptions.top_p)
    parser.add_argument("--num_candidates", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = SamplingOptions(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    corpora = {path.name: list(read_dialogues(path)) for path in args.corpus_path}
    for model_path in args.model_path:
        bot = Chatbot(
            load_engine(model_path, precision="fp32", device=torch.device("cpu")),
            load_model_tokenizer(model_path, None),
            num_candidates=args.num_candidates,
        )
        costs = [f"{name} {cost_per_character(bot, d):.3f}" for name, d in corpora.items()]
        print(f"{model_path}: {'  '.join(costs)}")
        if args.openings_path:
            openings = args.openings_path.read_text(encoding="utf-8").split("\n")
            rng = random.Random(args.seed)
            answer_openings(bot, [line for line in openings if line], options, rng)


if __name__ == "__main__":
    main()
