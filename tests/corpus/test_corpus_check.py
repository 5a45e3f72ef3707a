"""检查与筛选、由语料学词表：报告的数是手算的，什么也不多写。"""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizerFast

from chitchat.cli import configure_logging
from chitchat.corpus.check import find_suspicions, quantile
from chitchat.errors import UserError
from chitchat.tokens.tokenizer import encode_utterances, load_tokenizer
from chitchat.tokens.vocabulary_learning import KEPT_TOKENS
from preprocess import main

TEXT = """你好
再见

你好
再见

龘龘好龘
https://a.com

鈥攁\u0085b
锟斤拷
……
"""


@pytest.fixture(autouse=True)
def _close_log() -> Iterator[None]:
    yield
    configure_logging(None, console=False)


@pytest.fixture
def run(tmp_path: Path, vocab_path: Path) -> Callable[..., int]:
    """在 tmp_path 里运行 main。"""
    (tmp_path / "train.txt").write_text(TEXT, encoding="utf-8")

    def call(*options: object, vocab: Path = vocab_path) -> int:
        paths = ["--train_path", tmp_path / "train.txt", "--log_path", tmp_path / "log"]
        paths += ["--save_path", tmp_path / "train.pkl", "--vocab_path", vocab]
        return main([str(option) for option in [*paths, *options]])

    return call


def test_report_says_what_was_understood_and_writes_nothing(run, tmp_path, capsys):
    assert run("--check", "--max_len", 8) == 0
    report = capsys.readouterr().out
    for text in (
        "train.txt：当作 text（一行一句），UTF-8 编码，LF 换行，4 段对话\n",
        "对话 4 段，共 9 句",
        "'龘'×3",
        "重复的对话：1（25.00%）",
        "重复的句子：2（22.22%）",
        "可疑（乱码）：1",
        "train.txt 第 11 行：锟斤拷",
        "可疑（不算换行的换行符）：1",
        "train.txt 第 10 行：鈥攁\\x85b",
        "可疑（网址）：1",
        "train.txt 第 8 行：https",
        "可疑（没有文字）：1",
        "第 1 段按这样训练：[CLS]你好[SEP]再见[SEP]",
        "1 段对话与前面的完全相同，可用 --drop_duplicates 去掉",
    ):
        assert text in report
    assert {path.name for path in tmp_path.iterdir()} == {"train.txt", "tiny_vocab.txt"}


def test_filters_reach_the_pickle_and_the_note(run, tmp_path):
    assert run("--drop_duplicates", "--max_turns", 2, "--max_dialogues", 1) == 0
    assert len(pickle.loads((tmp_path / "train.pkl").read_bytes())) == 1
    note = json.loads((tmp_path / "train.pkl.json").read_text(encoding="utf-8"))
    assert (note["dialogues"], note["utterances"], note["options"]["max_turns"]) == (1, 2, 2)
    with pytest.raises(UserError, match="--min_turns"):
        run("--min_turns", 9)


def test_folder_holds_the_same_ids_as_the_pickle(run, tmp_path):
    assert run() == run("--save_path", tmp_path / "table") == 0
    rows = pickle.loads((tmp_path / "train.pkl").read_bytes())
    tokens, offsets = (np.load(tmp_path / "table" / f"{n}.npy") for n in ("tokens", "offsets"))
    assert tokens.tolist() == [token for row in rows for token in row]
    assert offsets.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]
    paths = [tmp_path / "train.pkl.json", tmp_path / "table" / "meta.json"]
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert [sorted(note.pop("files")) for note in notes] == [
        ["train.pkl"],
        ["offsets.npy", "tokens.npy"],
    ]
    assert notes[0] == notes[1]


def test_learned_vocabulary_keeps_letters_and_is_used_at_once(run, tmp_path):
    path = tmp_path / "mine.txt"
    size = len(KEPT_TOKENS) + 6
    assert run("--build_vocab", size, vocab=path) == 0
    entries = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert entries[: len(KEPT_TOKENS)] == list(KEPT_TOKENS)
    assert entries[100:104] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(entries) == len(set(entries)) == size
    assert {"好", "龘"} <= set(entries)  # 出现最多的字
    note = json.loads((tmp_path / "train.pkl.json").read_text(encoding="utf-8"))
    assert note["vocab_size"] == size
    with pytest.raises(UserError, match="已经存在"):
        run("--build_vocab", size, vocab=path)


def test_wrong_bert_vocabulary_is_refused_and_nothing_written(run, tmp_path, vocab_path):
    with pytest.raises(UserError, match="bert-base-chinese"):
        run("--bert_vocab", vocab_path, vocab=tmp_path / "new.txt")
    assert not (tmp_path / "new.txt").exists()


def test_histogram_is_a_png(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("--plot", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("今天天气真不错", []),
        ("café à la carte", []),
        ("ä½\xa0å¥½", ["乱码", "控制字符"]),
        ("字" * 501, ["太长"]),
        ("😂", ["没有文字"]),
    ],
)
def test_suspicions(text, found):
    assert [name for name in find_suspicions(text) if name != "控制字符"] == [
        name for name in found if name != "控制字符"
    ]


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.9, 1])
def test_quantile_is_that_of_the_sorted_values(share):
    values = [3, 3, 3, 1, 9, 9, 4, 4, 4, 4, 2]
    expected = np.quantile(values, share, method="lower")
    assert quantile(Counter(values), share) == expected


def test_random_strings_of_all_unicode_encode_as_bert_does(vocab_path):
    generator = random.Random(0)
    pools = [range(32, 127), range(0x4E00, 0x9FFF), range(0x300, 0x370), range(0x20)]
    pools += [range(0x1F300, 0x1FAFF), [*range(0xD800), *range(0xE000, 0x110000)]]
    texts = [
        "".join(chr(generator.choice(generator.choice(pools))) for _ in range(length))
        for length in [*range(40)] * 25 + [3000]
    ]
    bert = BertTokenizerFast(vocab=str(vocab_path), do_lower_case=True)
    ours = encode_utterances(load_tokenizer(vocab_path), texts)
    assert ours == bert(texts, add_special_tokens=False)["input_ids"]


def test_mixed_line_ends_are_reported(run, tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes("你好\r\n再见\n\n好\r".encode())
    assert run("--check") == 0
    line = capsys.readouterr().out.split("\n")[0]
    assert all(name in line for name in ("CR、", "LF", "CRLF", "混用"))


def test_one_long_dialogue_is_doubted_before_it_is_cut(run, tmp_path, capsys):
    """几十句没有空行：先问是不是忘了空行，而不是劝人把 --max_len 调大。"""
    (tmp_path / "train.txt").write_text("你好\n" * 30, encoding="utf-8")
    assert run("--check", "--max_len", 8) == 0
    report = capsys.readouterr().out
    assert "train.txt 没有分段，30 句成了一段对话：若不止一段，请在各段之间加一个空行；" in report
    assert "把 train.py 的 --max_len 调大" not in report
    assert run("--check", "--max_len", 8, "--format", "text") == 0  # 照着做
    report = capsys.readouterr().out
    assert "没有分段" not in report
    assert "建议：1 段对话比 --max_len 8 长" in report
    (tmp_path / "train.txt").write_text("你好\n" * 30 + "\n在\n好\n", encoding="utf-8")
    assert run("--check") == 0
    assert "没有分段" not in capsys.readouterr().out


@pytest.mark.parametrize(("num_utterances", "is_doubted"), [(30, False), (201, True)])
@pytest.mark.parametrize("name", ["a.json", "a.tsv"])
def test_blank_lines_are_not_the_remedy_where_they_mean_nothing(
    run, tmp_path, capsys, name, num_utterances, is_doubted
):
    utterances = ["你好"] * num_utterances
    text = json.dumps([utterances]) if name == "a.json" else "\t".join(utterances)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert run("--train_path", tmp_path / name, "--check", "--max_len", 8) == 0
    report = capsys.readouterr().out
    assert "空行" not in report
    assert (f"{name} 没有分段，201 句成了一段对话：若不止一段，" in report) == is_doubted
    assert ("把 train.py 的 --max_len 调大" in report) == (not is_doubted)


def test_a_folder_of_one_dialogue_files_is_not_doubted(run, tmp_path, capsys):
    folder = tmp_path / "chats"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("你好\n" * 30, encoding="utf-8")
    assert run("--train_path", folder, "--check") == run("--train_path", folder) == 0
    assert "没有分段" not in "".join(capsys.readouterr())
    assert run("--train_path", folder / "0.txt") == 0
    assert "0.txt 没有分段，30 句" in capsys.readouterr().err


def test_single_utterances_are_explained_as_the_format_parts_them(run, tmp_path, capsys):
    for name, text, remedy in (
        ("a.txt", "\n\n".join(["你好"] * 20), "请去掉同一段对话各句之间的空行"),
        ("a.json", json.dumps([["你好"]] * 20), "请看看各句是怎样分成段的"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert run("--train_path", tmp_path / name, "--check") == 0
        report = capsys.readouterr().out
        assert f"{name} 每段都只有一句话，学不到怎样回答：{remedy}" in report


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), None),
        (("--drop_duplicates",), "读到 5 段，--drop_duplicates 留下 4 段"),
        (("--drop_duplicates", "--min_turns", 2, "--max_dialogues", 1), None),  # 够了就不再读
        (
            ("--min_turns", 3, "--max_dialogues", 1),
            "读到 3 段，--min_turns 3、--max_dialogues 1 留下 1 段",
        ),
        (("--min_turns", 3), "读到 5 段，--min_turns 3 留下 2 段"),
    ],
)
def test_what_the_filters_left_is_said(run, tmp_path, capsys, options, line):
    text = "一\n二\n\n一\n二\n\n一\n二\n三\n\n三\n二\n\n一\n三\n三\n"
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    assert run(*options) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("读到")]
    assert said == ([line] if line else [])


def test_only_the_filters_that_can_leave_nothing_are_blamed(run):
    """原来的五段都短于九句；--max_dialogues、--drop_duplicates 总会留下一段。"""
    with pytest.raises(UserError, match="都被 --min_turns 9 筛掉了，请放宽"):
        run("--min_turns", 9, "--max_dialogues", 5, "--drop_duplicates")


def test_clean_counts_only_rules_that_did_something(run, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("你好 @小明 http://a.cn 在吗\n在\n", encoding="utf-8")
    assert run("--clean") == 0
    assert "    --clean 改动或去掉 2 处：@某人 1、网址 1\n" in capsys.readouterr().out


def test_an_unknown_speaker_in_a_folder_is_answered_with_all_who_are_there(run, tmp_path):
    """数的是整个文件夹，不是第一个文件；改成所说的任何一个就行。"""
    folder = tmp_path / "chats"
    folder.mkdir()
    for number in range(3):
        messages = [
            f"2026-01-02 20:{minute:02d}:30 {'小明' if minute % 2 else f'网友{number}'}\n话\n\n"
            for minute in range(10)
        ]
        (folder / f"{number}.txt").write_text("".join(messages), encoding="utf-8")
    options = ("--train_path", folder, "--reply_speaker")
    with pytest.raises(
        UserError, match=r"30 条消息.*小明 15 条、网友0 5 条、网友1 5 条、网友2 5 条："
    ):
        run(*options, "小王")
    assert run(*options, "小明") == 0


def write_log(path: Path, *messages: tuple[int, str, str]) -> Path:
    """几时几分（分钟数）、谁、说了什么。"""
    rows = [f"2026-01-02 {m // 60:02}:{m % 60:02}:00,{who},{text}" for m, who, text in messages]
    path.write_text("\n".join(["time,sender,content", *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([(0, "小明", "在吗"), (1, "网友", "在")], "所指的人说了 1 条，但没有答过别人"),
        ([(0, "网友", "在吗"), (90, "小明", "在")], "所指的人说了 1 条，但没有答过别人.*--gap_mi"),
        ([(0, "网友", "在吗"), (1, "小明", "ok")], "都被 --clean 去掉了，请去掉 --clean"),
        ([(0, "小明", "在吗"), (1, "小明", "在")], "2 条消息都是 小明 一个人说的"),
        ([(0, "网友", "在吗"), (1, "网友", "在")], "2 条消息都是 网友 一个人说的"),
        ([(0, "网友", "在吗"), (1, "", "在")], "里没有 --r.*网友 1 条、（没有名字） 1 条：请改成"),
    ],
)
def test_a_speaker_who_answers_nobody_is_told_why(run, tmp_path, messages, sentence):
    """有这个人时，不劝人“改成其中一个”。"""
    path = write_log(tmp_path / "a.csv", *messages)
    with pytest.raises(UserError, match=sentence) as error:
        run("--train_path", path, "--reply_speaker", "小明", "--clean")
    assert ("请改成其中一个" in str(error.value)) == ("没有名字" in sentence)


def test_a_chat_log_that_clean_emptied_is_told_so(run, tmp_path):
    """不是“每一段都只有一个人说话”。"""
    path = write_log(tmp_path / "a.csv", (0, "小明", "hi"), (1, "小红", "hello"))
    with pytest.raises(UserError, match="都被 --clean 去掉了，请去掉 --clean"):
        run("--train_path", path, "--clean")


def test_a_speaker_known_by_an_old_nickname_is_known(run, tmp_path):
    path = tmp_path / "a.txt"
    messages = (("0", "小明"), ("1", "小明改名了"))
    lines = [f"2026-01-02 20:0{minute}:00 {name}(12345)\n话\n" for minute, name in messages]
    lines.append("2026-01-02 20:02:00 小红(67890)\n好\n")
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="所指的人说了 2 条，但没有答过别人"):
        run("--train_path", path, "--reply_speaker", "小明")
