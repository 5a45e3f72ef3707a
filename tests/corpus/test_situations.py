"""data/situations.txt：每个情景合格式，展开的对话由它的句子组成，与留作检验的文字不重复。"""

import random
import re
from pathlib import Path

import pytest

from chitchat.corpus.reader import read_dialogues
from tests.benchmarks.base_corpus import eight_characters
from tests.benchmarks.situations import chain, read_common_replies, read_situations

DATA = Path(__file__).resolve().parents[1] / "data"
EXAMPLE = """= 东西进水
X: 手机|耳机
U: 我的{X}掉水里了|{X}进水了
A: {X}还能开机吗？
 U: 开不了了|按了没反应
 A: 那先别充电，拿{X}去店里看看吧。
A: 快关掉，晾着。
"""


def write(tmp_path, text):
    path = tmp_path / "situations.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_dialogues_of_a_small_situation(tmp_path):
    (situation,) = read_situations(write(tmp_path, EXAMPLE))
    dialogues = situation.expand(100, random.Random(0))
    expected = set()
    for word in ("手机", "耳机"):
        for phrasing in (f"我的{word}掉水里了", f"{word}进水了"):
            expected |= {(phrasing, "快关掉，晾着。"), (phrasing, f"{word}还能开机吗？")}
            expected |= {
                (phrasing, f"{word}还能开机吗？", follow_up, f"那先别充电，拿{word}去店里看看吧。")
                for follow_up in ("开不了了", "按了没反应")
            }
    found = [tuple(dialogue) for dialogue in dialogues]
    assert len(found) == len(set(found))
    assert set(found) <= expected
    assert len(found) >= len(expected) - 2  # 随机抽的，难得漏一两段


def test_common_replies_of_the_category_follow_each_phrasing(tmp_path):
    number, replies = next(iter(read_common_replies().items()))
    text = EXAMPLE.replace("东西进水", f"东西进水 #{number}")
    (situation,) = read_situations(write(tmp_path, text))
    assert situation.name == "东西进水"
    found = {tuple(dialogue) for dialogue in situation.expand(1000, random.Random(0))}
    phrasings = {f"{word}进水了" for word in ("手机", "耳机")}
    assert found >= {(phrasing, replies[0]) for phrasing in phrasings}
    assert {dialogue[1] for dialogue in found} >= {"快关掉，晾着。", *replies}


def test_chained_dialogues_hold_each_dialogue_once():
    dialogues = [[f"问{i}", f"答{i}"] for i in range(300)]
    chained = chain(dialogues, random.Random(0))
    assert 200 < len(chained) < 290
    assert sorted(u for d in chained for u in d) == sorted(u for d in dialogues for u in d)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("B: 什么", "第 8 行"),
        ("A：中文冒号", "第 8 行"),
        (" U: 只有人说的话", "要有回复"),
        ("A: {Y}呢？", "没有列出的词"),
        ("= 空\n U: 前面没有回复", "第 9 行"),
        ("A: 两句||之间是空的", "第 8 行"),
        ("= 别的 #1000", "没有第 1000 类"),
    ],
)
def test_a_mistake_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_situations(write(tmp_path, EXAMPLE + line))


def test_shipped_situations_share_nothing_with_what_is_held_out():
    paths = [DATA / "everyday.txt", DATA / "openings.txt"]
    dialogues = [dialogue for path in paths for dialogue in read_dialogues(path)]
    held_out = {gram for texts in dialogues for text in texts for gram in eight_characters(text)}
    assert len(held_out) > 3000
    for replies in read_common_replies().values():
        assert len(set(replies)) >= 12
        assert not [text for text in replies if eight_characters(text) & held_out]
    for situation in read_situations():
        for template in situation.templates():
            for text in fill(template, situation.words):
                assert not eight_characters(text) & held_out, (situation.name, text)
                assert not re.search(r"[{}|]", text), (situation.name, text)


def fill(template, words):
    """每一个词都放进去试。"""
    texts = [template]
    for slot, choices in words.items():
        if f"{{{slot}}}" in template:
            texts = [text.replace(f"{{{slot}}}", word) for text in texts for word in choices]
    return texts
