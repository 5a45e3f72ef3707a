"""我的 loss 算好吗：同一份微博对话、同样的秒数，几种做法各到多少。

用法: python -m tests.benchmarks.reference_table --corpora 语料文件夹 --seconds 180 --seeds 0 1
训练用 lccc_toy.train.txt 和 lccc_base.valid.txt 的前 18,000 段，检验用后者的最后 2,000 段
（model/base 没有见过它们）。nat/字见 reply_quality；PPL、BLEU、Distinct 与 --report 的相同。
"""

import argparse
import math
import random
import tempfile
import time
from pathlib import Path

import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.loading import load_engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.whole_files.answers import answer_batches, reference_ppl
from chitchat.chat.whole_files.metrics import bleu, distinct
from chitchat.checkpoint import load_model, load_model_tokenizer, save_checkpoint
from chitchat.cli import quiet_transformers
from chitchat.corpus.reader import read_dialogues
from chitchat.tokens.batch_encoder import DialogueEncoder
from chitchat.tokens.token_table import TokenTable
from chitchat.tokens.tokenizer import load_tokenizer
from chitchat.training.plan import FINE_TUNING_LR
from tests.benchmarks import our_loop, reference_loop, trainer_loop
from tests.benchmarks.reply_quality import cost_per_character
from tests.benchmarks.time_to_loss import lr_share, train_ours

ROOT = Path(__file__).resolve().parents[2]
NUM_HELD_OUT = 2000
NUM_REPLIES = 500  # 生成的回复数，算 BLEU 和 Distinct
SIZE = {"n_layer": 6, "n_embd": 256, "n_head": 4}
RECIPES = ("参考实现", "Trainer", "本项目，从零", "本项目，从 model/base")


def train(recipe, rows, args, seed):
    """用一种做法训练 args.seconds 秒，返回模型和更新次数。"""
    device = torch.device("cpu")
    base = args.base_model if recipe.endswith("base") else None
    if base:
        model = load_model(str(base))
    else:
        is_ours = recipe.startswith("本项目")
        model = our_loop.build_model(
            ROOT / "model/config.json", device, seed=seed, starts_at_zero=is_ours, **SIZE
        )
    torch.manual_seed(seed)
    if recipe == "参考实现":
        num_tokens, *_ = reference_loop.train(model, rows, seconds=args.seconds, device=device)
        return model, round(num_tokens / (16 * sum(map(len, rows)) / len(rows)))
    if recipe == "Trainer":
        *_, steps = trainer_loop.train(
            model, rows, seconds=args.seconds, device=device, batch_size=16, lr_factor=lr_share
        )
        return model, steps
    loader, _ = our_loop.load_batches(
        TokenTable.from_dialogues(rows), train_window=16, val_window=64, val_num=200, seed=seed
    )
    name, lr = ("adamw", 5 * FINE_TUNING_LR) if base else ("auto", 0.0)
    _, steps = train_ours(model, loader, args, device, optimizer=name, lr=lr)
    return model, steps


def measure(folder, dialogues):
    """nat/字、PPL、BLEU-2、BLEU-4、Distinct-1、Distinct-2。"""
    engine = load_engine(str(folder), precision="fp32", device=torch.device("cpu"))
    bot = Chatbot(engine, load_model_tokenizer(str(folder), None))
    options = SamplingOptions()
    contexts = [dialogue[:-1] for dialogue in dialogues]
    references = [dialogue[-1] for dialogue in dialogues]
    chosen = random.Random(0).sample(range(len(dialogues)), NUM_REPLIES)
    batches = answer_batches(bot, [contexts[i] for i in chosen], options, 0, done={})
    found = dict(pair for batch in batches for pair in batch)
    replies, wanted = [found[i] for i in range(NUM_REPLIES)], [references[i] for i in chosen]
    return (
        cost_per_character(bot, dialogues),
        reference_ppl(bot, contexts, references, options),
        bleu(replies, wanted, 2),
        bleu(replies, wanted, 4),
        distinct(replies, 1),
        distinct(replies, 2),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--base_model", type=Path, default=ROOT / "model/base")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    quiet_transformers()
    tokenizer = load_tokenizer(ROOT / "vocab/vocab.txt")
    held_out = list(read_dialogues(args.corpora / "lccc_base.valid.txt"))
    training = list(read_dialogues(args.corpora / "lccc_toy.train.txt")) + held_out[:-NUM_HELD_OUT]
    held_out = [dialogue for dialogue in held_out[-NUM_HELD_OUT:] if len(dialogue) > 1]
    rows = DialogueEncoder(tokenizer).encode(training).rows()
    print(f"训练 {len(training):,} 段，检验 {len(held_out):,} 段，各 {args.seconds:g} 秒")
    print("| 做法 | 种子 | 更新 | nat/字 | PPL | BLEU-2 | BLEU-4 | Distinct-1 | Distinct-2 |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: | --: |")
    for seed in args.seeds:
        for recipe in RECIPES:
            random.seed(seed)
            started = time.monotonic()
            model, steps = train(recipe, rows, args, seed)
            seconds = time.monotonic() - started
            with tempfile.TemporaryDirectory() as folder:
                save_checkpoint(Path(folder) / "model", model.eval(), tokenizer)
                nat, ppl, *others = measure(Path(folder) / "model", held_out)
            assert math.isfinite(ppl)
            assert seconds < args.seconds + 60
            scores = " | ".join(f"{score:.3f}" for score in others)
            print(f"| {recipe} | {seed} | {steps} | {nat:.3f} | {ppl:.1f} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
