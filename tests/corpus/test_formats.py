"""语料格式：每种写法读出手写的同样对话；认错了格式或编码、写坏了的文件说清楚坏在哪里。"""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from chitchat.corpus.encodings import detect_encoding
from chitchat.corpus.formats import plain
from chitchat.corpus.formats.base import Dialogue, ReadOptions
from chitchat.corpus.reader import filter_dialogues, read_dialogues, read_source
from chitchat.corpus.sources import find_sources
from chitchat.errors import UserError

DIALOGUES = [["你好", "hi there"], ["在吗", "在", "😂\u0085好"]]
MESSAGES = [
    {"role": "system", "content": "你是小柚"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "hi there"},
]
TURNS = [{"from": "human", "value": text} for text in DIALOGUES[1]]
BY_NAME = {
    "a.txt": "你好\nhi there\n\n在吗\n在\n😂\u0085好\n",
    "a.tsv": "你好\thi there\n\n在吗\t\t在\t😂\u0085好\r\n",
    "list.json": json.dumps(DIALOGUES),
    "split.json": json.dumps({"test": [["别的"]], "train": DIALOGUES}, indent=1),
    "lines.json": json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"conversations": TURNS}),
    "a.jsonl": json.dumps({"messages": MESSAGES}) + "\n\n" + json.dumps(DIALOGUES[1]) + "\n",
    "a.conv": "E\nM 你好\r\nM hi there\nE\nE\nM \nM 在吗\nM 在\nM 😂\u0085好\n",
    "conv.txt": "E\nM 你好\nM hi there\nE\nM 在吗\nM 在\nM 😂\u0085好\n",
    "a.csv": "Dialogue_ID,Speaker,Utterance\n1,x,你好\n1,x,hi there\n"
    "2,y,在吗\n2,x,在\n2,y,😂\u0085好\n",
    "json.txt": json.dumps(DIALOGUES),
}  # fmt: skip


def read_all(path: Path, **options: object) -> list[list[str]]:
    return [
        dialogue.utterances
        for source in find_sources([path])
        for dialogue in read_source(source, ReadOptions(**options))
    ]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
def test_every_layout_and_encoding_gives_the_same_dialogues(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(BY_NAME[name].encode(encoding))
    assert list(read_dialogues(path)) == DIALOGUES


def test_lines_name_where_each_utterance_stands(tmp_path):
    for name, lines in {
        "a.txt": [[1, 2], [4, 5, 6]],
        "a.tsv": [[1, 1], [3, 3, 3]],
        "a.conv": [[2, 3], [7, 8, 9]],
        "a.csv": [[2, 3], [4, 5, 6]],
        "a.jsonl": [[1, 1], [3, 3, 3]],
    }.items():
        path = tmp_path / name
        path.write_text(BY_NAME[name], encoding="utf-8", newline="")
        found = read_source(find_sources([path])[0], ReadOptions())
        assert [list(dialogue.lines) for dialogue in found] == lines


def test_words_separated_by_slashes_lose_them_but_a_url_does_not(tmp_path):
    path = tmp_path / "a.conv"
    path.write_text("E\nM 呵呵/王/涵\nM 不/爱/，/hello/world\n", encoding="utf-8")
    assert read_all(path) == [["呵呵 王 涵", "不 爱 ， hello world"]]
    path.write_text("E\nM 看看这个\nM 1/2 http://a.b\nM 好的呀\n", encoding="utf-8")
    assert read_all(path) == [["看看这个", "1/2 http://a.b", "好的呀"]]


def test_folder_glob_and_archives_are_read_in_one_run(tmp_path):
    text = BY_NAME["a.txt"].encode()
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "a.txt").write_bytes(text)
    (folder / "b.txt.gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(folder / "c.zip", "w") as archive:
        archive.writestr("one.txt", text)
        archive.writestr("two.json", json.dumps(DIALOGUES))
        archive.writestr("readme.md", "# no corpus")
    (folder / "notes.log").write_text("not a corpus")
    (folder / ".hidden.txt").write_text("not a corpus")
    for path, times in ((folder, 4), (folder / "*.txt*", 2), (folder / "c.zip", 2)):
        assert read_all(path) == DIALOGUES * times


@pytest.mark.parametrize("size", [1, 70_000, 200_000])
def test_json_longer_than_the_buffer_is_read_whole(tmp_path, size):
    dialogues = [["长" * size, "短"], *[["吃了吗", "吃了"]] * 5000]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": dialogues}, ensure_ascii=False), encoding="utf-8")
    assert read_all(path) == dialogues


@pytest.mark.parametrize(
    ("name", "content", "options", "named"),
    [
        ("a.json", '{"valid": [["a"]], "test": []}', {}, ["train", "valid、test", "--split"]),
        ("a.json", '[["a", "b"], ["c"', {}, ["不完整"]),
        ("a.json", "[[1, 2]]", {}, ["第 1 段", "不是文字"]),
        ("a.json", '[["\\ud800"]]', {}, ["代理码"]),
        ("a.json", "hello", {}, ["不是 JSON"]),
        ("a.jsonl", '["a"]\n{"messages": [\n', {}, ["第 2 行", "JSON"]),
        ("a.jsonl", '["a"]\n{"x": 1}\n', {}, ["第 2 行", "messages"]),
        ("a.conv", "E\nM 你\nX 好\n", {}, ["第 3 行", "E 或 M"]),
        ("a.csv", "a,b\n1,2\n", {}, ["a、b", "--text_column"]),
        ("a.csv", "a,text\n1,2\n", {}, ["--dialogue_column", "--time_column"]),
        ("a.csv", "text\n1\n", {"speaker_column": "who"}, ["who", "--speaker_column"]),
    ],
)
def test_broken_content_is_named_with_the_file(tmp_path, name, content, options, named):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_all(path, **options)
    for text in (str(path), *named):
        assert text in str(error.value)


def test_bad_byte_in_gb18030_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("你好\n".encode("gb18030") * 9000 + b"\xff\n")
    with pytest.raises(UserError, match="第 9001 行不是 GB18030：有字节 0xFF"):
        read_all(path)


def test_named_encoding_is_used_and_an_unknown_one_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("開心嗎\n".encode("big5"))
    source = find_sources([path], "big5")[0]
    assert [d.utterances for d in read_source(source, ReadOptions())] == [["開心嗎"]]
    with pytest.raises(UserError, match="--encoding klingon"):
        find_sources([path], "klingon")


@pytest.mark.parametrize("cut", range(1, 12))
def test_sample_cut_inside_a_character_is_still_recognised(cut):
    text = "今天天气😂真不错，吃饭了吗" * 3
    for encoding, name in (("utf-8", "utf-8-sig"), ("gb18030", "gb18030"), ("utf-16", "utf-16")):
        assert detect_encoding(text.encode(encoding)[:-cut]) == name


def test_filters_keep_order_and_count_after_filtering():
    texts = [["a"], ["b", "c"], ["b", "c"], ["d", "e", "f"], ["g", "h"], ["b", "c"]]

    def keep(**options: object) -> list[list[str]]:
        dialogues = (Dialogue(utterances) for utterances in texts)
        return [dialogue.utterances for dialogue in filter_dialogues(dialogues, **options)]

    assert keep() == texts
    assert keep(min_turns=2, max_turns=2) == [["b", "c"], ["b", "c"], ["g", "h"], ["b", "c"]]
    assert keep(drop_duplicates=True) == [["a"], ["b", "c"], ["d", "e", "f"], ["g", "h"]]
    assert keep(drop_duplicates=True, min_turns=2, max_dialogues=2) == [["b", "c"], ["d", "e", "f"]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blocks_break_nothing(size, newline, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_CHARS", size)
    lines = ["你好", "", "\u200b", " 在\t", "\ufeff嗯\ufe0f", "☀\ufe0f", "\t", "", "长" * 9, "末"]
    path = tmp_path / "train.txt"
    path.write_bytes(newline.join(lines).encode())
    with path.open(encoding="utf-8") as file:
        found = [(d.utterances, list(d.lines)) for d in plain.read_text(file, None, None)]
    assert found == [
        (["你好"], [1]),
        (["在", "嗯\ufe0f", "☀\ufe0f"], [4, 5, 6]),
        (["长" * 9, "末"], [9, 10]),
    ]
