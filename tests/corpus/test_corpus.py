"""语料：换行与空行的各种写法读出同样的对话；坏文件说清楚坏在哪里。"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from chitchat.corpus.reader import read_dialogues
from chitchat.errors import UserError

DIALOGUES = [["你好", "hi there"], ["再见"], ["在吗", "在", "😂"]]
TEXT = "\n\n".join("\n".join(dialogue) for dialogue in DIALOGUES) + "\n"
VARIANTS = {
    "lf": TEXT,
    "crlf": TEXT.replace("\n", "\r\n"),
    "cr": TEXT.replace("\n", "\r"),
    "mixed": "你好\r\nhi there\r\r再见\n\r\n在吗\r在\n😂\r\n",
    "bom": "\ufeff" + TEXT,
    "bom_crlf": "\ufeff" + TEXT.replace("\n", "\r\n"),
    "many_blank_lines": "\n\n\n" + TEXT.replace("\n\n", "\n\n\n\n") + "\n\n",
    "whitespace_lines": " \t\n" + TEXT.replace("\n\n", "\n \t\u3000\n"),
    "outer_spaces": TEXT.replace("再见", " \t再见\u3000 "),
    "no_final_newline": TEXT.rstrip("\n"),
    "extra_final_newlines": TEXT + "\n\r\n",
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_end_lines_gives_the_same_dialogues(tmp_path, name):
    path = write(tmp_path / "train.txt", VARIANTS[name])
    assert list(read_dialogues(path)) == DIALOGUES


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("shift", range(4))
def test_line_ends_are_the_same_across_read_buffers(tmp_path, newline, shift):
    """八千多段重复的短对话跨过许多个读缓冲区，\\r\\n 会在各种位置被切开。"""
    dialogues = [["x" * shift + "头"], *[["吃了吗", "吃了"]] * 8000]
    text = (newline * 2).join(newline.join(dialogue) for dialogue in dialogues)
    assert list(read_dialogues(write(tmp_path / "train.txt", text))) == dialogues


@pytest.mark.parametrize("char", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_other_line_separators_are_text(tmp_path, char):
    utterance = f"前{char}{char}后"
    path = write(tmp_path / "train.txt", f"{utterance}\n好\n\n再见\n")
    assert list(read_dialogues(path)) == [[utterance, "好"], ["再见"]]


@pytest.mark.parametrize("content", ["", "\n", "\r\n\r\n", "\ufeff", "  \n\t\n\u3000"])
def test_file_without_text_yields_nothing(tmp_path, content):
    assert list(read_dialogues(write(tmp_path / "train.txt", content))) == []


def test_dialogues_come_before_the_rest_of_the_file_is_read(tmp_path):
    num_dialogues = 20_000
    path = write(tmp_path / "train.txt", "你好\n你好呀\n\n".encode() * num_dialogues + b"\xff")
    dialogues = read_dialogues(path)
    assert next(dialogues) == ["你好", "你好呀"]
    with pytest.raises(UserError, match=f"第 {3 * num_dialogues + 1} 行"):
        list(dialogues)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = write(tmp_path / "train.txt", "今天天气真不错\n是啊\n\n" * 60_000)
    tracemalloc.start()
    num_dialogues = sum(1 for _ in read_dialogues(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_dialogues == 60_000
    assert peak < path.stat().st_size / 4


def test_reported_position_grows_to_the_size_of_the_file(tmp_path):
    path = write(tmp_path / "train.txt", "你好\n\n" * 10_000)
    positions: list[int] = []
    list(read_dialogues(path, positions.append))
    assert positions == sorted(positions)
    assert positions[0] < positions[-1] == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b"\xff\n", 1, "0xFF"),
        ("你好\n\n再见\n".encode() + "你好".encode("gb18030") + b"\n", 4, "0xC4"),
        ("你好\r\n再见\r\n".encode() + b"a\x80b", 3, "0x80"),
        ("你好\r再见\r\r".encode() + b"\xc0", 4, "0xC0"),
        ("你好\r\n再见\r".encode() + b"\xc0", 3, "0xC0"),
        ("你好\n".encode() + "再见".encode()[:-1], 2, "0xE8"),
        ("\ufeff你好\n".encode() + b"\xfe", 2, "0xFE"),
    ],
)
def test_bad_byte_is_named_with_its_line(tmp_path, content, line, byte):
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(UserError, match="UTF-8") as error:
        list(read_dialogues(path))
    for name in (str(path), f"第 {line} 行", byte):
        assert name in str(error.value)


def test_missing_file_or_folder_is_named_with_the_flag(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="--train_path") as error:
            list(read_dialogues(path))
        assert str(path) in str(error.value)
