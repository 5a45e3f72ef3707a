"""由公开的语料拼出 model/base 的预训练文本：通用的 general.txt.gz 和对话的 chat.txt.gz。

用法: python -m tests.benchmarks.base_corpus --corpora 语料文件夹 --output_dir data
语料文件夹里要有 model/base/README.md 的表中各文件；缺一个就停下并说明是哪个。
粗俗的、色情的和政治的句子在那里把对话切断，长的对话切成约 140 字的段；
与留作测试的文字（LCCC 最后 2,000 段、tests/data 的开场白和对话）有八个字相同的段不要。
"""

import argparse
import gzip
import random
import re
from pathlib import Path

from chitchat.corpus.reader import read_dialogues

ROOT = Path(__file__).resolve().parents[2]
RUDE = re.compile(
    "操你|我操|卧槽|草泥马|他妈|妈的|你妈逼|傻逼|傻B|煞笔|婊|贱人|贱货|王八|狗屁|去死|屌|鸡巴|屄|妓|强奸|做爱|性交|性感|"
    "上床|阴茎|阴道|奶子|胸部|裸|毒品|自杀|自残|http|@|www"
)
POLITICAL = re.compile(
    "总统|政府|立法|立委|选举|选民|国民党|民进党|共产党|台独|中共|政党|政治|政策|议员|部长|院长|委员|公投|民主|两岸|大陆|香港|"
    "抗议|习近平|蔡英文|法案|条例|行政院|条文|共和国"
)
PIECE = 140  # 每段大约多少字：不超过训练的 --max_len 150
CHAT = {  # 文件：重复几次
    "open/sayit_short.train.txt": 1,
    "open/smilechat_short.train.txt": 1,
    "open/cpsycoun_short.train.txt": 1,
    "open/xpersona_zh.train.txt": 2,
    "open/anime_thesaurus.train.txt": 1,
    "lccc_base.valid.txt": 2,
    "lccc_toy.train.txt": 2,
    "kdconv.dev.txt": 1,
    "cped.valid.txt": 2,
    "chatterbot_zh.train.txt": 1,
}
SENTENCES = ("open/tatoeba_zh.lm.txt", "open/tencent_prompts.lm.txt")
GENERAL, GENERAL_SENTENCES = "open/sayit_full.train.txt", "open/commonvoice_zh_misc.lm.txt"
NUM_HELD_OUT = 2000  # lccc_base.valid.txt 最后这么多段留作测试


def split_long(dialogue, limit=PIECE):
    """在句子之间切成约 limit 字的段；短的上一句作为下一段的开头，上文因此不断。"""
    pieces, piece, length = [], [], 1
    for utterance in dialogue:
        cost = len(utterance) + 1
        if piece and length + cost > limit:
            pieces.append(piece)
            piece = piece[-1:] if len(piece[-1]) < 60 else []
            length = 1 + sum(len(u) + 1 for u in piece)
        piece = [*piece, utterance]
        length += cost
    return [*pieces, piece] if len(piece) > 1 or not pieces else pieces


def cut_at(dialogue, patterns):
    """不要的句子把对话切断；只剩一句的不要。"""
    run = []
    for utterance in [*dialogue, None]:
        if utterance is None or any(pattern.search(utterance) for pattern in patterns):
            if len(run) > 1:
                yield run
            run = []
        else:
            run.append(utterance)


def eight_characters(text):
    """去掉标点后，每连续的八个字。"""
    text = re.sub(r"[\W_]+", "", text)
    return {text[i : i + 8] for i in range(len(text) - 7)}


def read_sentences(path):
    """一行一句，不要粗俗和政治的。"""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [
        [line.strip()]
        for line in lines
        if line.strip() and not RUDE.search(line) and not POLITICAL.search(line)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("data"))
    parser.add_argument("--own_repeats", type=int, default=2)
    args = parser.parse_args()
    sources = [(args.corpora / name, repeats) for name, repeats in CHAT.items()]
    sources.append((ROOT / "data" / "train.txt", args.own_repeats))
    lccc = list(read_dialogues(args.corpora / "lccc_base.valid.txt"))[-NUM_HELD_OUT:]
    held_out = {gram for dialogue in lccc for u in dialogue for gram in eight_characters(u)}
    for path in sorted((ROOT / "tests" / "data").glob("[eo]*.txt")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            held_out |= eight_characters(line)

    def is_fresh(dialogue):
        return not any(eight_characters(utterance) & held_out for utterance in dialogue)

    general = [
        [utterance[:150] for utterance in piece]
        for dialogue in read_dialogues(args.corpora / GENERAL)
        for piece in split_long(dialogue, 150)
        if not RUDE.search(" ".join(piece)) and not POLITICAL.search(" ".join(piece))
    ]
    chat = []
    for path, repeats in sources:
        dialogues = list(read_dialogues(path))
        if path.name == "lccc_base.valid.txt":
            dialogues = dialogues[:-NUM_HELD_OUT]
        patterns = [RUDE, POLITICAL] if path.name.startswith("sayit") else [RUDE]
        runs = [run for dialogue in dialogues for run in cut_at(dialogue, patterns)]
        chat += [piece for run in runs for piece in split_long(run)] * repeats
    for name in SENTENCES:
        chat += read_sentences(args.corpora / name)
    general += read_sentences(args.corpora / GENERAL_SENTENCES)
    shuffler = random.Random(0)
    for name, dialogues in {"general": general, "chat": chat}.items():
        kept = [dialogue for dialogue in dialogues if is_fresh(dialogue)]
        shuffler.shuffle(kept)
        text = "\n\n".join("\n".join(dialogue) for dialogue in kept) + "\n"
        with gzip.open(args.output_dir / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            file.write(text)
        print(f"{name}: {len(kept)} dialogues, {len(text)} characters")


if __name__ == "__main__":
    main()
