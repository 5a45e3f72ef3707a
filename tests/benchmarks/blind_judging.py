"""同一批开场白，几种采样设置各答一句，打乱了给人评，评完再看是哪种设置答的。

先生成：python -m tests.benchmarks.blind_judging --model_path model/base --folder /tmp/judge
  answers.txt 每行“编号 TAB 开场白 TAB 回答”，看不出设置；评者在 marks.txt 里每行写
  “编号 TAB 评语”，评语是 fits（接得上）、odd（话通顺但答偏了）、broken（不成句）。
再看结果：python -m tests.benchmarks.blind_judging --folder /tmp/judge
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import interact
from chitchat.corpus.reader import read_dialogues

CORPUS = Path(__file__).parents[1] / "data" / "everyday.txt"
SETTINGS = {
    "reference: T 1, top-k 8": ["--temperature", "1", "--topk", "8"],
    "T 0.7, top-k 20": ["--temperature", "0.7", "--topk", "20"],
    "T 0.7, top-k 20, 8 candidates": [
        *("--temperature", "0.7", "--topk", "20", "--num_candidates", "8"),
    ],
    "README: T 0.5, top-k 20, penalty 1.2, 4 candidates": [
        *("--temperature", "0.5", "--topk", "20"),
        *("--repetition_penalty", "1.2", "--num_candidates", "4"),
    ],
    "T 0.7, top-k 20, penalty 1.2, 12 candidates": [
        *("--temperature", "0.7", "--topk", "20"),
        *("--repetition_penalty", "1.2", "--num_candidates", "12"),
    ],
    "greedy": ["--greedy"],
}


def generate(args):
    """各种设置各答一遍，打乱写出。"""
    args.folder.mkdir(parents=True, exist_ok=True)
    openings = [dialogue[0] for dialogue in read_dialogues(args.corpus_path)][: args.openings]
    questions = args.folder / "openings.txt"
    questions.write_text("\n\n".join(openings) + "\n", encoding="utf-8")
    rows = []
    for number, (name, options) in enumerate(SETTINGS.items()):
        output = args.folder / f"setting{number}.txt"
        interact.main([
            *("--no_cuda", "--model_path", str(args.model_path), "--seed", str(args.seed)),
            *("--input_path", str(questions), "--output_path", str(output)),
            *("--log_path", str(args.folder / "log")), *options,
        ])  # fmt: skip
        rows += [(name, *dialogue[:2]) for dialogue in read_dialogues(output)]
    random.Random(args.seed).shuffle(rows)
    lines = [f"{i}\t{opening}\t{answer}" for i, (_, opening, answer) in enumerate(rows)]
    (args.folder / "answers.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.folder / "key.json").write_text(json.dumps([row[0] for row in rows]), encoding="utf-8")


def show(folder):
    """评语按设置数出来。"""
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    counts = {name: Counter() for name in SETTINGS}
    for line in (folder / "marks.txt").read_text(encoding="utf-8").splitlines():
        number, mark = line.split("\t")[:2]
        counts[key[int(number)]][mark] += 1
    print("| setting | fits | odd | broken |\n| --- | --: | --: | --: |")
    for name, found in counts.items():
        print(f"| {name} | {found['fits']} | {found['odd']} | {found['broken']} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model_path", type=Path)
    parser.add_argument("--corpus_path", type=Path, default=CORPUS)
    parser.add_argument("--openings", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model_path:
        generate(args)
    else:
        show(args.folder)


if __name__ == "__main__":
    main()
