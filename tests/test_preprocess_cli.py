"""preprocess.py：输出与逐句编码相同；输入有误时一句话、退出码 2，已有的文件不受影响。"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY_VOCAB
from transformers import BertTokenizerFast

from chitchat.cli import configure_logging, run_cli
from chitchat.errors import UserError
from preprocess import main

DIALOGUES = [
    ["你好吗", "我很好，hello 😂"],
    ["早上", "早！", "吃饭了？天气真不错…"],
    ["晚安\u0085再见", "a1b2\u2028是谁", "Hello WORLD"],  # 这两个字符不换行
    ["没见过的字"],
]
LF = "\n\n".join("\n".join(dialogue) for dialogue in DIALOGUES) + "\n"
CLS, SEP, UNK = 101, 102, 100


@pytest.fixture(autouse=True)
def _close_log() -> Iterator[None]:
    yield
    configure_logging(None, console=False)
    logging.getLogger("chitchat").propagate = True


@pytest.fixture
def preprocess(tmp_path: Path, vocab_path: Path) -> Callable[..., int]:
    """以 tmp_path 里的路径运行 main；关键字参数改换其中的路径。"""

    def run(**paths: Path) -> int:
        options = {
            "vocab_path": vocab_path,
            "train_path": tmp_path / "train.txt",
            "save_path": tmp_path / "out" / "train.pkl",
            "log_path": tmp_path / "logs" / "preprocess.log",
            **paths,
        }
        return main([text for name, value in options.items() for text in (f"--{name}", str(value))])

    return run


@pytest.fixture
def train_path(tmp_path: Path) -> Path:
    return tmp_path / "train.txt"


def load_plainly(path: Path) -> object:
    with path.open("rb") as file:
        return pickle.load(file)


def encode_one_by_one(vocab_path: Path) -> list[list[int]]:
    """不用本项目的代码：transformers 的分词器，每句调用一次。"""
    tokenizer = BertTokenizerFast(vocab=str(vocab_path), do_lower_case=True)
    return [
        [CLS, *(i for text in dialogue for i in tokenizer(text)["input_ids"][1:])]
        for dialogue in DIALOGUES
    ]


LINE_ENDS = {
    "LF": LF,
    "CRLF": LF.replace("\n", "\r\n"),
    "CR": LF.replace("\n", "\r"),
    "mixed": LF.replace("\n", "\r\n", 3).replace("！\n", "！\r"),
    "BOM": "\ufeff" + LF,
    "several blank lines": "\n\n" + LF.replace("\n\n", "\n\n\n\n\n") + "\n\n",
    "whitespace-only lines": " \n" + LF.replace("\n\n", "\n \t\u3000\n"),
    "blanks around": LF.replace("早！", "  早！\t"),
    "no final newline": LF.rstrip("\n"),
}


@pytest.mark.parametrize("text", LINE_ENDS.values(), ids=LINE_ENDS)
def test_plain_pickle_equals_encoding_utterance_by_utterance(
    text, preprocess, train_path, vocab_path, tmp_path
):
    train_path.write_bytes(text.encode())
    assert preprocess() == 0
    saved = load_plainly(tmp_path / "out" / "train.pkl")
    assert saved == encode_one_by_one(vocab_path)
    assert {type(saved), *map(type, saved), *(type(i) for row in saved for i in row)} == {list, int}


def test_corpus_longer_than_one_batch_keeps_its_order(
    preprocess, train_path, vocab_path, tmp_path, monkeypatch
):
    monkeypatch.setattr("preprocess.DIALOGUES_PER_BATCH", 3)
    train_path.write_text("\n".join([LF] * 5), encoding="utf-8")
    assert preprocess() == 0
    assert load_plainly(tmp_path / "out" / "train.pkl") == encode_one_by_one(vocab_path) * 5


def test_literal_special_tokens_are_text(preprocess, train_path, tmp_path):
    train_path.write_text("你[SEP]好\n[CLS]\n[PAD]\n", encoding="utf-8")
    assert preprocess() == 0
    ids = {token: i for i, token in enumerate(TINY_VOCAB)}
    # 小词表里没有方括号，它们是 [UNK]
    sep = [UNK, ids["s"], ids["##e"], ids["##p"], UNK]
    cls = [UNK, ids["c"], ids["##l"], ids["##s"], UNK]
    pad = [UNK, ids["p"], ids["##a"], ids["##d"], UNK]
    expected = [CLS, ids["你"], *sep, ids["好"], SEP, *cls, SEP, *pad, SEP]
    assert load_plainly(tmp_path / "out" / "train.pkl") == [expected]


def test_summary_counts_are_those_of_the_corpus(preprocess, train_path, tmp_path):
    # 长度 4、6、155，[CLS] 与各句的 [SEP] 计入；“龘”不在词表里
    train_path.write_text(f"你好\n\n我\n好吗\n\n{'好' * 150}龘\n龘\n", encoding="utf-8")
    assert preprocess() == 0
    log = (tmp_path / "logs" / "preprocess.log").read_text(encoding="utf-8")
    for line in (
        "dialogues=3\n",
        "utterances=5\n",
        "tokens=165\n",
        "length_mean=55.0 length_median=6 length_max=155\n",
        "unk_tokens=2 unk_share=1.2121%\n",
        "dialogues_longer_than_150=1\n",
    ):
        assert line in log


BROKEN_VOCAB = "\n".join(token for token in TINY_VOCAB if token != "[SEP]")
ERRORS = {
    "missing corpus": ("train_path", None, ["train.txt", "--train_path"]),
    "corpus is a folder": ("train_path", Path, ["train.txt", "--train_path"]),
    "empty corpus": ("train_path", b"", ["train.txt", "没有对话"]),
    "only a BOM": ("train_path", b"\xef\xbb\xbf", ["train.txt", "没有对话"]),
    "only blank lines": ("train_path", b"\n \r\n\t\n\r", ["train.txt", "没有对话"]),
    "not UTF-8": (
        "train_path",
        "早上好\n你好\n".encode() + b"\xff\n",
        ["train.txt", "第 3 行", "UTF-8"],
    ),
    "late bad byte": ("train_path", LF.encode() + b"\xff", ["第 13 行", "0xFF"]),
    "missing vocabulary": ("vocab_path", None, ["v.txt", "--vocab_path"]),
    "empty vocabulary": ("vocab_path", b"", ["v.txt", "[SEP]"]),
    "no [SEP]": ("vocab_path", BROKEN_VOCAB.encode(), ["v.txt", "[SEP]"]),
    "repeated entry": ("vocab_path", "\n".join([*TINY_VOCAB, "你"]).encode(), ["v.txt", "“你”"]),
    "folder without vocabulary": ("vocab_path", Path, ["v.txt", "vocab.txt"]),
}


@pytest.mark.parametrize(("option", "content", "named"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_sentence_and_keeps_the_existing_pickle(
    option, content, named, preprocess, train_path, tmp_path, capsys
):
    train_path.write_text(LF, encoding="utf-8")
    assert preprocess() == 0
    saved = tmp_path / "out" / "train.pkl"
    before = saved.read_bytes()
    bad = tmp_path / "bad" / ("train.txt" if option == "train_path" else "v.txt")
    bad.parent.mkdir()
    if content is Path:
        bad.mkdir()
    elif content is not None:
        bad.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: preprocess(**{option: bad}))
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("错误：")
    assert sentence.count("\n") == 1
    assert [name for name in [*named, str(bad)] if name not in sentence] == []
    assert saved.read_bytes() == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["train.pkl", "train.pkl.json"]


def test_save_path_that_cannot_be_written_is_one_sentence(preprocess, train_path, tmp_path, capsys):
    train_path.write_text(LF, encoding="utf-8")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: preprocess(save_path=tmp_path / "file" / "train.pkl"))
    assert stopped.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_check_does_not_build_a_vocabulary(train_path, vocab_path, tmp_path):
    train_path.write_text(LF, encoding="utf-8")
    argv = ["--train_path", str(train_path), "--vocab_path", str(tmp_path / "new.txt")]
    with pytest.raises(UserError, match="去掉 --check"):
        main([*argv, "--check", "--build_vocab", "300"])
    assert not (tmp_path / "new.txt").exists()


def test_check_writes_nothing_not_even_the_log(train_path, vocab_path, tmp_path, capsys):
    train_path.write_text(LF, encoding="utf-8")
    Path("data").write_text("日志的文件夹建不成")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = ["--train_path", str(train_path), "--vocab_path", str(vocab_path), "--check"]
    for log_options in ([], ["--log_path", str(tmp_path / "logs" / "x.log")]):
        assert main([*options, *log_options]) == 0
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert capsys.readouterr().err == ""


def test_unwritable_default_log_does_not_stop_the_work(train_path, vocab_path, tmp_path, capsys):
    train_path.write_text(LF, encoding="utf-8")
    Path("data").write_text("日志的文件夹建不成")
    options = ["--train_path", str(train_path), "--vocab_path", str(vocab_path)]
    assert main([*options, "--save_path", str(tmp_path / "t.pkl")]) == 0
    assert load_plainly(tmp_path / "t.pkl") == encode_one_by_one(vocab_path)
    assert capsys.readouterr().err.count("警告：日志 data/preprocess.log 打不开") == 1
    with pytest.raises(OSError, match="data"):
        main([*options, "--save_path", str(tmp_path / "t2.pkl"), "--log_path", "data/mine.log"])


def test_default_vocabulary_is_found_from_any_folder(train_path, tmp_path, monkeypatch):
    train_path.write_text(LF, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["--train_path", str(train_path), "--save_path", "t.pkl"]) == 0
    assert len(load_plainly(tmp_path / "t.pkl")) == len(DIALOGUES)


def test_list_speakers_writes_nothing_and_survives_a_limit(train_path, tmp_path, capsys):
    train_path.write_text(LF, encoding="utf-8")
    other = tmp_path / "b.txt"
    other.write_text(LF, encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    options = ["--train_path", str(train_path), str(other), "--log_path", str(tmp_path / "log")]
    assert main([*options, "--list_speakers", "--max_dialogues", "1"]) == 0
    assert set(tmp_path.rglob("*")) == before
    assert "LF 换行" in capsys.readouterr().out
