"""留作检验的对话有没有混进训练用的文字：连续 8 个字（标点、空白不算）相同就算。

用法: python -m tests.benchmarks.overlap --held_out tests/data/everyday.txt
    --training data/train.txt data/pre_general.txt.gz data/pre_chat.txt.gz
"""

import argparse
import re
from pathlib import Path

from chitchat.corpus.reader import read_dialogues

WIDTH = 8


def pieces(utterance):
    """一句话里每连续 8 个字；不到 8 个字的没有。"""
    text = re.sub(r"[\W_]+", "", utterance)
    return {text[i : i + WIDTH] for i in range(len(text) - WIDTH + 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held_out", type=Path, nargs="+", required=True)
    parser.add_argument("--training", type=Path, nargs="+", required=True)
    parser.add_argument("--last", type=int, help="只看 --held_out 的最后 N 段")
    args = parser.parse_args()
    held_out = [dialogue for path in args.held_out for dialogue in read_dialogues(path)]
    held_out = held_out[-args.last :] if args.last else held_out
    wanted = {piece for dialogue in held_out for text in dialogue for piece in pieces(text)}
    for path in args.training:
        found, same = set(), 0
        known = {tuple(dialogue) for dialogue in held_out}
        for dialogue in read_dialogues(path):
            same += tuple(dialogue) in known
            for text in dialogue:
                found |= pieces(text) & wanted
        touched = sum(any(pieces(text) & found for text in dialogue) for dialogue in held_out)
        print(f"{path}: {touched} of {len(held_out)} dialogues share {WIDTH} characters, "
              f"{same} are there whole; e.g. {sorted(found)[:5]}")  # fmt: skip


if __name__ == "__main__":
    main()
