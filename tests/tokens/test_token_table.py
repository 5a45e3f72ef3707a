"""train.pkl：只有列表和整数，带代码的被拒绝且不执行。"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest

from chitchat.errors import UserError
from chitchat.tokens.batch_encoder import EncodedBatch
from chitchat.tokens.token_table import TokenTable, load_token_table
from chitchat.tokens.token_writer import check_folder, open_writer

VOCAB_SIZE = 13317
DIALOGUES = [[101, 872, 102], [101, 13316, 0, 102, 7, 102], [101, 102]]


def save_token_lists(path: Path, rows: list[list[int]], **meta: object) -> None:
    """分两批写：文件夹或 .pkl。"""
    with open_writer(path, VOCAB_SIZE, meta) as writer:
        writer.write(EncodedBatch.from_rows(rows[:1]))
        writer.write(EncodedBatch.from_rows(rows[1:]))


def rows_of(table: TokenTable) -> list[list[int]]:
    return [table[i].tolist() for i in range(len(table))]


def test_saved_dialogues_load_unchanged(tmp_path):
    path = tmp_path / "data" / "train.pkl"
    save_token_lists(path, DIALOGUES)
    table = load_token_table(path, VOCAB_SIZE)
    assert rows_of(table) == DIALOGUES
    assert table.lengths.tolist() == [3, 6, 2]
    assert table.tokens.tolist() == [token for row in DIALOGUES for token in row]


def test_plain_pickle_reads_lists_of_ints_in_protocol_4(tmp_path):
    path = tmp_path / "train.pkl"
    save_token_lists(path, DIALOGUES)
    content = path.read_bytes()
    dialogues = pickle.loads(content)
    assert dialogues == DIALOGUES
    assert {type(dialogues), *map(type, dialogues)} == {list}
    assert {type(token) for row in dialogues for token in row} == {int}
    assert content[:2] == b"\x80\x04"  # PROTO 4
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert not opcodes & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_lists_pickled_by_others_are_read(tmp_path, protocol):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps(DIALOGUES, protocol=protocol))
    assert rows_of(load_token_table(path, VOCAB_SIZE)) == DIALOGUES


def test_empty_dialogues_are_left_out(tmp_path):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps([[], [101, 102], [], [101, 5, 102], []]))
    assert rows_of(load_token_table(path, VOCAB_SIZE)) == [[101, 102], [101, 5, 102]]


def test_table_without_dialogues_has_no_rows():
    table = TokenTable.from_dialogues([])
    assert len(table) == 0
    assert table.lengths.tolist() == []


def test_pickled_mapped_table_is_only_its_path(tmp_path):
    save_token_lists(tmp_path / "corpus", DIALOGUES * 10_000)
    content = pickle.dumps(load_token_table(tmp_path / "corpus", VOCAB_SIZE))
    assert len(content) < 1000
    again = pickle.loads(content)
    assert isinstance(again.tokens, np.memmap)
    assert rows_of(again) == DIALOGUES * 10_000
    assert pickle.dumps(again) == content


def test_pickled_mapped_table_is_refused_once_the_folder_is_another(tmp_path):
    """训练到一半又运行了 preprocess.py，下一轮的子进程不能悄悄读到别的对话。"""
    save_token_lists(tmp_path / "corpus", DIALOGUES)
    content = pickle.dumps(load_token_table(tmp_path / "corpus", VOCAB_SIZE))
    save_token_lists(tmp_path / "corpus", DIALOGUES[::-1])
    with pytest.raises(UserError, match="corpus"):
        pickle.loads(content)


def test_pickled_table_in_memory_keeps_its_content():
    table = TokenTable.from_dialogues(DIALOGUES)
    assert rows_of(pickle.loads(pickle.dumps(table))) == DIALOGUES


class OpensFile:
    """反序列化时会创建一个文件。"""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return io.open, (self.path, "w")


class RunsCommand(OpensFile):
    """反序列化时会运行一条 shell 命令。"""

    def __reduce__(self) -> tuple:
        return os.system, (f"echo > {self.path}",)


@pytest.mark.parametrize("payload", [OpensFile, RunsCommand])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_with_code_is_refused_and_runs_none(tmp_path, payload, protocol):
    marker, path = tmp_path / "executed", tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps([[101, 102], payload(marker)], protocol=protocol))
    with pytest.raises(UserError, match="只含列表和整数") as error:
        load_token_table(path, VOCAB_SIZE)
    assert str(path) in str(error.value)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # 换成普通的 pickle，代码真的会执行
    assert marker.exists()


GOOD = pickle.dumps(DIALOGUES, protocol=4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        "你好\n你好呀\n\n再见\n".encode(),
        b"hello\nworld\n",
        b"(lp0\nI1\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD[:10] + b"\xff" + GOOD[11:],  # 帧长度被改成一个天文数字
        b"\x80\x04K\x01K\x02a.",  # 向整数追加
        b"\x80\x04]}b.",  # 给列表设属性
        b"r\xff\xff\xff\x7f.",
    ],
)
def test_file_that_is_no_pickle_is_refused(tmp_path, content):
    path = tmp_path / "train.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"preprocess\.py") as error:
        load_token_table(path, VOCAB_SIZE)
    assert str(path) in str(error.value)


RECURSIVE: list = [[101, 102]]
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    "content",
    [None, 5, {}, "你好", (1, 2), [1, 2], [(1, 2)], [[1.0]], [["1"]], [[True]], [[[1]]], [[None]],
     [[1], 2], RECURSIVE],
)  # fmt: skip
def test_other_content_is_refused(tmp_path, content):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"list\[list\[int\]\]") as error:
        load_token_table(path, VOCAB_SIZE)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [[], [[]], [[], []]])
def test_no_dialogue_is_reported(tmp_path, content):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="没有对话") as error:
        load_token_table(path, VOCAB_SIZE)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("wrong_id", [VOCAB_SIZE, 2**32 + 5, 2**70, -1, -(2**63) - 1])
def test_id_outside_the_vocabulary_is_named(tmp_path, wrong_id):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps([[101, 102], [101, wrong_id, 102]]))
    with pytest.raises(UserError, match="--vocab_path") as error:
        load_token_table(path, VOCAB_SIZE)
    for name in (str(path), str(wrong_id), str(VOCAB_SIZE)):
        assert name in str(error.value)


def test_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    for path in (tmp_path / "train.pkl", tmp_path):
        with pytest.raises(UserError, match=r"python preprocess\.py") as error:
            load_token_table(path, VOCAB_SIZE)
        assert str(path) in str(error.value)


def test_table_takes_at_most_an_eighth_of_the_lists():
    """列表里每个 id 占 8 字节指针加 28 字节的 int 对象。"""
    dialogues = [list(range(1000, 1100)) for _ in range(100)]
    table = TokenTable.from_dialogues(dialogues)
    assert table.tokens.nbytes + table.offsets.nbytes <= 10_000 * 36 / 8
    assert np.issubdtype(table.tokens.dtype, np.unsignedinteger)


@pytest.mark.parametrize("num_batches", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 999, 1000, 1001, 2500])
def test_batches_pickled_one_by_one_read_as_one_list(tmp_path, num_batches, size):
    """1000 是 pickle 自己分组的大小；id 跨过 1、2、4 字节的界线。"""
    rows = [[i, 255, 256, 65535, 65536, 2**31 - 1, i * 97] for i in range(size)]
    path = tmp_path / "a.pkl"
    with open_writer(path, 2**31, {}) as writer:
        for _ in range(num_batches):
            writer.write(EncodedBatch.from_rows(rows))
    assert pickle.loads(path.read_bytes()) == rows * num_batches
    assert pickle._loads(path.read_bytes()) == rows * num_batches  # 纯 Python 的实现也认


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "u1"), (257, "u2"), (13317, "u2"), (65536, "u2"), (65537, "u4")],
)
def test_folder_maps_to_the_same_rows_in_the_smallest_type(tmp_path, vocab_size, dtype):
    rows = [[vocab_size - 1, 0], [5], list(range(200))]
    with open_writer(tmp_path / "t", vocab_size, {"vocab_size": vocab_size}) as writer:
        writer.write(EncodedBatch.from_rows(rows[:2]))
        writer.write(EncodedBatch.from_rows([]))
        writer.write(EncodedBatch.from_rows(rows[2:]))
    table = load_token_table(tmp_path / "t", vocab_size)
    assert rows_of(table) == rows
    assert isinstance(table.tokens, np.memmap)
    assert table.tokens.dtype == np.load(tmp_path / "t" / "tokens.npy").dtype == np.dtype(dtype)
    with pytest.raises(UserError, match="超出模型的词表大小"):
        load_token_table(tmp_path / "t", vocab_size - 1)


@pytest.mark.parametrize("name", ["train.pkl", "train"])
def test_another_vocabulary_is_refused(tmp_path, name):
    path = tmp_path / name
    meta = {"vocab_fingerprint": "abc", "dialogues": 3, "tokens": 11, "vocab_path": "v.txt"}
    save_token_lists(path, DIALOGUES, **meta)
    for fingerprint in ("abc", ""):
        assert rows_of(load_token_table(path, VOCAB_SIZE, fingerprint)) == DIALOGUES
    with pytest.raises(UserError, match=r"另一份词表.*v\.txt.*--vocab_path"):
        load_token_table(path, VOCAB_SIZE, "def")


def test_note_left_by_an_older_pickle_is_not_taken_for_this_one(tmp_path):
    path = tmp_path / "train.pkl"
    save_token_lists(path, DIALOGUES, vocab_fingerprint="abc", dialogues=3, tokens=11)
    path.write_bytes(pickle.dumps([[101, 7, 102]]))
    assert rows_of(load_token_table(path, VOCAB_SIZE, "def")) == [[101, 7, 102]]


def test_broken_folder_is_refused(tmp_path):
    path = tmp_path / "train"
    save_token_lists(path, DIALOGUES)
    good = {file: file.read_bytes() for file in path.iterdir()}
    for file, content in good.items():
        file.write_bytes(content[: len(content) - 3])
        with pytest.raises(UserError, match="已损坏"):
            load_token_table(path, VOCAB_SIZE)
        file.write_bytes(content)
    np.save(path / "offsets.npy", np.array([0, 3, 4]))
    with pytest.raises(UserError, match="对不上"):
        load_token_table(path, VOCAB_SIZE)


def test_folder_with_other_files_is_never_replaced(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    check_folder(folder)
    (folder / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine\.txt"), open_writer(folder, 300, {}):
        pass
    assert (folder / "mine.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["train.pkl", "train"])
def test_failure_while_writing_keeps_what_was_there(tmp_path, name):
    path = tmp_path / name
    save_token_lists(path, DIALOGUES)
    with pytest.raises(RuntimeError):  # noqa: PT012, SIM117
        with open_writer(path, VOCAB_SIZE, {}) as writer:
            writer.write(EncodedBatch.from_rows([[1, 2, 3]]))
            raise RuntimeError
    assert rows_of(load_token_table(path, VOCAB_SIZE)) == DIALOGUES
    assert not list(tmp_path.glob(".*"))


def test_corpus_given_as_training_data_is_named_with_the_command_that_helps(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("你好\n在的\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"像是语料.*preprocess.py --train_path"):
        load_token_table(path, VOCAB_SIZE)
