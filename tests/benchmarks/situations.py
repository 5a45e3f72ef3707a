"""把 data/situations.txt 的情景展开成训练 model/base 用的对话。

用法: python -m tests.benchmarks.situations

一个情景是人会说的一件事的许多种说法，和对每一种说法都接得上的回复::

    = 东西进水 #53
    X: 手机|耳机|手表
    U: 我的{X}掉水里了|{X}进水了怎么办
    A: {X}还能开机吗？
     U: 开不了了|按了没反应
     A: 那先别充电，拿去店里看看吧。
    A: 快关掉，擦干，放通风的地方晾着。

``X``、``Y`` 是能换着说的词，一段对话里换成同一个；缩进的是后文，可以没有。
说法、回复、后文和词各取一个就是一段对话；五分之一的对话接上另一个情景，因为人会换话题。
``#53`` 是类别，没有就是哪一类都不合。data/common_replies.txt 里每一类有二十来句家常的回复，
对这一类的话都接得上：
小模型听得懂一句话属于哪一类，说不准细节，所以多半的回复从那里取，它拿不准时才有话可说。
"""

import argparse
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_PATH = ROOT / "data" / "situations.txt"
COMMON_REPLIES_PATH = ROOT / "data" / "common_replies.txt"
HEADING = re.compile(r"= (.+?)(?: #([0-9]+))?")
LINE = re.compile(r"( ?)([XYUA]): (.+)")
FOLLOW_UP_SHARE = 0.75  # 有后文的回复，多少带上后文
COMMON_SHARE = 0.6  # 有类别的情景，多少回复是家常的
CHAINED_SHARE = 0.2  # 多少段对话后面接着另一段
WORDS_GAIN = 1.35, 0.75  # 有能换的词的情景多展开一些，没有的少一些


@dataclass
class Reply:
    """一句回复，和它的后文：人接着说的话、小柚再答的话，都空就是没有。"""

    text: str
    follow_ups: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


@dataclass
class Situation:
    """一个情景；words 的键是 X、Y，common_replies 是它那一类的家常回复，没有类别就空着。"""

    name: str
    common_replies: list[str] = field(default_factory=list)
    words: dict[str, list[str]] = field(default_factory=dict)
    phrasings: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def templates(self) -> list[str]:
        """全部的句子，{X} 还没有换成词；不含家常的回复。"""
        texts = [*self.phrasings]
        for reply in self.replies:
            texts += [reply.text, *reply.follow_ups, *reply.answers]
        return texts

    def sample(self, phrasing: str, rng: random.Random) -> list[str]:
        """以 phrasing 开头的一段对话，两句或四句。"""
        is_common = self.common_replies and rng.random() < COMMON_SHARE
        reply = Reply(rng.choice(self.common_replies)) if is_common else rng.choice(self.replies)
        dialogue = [phrasing, reply.text]
        if reply.follow_ups and rng.random() < FOLLOW_UP_SHARE:
            dialogue += [rng.choice(reply.follow_ups), rng.choice(reply.answers)]
        for slot, words in self.words.items():
            word = rng.choice(words)
            dialogue = [utterance.replace(f"{{{slot}}}", word) for utterance in dialogue]
        return dialogue

    def expand(self, count: int, rng: random.Random) -> list[list[str]]:
        """至多 count 段互不相同的对话，各种说法一样多。"""
        found = {}
        for _ in range(3 * count // len(self.phrasings) + 1):
            for phrasing in rng.sample(self.phrasings, len(self.phrasings)):
                if len(found) < count:
                    dialogue = self.sample(phrasing, rng)
                    found[tuple(dialogue)] = dialogue
        return list(found.values())


def read_common_replies(path: Path = COMMON_REPLIES_PATH) -> dict[str, list[str]]:
    """类别的编号 → 那一类的家常回复；一类是 ``= 说明 #编号`` 一行，下面一行一句。"""
    replies = {}
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        heading = HEADING.fullmatch(line)
        if heading:
            current = replies.setdefault(heading[2], [])
        else:
            current.append(line)
    return replies


def read_situations(path: Path = DEFAULT_PATH) -> list[Situation]:
    """读全部情景，和它们那一类的家常回复。

    Raises:
        ValueError: 有一行不合格式，或少了说法、回复、词、后文；说明在第几行或哪个情景。
    """
    common_replies = read_common_replies()
    situations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        heading = HEADING.fullmatch(line)
        if heading:
            if heading[2] and heading[2] not in common_replies:
                raise ValueError(f"{path} 第 {number} 行：没有第 {heading[2]} 类的家常回复")
            situations.append(Situation(heading[1], common_replies.get(heading[2], [])))
        elif line:
            matched = LINE.fullmatch(line)
            is_early = not situations or (matched and matched[1] and not situations[-1].replies)
            if not matched or is_early or "||" in line:
                raise ValueError(f"{path} 第 {number} 行不认识：{line}")
            _add_line(situations[-1], *matched.groups())
    for situation in situations:
        _check(situation)
    return situations


def _add_line(situation, indent, kind, text):
    parts = text.split("|")
    if kind in "XY":
        situation.words[kind] = parts
    elif not indent and kind == "U":
        situation.phrasings += parts
    elif not indent:
        situation.replies += map(Reply, parts)
    else:
        reply = situation.replies[-1]
        (reply.follow_ups if kind == "U" else reply.answers).extend(parts)


def _check(situation):
    for reply in situation.replies:
        if bool(reply.follow_ups) != bool(reply.answers):
            raise ValueError(f"{situation.name}：后文要有人说的话，也要有回复")
    slots = {slot for text in situation.templates() for slot in re.findall(r"\{(.*?)\}", text)}
    if not situation.phrasings or not situation.replies or slots - set(situation.words):
        raise ValueError(f"{situation.name}：少了说法、回复，或 {slots} 里有没有列出的词")


def chain(dialogues: list[list[str]], rng: random.Random) -> list[list[str]]:
    """打乱，再把一部分两两接起来。"""
    remaining = rng.sample(dialogues, len(dialogues))
    chained = []
    while remaining:
        dialogue = remaining.pop()
        if remaining and rng.random() < CHAINED_SHARE:
            dialogue = dialogue + remaining.pop()
        chained.append(dialogue)
    return chained


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--situations_path", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--per_situation", type=int, default=28)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save_path", type=Path, default=ROOT / "data" / "situations.train.txt")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    dialogues = []
    for situation in read_situations(args.situations_path):
        gain = WORDS_GAIN[0 if situation.words else 1]
        dialogues += situation.expand(round(args.per_situation * gain), rng)
    dialogues = chain(dialogues, rng)
    text = "\n\n".join("\n".join(dialogue) for dialogue in dialogues)
    args.save_path.write_text(text + "\n", encoding="utf-8")
    print(f"{args.save_path}：{len(dialogues)} 段，{len(text)} 字")


if __name__ == "__main__":
    main()
