"""几百句一个人的话：base 自己、从零训练、在 base 上训练，各学得怎样。

用法: python -m tests.benchmarks.own_corpus --corpora 语料文件夹 [--epochs 6]
两份小语料：电视剧里一个人的台词（cped_valid.csv，base 训练时见过它们，数偏低），
和订餐问路时客服的话（crosswoz.val.txt，base 没有见过）。各留最后五分之一段作检验。
每种做法照 README 的命令各训练一次，逐轮看检验的回复每个字多少 nat（见 reply_quality），
最后用其中最好的一个答十二句检验里的话。两核约二十分钟。
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.loading import load_engine
from chitchat.chat.options import SamplingOptions
from chitchat.checkpoint import load_model_tokenizer
from chitchat.corpus.formats.base import ReadOptions
from chitchat.corpus.reader import read_source
from chitchat.corpus.sources import find_sources
from chitchat.tokens.tokenizer import encode_utterances
from tests.benchmarks.reply_quality import cost_per_character

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "model/base"
CORPORA = {  # 语料：文件，学谁的话，要多少句
    "电视剧里的方骏": ("raw/cped_valid.csv", "方骏", 600),
    "客服": ("crosswoz.val.txt", None, 600),
}
SCRATCH = ["--model_config", str(ROOT / "model/config_small.json")]
ON_TOP = [("1e-4", "all"), ("3e-4", "all"), ("3e-4", "replies"), ("1e-3", "all")]
CHAT = SamplingOptions(temperature=0.5, top_k=20, repetition_penalty=1.2)


def run(script, *arguments):
    """运行一个脚本，不成功就停下。"""
    command = [sys.executable, ROOT / f"{script}.py", *arguments]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, capture_output=True)


def load_bot(folder, **options):
    """一个模型文件夹的机器人。"""
    engine = load_engine(str(folder), precision="fp32", device=torch.device("cpu"))
    return Chatbot(engine, load_model_tokenizer(str(folder), None), **options)


def recipes():
    """名字 → train.py 的参数。"""
    found = {"从零训练，30 轮": [*SCRATCH, "--epochs", "30"]}
    for rate, loss_on in ON_TOP:
        found[f"base，--lr {rate} --loss_on {loss_on}"] = [
            *("--pretrained_model", BASE, "--lr", rate, "--loss_on", loss_on),
        ]
    return found


def show_replies(bots, openings):
    """十二句检验里的话，各个模型的回答。"""
    print(f"\n| 话 | {' | '.join(bots)} |\n| --- |{' --- |' * len(bots)}")
    answers = [
        [
            "".join(bot.reply([token_ids], CHAT, random.Random(0)))
            for token_ids in encode_utterances(bot.tokenizer, openings)
        ]
        for bot in bots.values()
    ]
    for opening, replies in zip(openings, zip(*answers, strict=True), strict=True):
        print(f"| {opening} | {' | '.join(replies)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    for name, (file, speaker, most) in CORPORA.items():
        (source,) = find_sources([args.corpora / file])
        dialogues, num_replies = [], 0
        for dialogue in read_source(source, ReadOptions(reply_speaker=speaker)):
            if num_replies < most:
                dialogues.append(dialogue.utterances)
                num_replies += len(dialogue.utterances) // 2
        split = len(dialogues) * 4 // 5
        training, held_out = dialogues[:split], dialogues[split:]
        count = sum(len(dialogue) // 2 for dialogue in held_out)
        print(f"\n{name}：训练 {split} 段、{num_replies - count} 句回复，检验 {count} 句")
        print("| 做法 | 各轮的 nat/字 |\n| --- | --- |")
        base = load_bot(BASE)
        print(f"| base 自己 | {cost_per_character(base, held_out):.3f} |")
        with tempfile.TemporaryDirectory() as folder:
            text = "\n\n".join("\n".join(dialogue) for dialogue in training)
            Path(folder, "mine.txt").write_text(text, encoding="utf-8")
            data = Path(folder, "mine.pkl")
            run("preprocess", "--train_path", Path(folder, "mine.txt"), "--save_path", data)
            best = {}
            for recipe, options in recipes().items():
                kept = Path(folder, str(len(best)))
                epochs = [] if "--epochs" in options else ["--epochs", args.epochs]
                paths = ["--train_path", data, "--save_model_path", kept, "--no_cuda"]
                run("train", *paths, *options, *epochs)
                folders = sorted(kept.glob("epoch*"), key=lambda path: int(path.name[5:]))
                costs = [cost_per_character(load_bot(path), held_out) for path in folders]
                best[recipe] = min(zip(costs, folders, strict=True))
                step = max(1, len(costs) // 6)
                shown = "、".join(f"{cost:.3f}" for cost in costs[step - 1 :: step])
                print(f"| {recipe} | {shown} |", flush=True)
            scratch, *others = best.values()
            bots = {
                "base": BASE,
                "从零": scratch[1],
                "base 上训练": min(others)[1],
            }
            bots = {title: load_bot(path, num_candidates=4) for title, path in bots.items()}
            random.Random(0).shuffle(held_out)
            show_replies(bots, [dialogue[0] for dialogue in held_out[:12]])


if __name__ == "__main__":
    main()
