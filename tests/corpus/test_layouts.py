"""语料的各种写法：读出手写的对话；不是文字的、编码混着的、写法可疑的，说清楚是什么。"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import CHAT, LAYOUTS

from chitchat.corpus.cleaning import Cleaner
from chitchat.corpus.encodings import detect_encoding
from chitchat.corpus.formats.base import Dialogue, ReadOptions
from chitchat.corpus.reader import read_source
from chitchat.corpus.sources import find_sources
from chitchat.corpus.tally import Tally
from chitchat.errors import UserError
from preprocess import main

QA = [["你好", "你也好"], ["晚安", "好梦"]]
TURNS = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你也好"}]


def lines(*values: object) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n"


def pairs(*keys: str, **more: object) -> str:
    return lines(*({**dict(zip(keys, pair, strict=True)), **more} for pair in QA))


LAYOUT = {
    "alpaca.json": json.dumps([{"instruction": q, "input": "", "output": a} for q, a in QA]),
    "belle.jsonl": lines(*({"instruction": f"Human:{q}\nAssistant:", "output": a} for q, a in QA)),
    "firefly.jsonl": pairs("input", "target", kind="x"),
    "fireflies.jsonl": lines(*({"conversation": [{"human": q, "assistant": a}]} for q, a in QA)),
    "moss.jsonl": lines(*({"chat": {"turn_1": {"Human": f"<|Human|>: {q}<eoh>\n", "Commands": "",
                                               "MOSS": f"<|MOSS|>: {a}<eom>\n"}}} for q, a in QA)),
    "moss2.jsonl": lines(*({"plain_text": f"[Human]: {q}<eoh> [MOSS]: {a}<eoa>"} for q, a in QA)),
    "dpo.jsonl": lines({"conversations": TURNS[:1], "chosen": "你也好", "rejected": "滚"},
                       {"prompt": "晚安", "chosen": "好梦", "rejected": "哦"}),
    "dpo_list.jsonl": lines({"chosen": [{"role": "user", "content": "你好"},
                                        {"role": "assistant", "content": "你也好"}]},
                            {"prompt": "晚安", "chosen": {"value": "好梦"}, "rejected": "哦"}),
    "qa.csv": "question,answer\n你好,你也好\n晚安,好梦\n",
    "semi.csv": "id;问题;回答\n1;你好;你也好\n2;晚安;好梦\n",
    "tab.csv": "question\tanswer\n你好\t你也好\n晚安\t好梦\n",
    "sep.csv": "sep=;\nq;a\n你好;你也好\n晚安;好梦\n",
    "bar.csv": "你好 | 你也好\n晚安 | 好梦\n",
    "bare.csv": "你好,你也好\n晚安,好梦\n",
    "turns.csv": "id,turn1,turn2,turn3\n1,你好,你也好,\n2,晚安,好梦,\n",
    "far.csv": "dialogue_id,text\n7,你好\n8,晚安\n7,你也好\n8,好梦\n",
    "tab.txt": "你好\t你也好\n晚安\t好梦\n",
    "header.txt": "question\tanswer\n你好\t你也好\n晚安\t好梦\n",
    "label.txt": "1\t你好\t你也好\n0\t你好\t不好\n1\t晚安\t好梦\n0\t晚安\t早\n",
    "eou.txt": "你好__eou__你也好__eou__\n晚安__eou__好梦__eou__\n",
    "record.txt": "1+++$+++甲+++$+++你好\n2+++$+++乙+++$+++你也好\n9+++$+++甲+++$+++晚安\n"
    "10+++$+++乙+++$+++好梦\n",
    "plus.txt": "你好+++$+++你也好\n晚安+++$+++好梦\n",
    "script.txt": "甲：你好\n乙：你也好\n\n甲：晚安\n乙：好梦\n",
    "roles.txt": "system: 你是小柚\nuser: 你好\nassistant: 你也好\n\nuser: 晚安\nassistant: 好梦\n",
    "ask.txt": "问：你好\n答：你也好\n问：晚安\n答：好梦\n",
    "greet.yml": "categories:\n- x\nconversations:\n- - 你好\n  - 你也好\n- - 晚安\n  - 好梦\n",
    "kdconv.json": json.dumps([{"messages": [{"message": t} for t in pair]} for pair in QA]),
    "crosswoz.json": json.dumps({str(i): {"goal": [], "messages": [
        {"role": "usr", "content": q}, {"role": "sys", "content": a}]}
        for i, (q, a) in enumerate(QA)}),
    "naturalconv.json": json.dumps([{"dialog_id": "0", "content": pair} for pair in QA]),
    "cdconv.jsonl": lines(*({"u1": q, "b1": a, "label": 2} for q, a in QA)),
    "dialogre.json": json.dumps([[[f"S1: {q}", f"S2: {a}"], [{"x": "y"}]] for q, a in QA]),
    "lccc.jsonl": lines(*({"context": [q], "response": a} for q, a in QA)),
    "xtuner.json": json.dumps([{"conversation": [{"system": "s", "input": q, "output": a}]}
                               for q, a in QA], indent=1),
    "history.jsonl": lines({"query": "晚安", "response": "好梦", "history": [QA[0]]}),
    "text.jsonl": lines(*({"text": "\n".join(pair)} for pair in QA)),
    "sharegpt.json": json.dumps([{"id": "1", "conversations": TURNS}, {"id": "2", "conversations": [
        {"from": "human", "value": "晚安"}, {"from": "gpt", "value": "好梦"}]}]),
    "nested.json": json.dumps({"data": {"train": QA, "test": [["x", "y"]]}}),
    "only.json": json.dumps({"dialogues": QA}),
    "parts.json": json.dumps([[{"role": "user", "content": [{"type": "text", "text": q}]},
                               {"role": "assistant", "content": a}] for q, a in QA]),
    "twice.json": json.dumps(QA[:1], indent=1) + "\n" + json.dumps(QA[1:], indent=1),
    "log.jsonl": lines(*({"sender": w, "time": f"2026-01-02 20:{m:02}", "content": t}
                         for w, m, t in (("a", 0, "你好"), ("b", 1, "你也好"))),
                       *({"sender": w, "time": f"2026-01-03 20:{m:02}", "content": t}
                         for w, m, t in (("a", 0, "晚安"), ("b", 1, "好梦")))),
    "zero_width.txt": "你好\n你也好\n\u200b\n晚安\n好梦\n\ufeff\n",
}  # fmt: skip


def read(path: Path, tally: Tally | None = None, **options: object) -> list[list[str]]:
    return [
        dialogue.utterances
        for source in find_sources([path])
        for dialogue in read_source(source, ReadOptions(**options), tally)
    ]


@pytest.mark.parametrize("name", LAYOUT)
def test_every_corpus_layout_gives_the_same_dialogues(name, tmp_path):
    path = tmp_path / name
    path.write_text(LAYOUT[name], encoding="utf-8")
    found = read(path)
    assert found == ([[*QA[0], *QA[1]]] if name == "history.jsonl" else QA)


TEXT = "你好\n你也好\n\n晚安\n好梦\n"


def pack(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("__MACOSX/._a.txt", b"\0\5\x16\7")
            archive.writestr(".DS_Store", b"\0")
            archive.writestr("a.txt", data)
    else:
        mode = {"tgz": "w:gz", "tar.bz2": "w:bz2", "tar": "w"}[name.partition(".")[2]]
        with tarfile.open(fileobj=out, mode=mode) as archive:
            for member in ("._a.txt", "dir/a.txt"):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz", "a.tar.bz2"])
def test_archives_are_read_whatever_their_name(name, tmp_path):
    data = pack(name, TEXT.encode())
    for path in (tmp_path / name, tmp_path / "renamed.txt"):
        path.write_bytes(data)
        assert read(path) == QA
    for suffix, squeeze in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(squeeze(TEXT.encode()))
        assert read(path) == QA


def test_zst_is_read_alone_in_several_frames_and_around_a_tar(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    question, answer = TEXT.encode()[:5], TEXT.encode()[5:]
    skipped = b"\x50\x2a\x4d\x18\4\0\0\0pzst"  # 别的工具夹带的，解压时略去
    frames = zstandard.compress(question) + skipped + zstandard.compress(answer)
    packed = zstandard.compress(pack("a.tar", TEXT.encode()))
    whole = zstandard.compress(TEXT.encode())
    for name, data in {"a.txt.zst": whole, "b.txt.zst": frames, "c.tar.zst": packed}.items():
        for path in (tmp_path / name, tmp_path / "renamed.txt"):
            path.write_bytes(data)
            assert read(path) == QA


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), ".xlsx"),
        (b"7z\xbc\xaf\x27\x1c1234", "解压"),
        (b"%PDF-1.7 x", "PDF"),
        (b"SQLite format 3\0x", "SQLite"),
        (pickle.dumps([[101, 102]], protocol=4), "train.py"),
        (b"<!DOCTYPE html><html>", "网页"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\x03\x04" + bytes(30), "zip"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\3abc", "重新下载"),
    ],
)
def test_what_is_no_text_is_named(data, words, tmp_path):
    path = tmp_path / "chat.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


def test_encrypted_zip_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    data = bytearray(pack("a.zip", TEXT.encode()))
    position = data.rindex(b"PK\x01\x02")
    data[position + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="密码"):
        read(path)


SAMPLES = {
    "gb18030": "今天天气真不错，我们一起去公园走走吧。\n好啊，什么时候出发？\n",
    "big5hkscs": "今天天氣真不錯，我們一起去公園走走吧。\n好啊，什麼時候出發？\n",
    "cp932": "こんにちは、元気ですか。\nはい、今日はとても寒いですね。\n",
    "euc_kr": "안녕하세요, 오늘 날씨가 좋네요.\n네, 그래요.\n",
    "cp1252": "I don’t know what you’re talking about\nIt’s fine – really, the café is open\n",  # noqa: RUF001
    "utf-16": "今天天气真不错\n好\n",
    "utf-32": "今天天气真不错\n好\n",
    "utf-16-le": "ok，今天天气真不错\n好啊\n",
    "utf-16-be": "ok，今天天气真不错\n好啊\n",
}


@pytest.mark.parametrize("encoding", SAMPLES)
def test_encoding_is_told_from_the_text(encoding, tmp_path):
    data = SAMPLES[encoding].encode(encoding)
    assert detect_encoding(data) == encoding
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert read(path) == [SAMPLES[encoding].split("\n")[:-1]]


def test_text_with_a_nul_is_utf8_and_mixed_encodings_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("你好\n带\0了\n".encode())
    assert read(path) == [["你好", "带\0了"]]
    chinese = "大家早上好，今天去哪里\n"
    for parts, number in ((("utf-8", "gb18030"), 21), (("gb18030", "utf-8"), 1)):
        path.write_bytes(b"".join(chinese.encode(part) * 20 for part in parts))
        with pytest.raises(UserError, match=f"第 {number} 行"):
            read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n".join(f"2026-01-02 20:{i:02} 某人说了 {i}" for i in range(40)), "--format text"),
        ("\n".join(f"[20:{i:02}] 张三> 你好 {i}" for i in range(40)), "聊天记录"),
        ("一句话\n" * 300, "空行"),
        ("小明:\n你好\n\n我:\n在\n\n" * 9, "名字和冒号"),
        ("小明: 01-02 20:15:30\n你好\n\n我: 01-02 20:16:30\n在\n\n" * 9, "聊天记录"),
        ("小明 1月2日 20:15\n你好\n\n我 1月2日 20:16\n在\n\n" * 9, "聊天记录"),
    ],
)
def test_suspicious_layout_is_refused_and_can_be_forced(text, words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read(path)
    assert read(path, format="text")


@pytest.mark.parametrize("mark", ["\t", " | ", "__eou__"])
def test_times_between_any_marks_are_refused_and_the_mend_works(mark, tmp_path):
    rows = [[f"2026.01.02 20:{i:02}:11", ("小明", "小红")[i % 2], f"第{i}句"] for i in range(6)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(map(mark.join, rows)), encoding="utf-8")
    with pytest.raises(UserError, match=r"各行都有一格是时间.*第一行写上列名"):
        read(path)
    mended = tmp_path / "a.csv"
    rows.insert(0, ["time", "sender", "content"])
    mended.write_text("\n".join(map("\t".join, rows)), encoding="utf-8")
    assert read(mended) == [[f"第{i}句" for i in range(6)]]


def test_doubtful_layout_is_warned_about(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("你好\n在\n=====\n吃了吗\n吃了\n=====\n", encoding="utf-8")
    tally = Tally()
    assert len(read(path, tally)) == 1
    assert "分隔线" in tally.warnings[0]
    path.write_text("\n\n".join(f"第{i}句" for i in range(30)), encoding="utf-8")
    vocab = Path(__file__).parents[2] / "vocab" / "vocab.txt"
    assert main(["--train_path", str(path), "--check", "--vocab_path", str(vocab)]) == 0
    report = capsys.readouterr().out
    assert "每段都只有一句话" in report
    assert "没有发现" not in report


def test_standard_input_and_brackets_in_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "x.txt").write_text(TEXT, encoding="utf-8")
    assert read(folder / "*.txt") == QA
    read_end, write_end = os.pipe()
    os.write(write_end, TEXT.encode())
    os.close(write_end)
    with open(read_end, encoding="utf-8") as stdin:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read(Path("-")) == QA


@pytest.mark.parametrize(
    ("dialogue", "cleaned", "rules"),
    [
        (["回复 @小明:好的呀", "@小红 行"], [["好的呀", "行"]], {"回复 @某人": 1, "@某人": 1}),
        (["#早安#大家早", "看 http://a.b/c 早"], [["大家早", "看 早"]], {"#话题#": 1, "网址": 1}),
        (["哈哈哈哈哈哈哈哈", "好笑吗"], [["哈哈哈", "好笑吗"]], {"重复的词": 1}),
        (["你好", "在", "在", "咋了", "没事"], [["你好", "在"], ["咋了", "没事"]], {"与上一句相同": 1}),  # noqa: E501
        (["一", "打13800138000", "二", "三"], [["二", "三"]], {"电话号码": 1}),
        (["hello", "你好", "好"], [["你好", "好"]], {"没有汉字": 1}),
        (["你好", "好==!!..//"], [], {"多半是符号": 1}),
        (["只有一句"], [["只有一句"]], {}),
        (["@甲 @乙 早", "#早#安#安#好"], [["早", "安好"]], {"@某人": 2, "#话题#": 2}),
    ],
)  # fmt: skip
def test_cleaning_mends_or_cuts(dialogue, cleaned, rules):
    counts = Counter()
    found = Cleaner(counts).clean(Dialogue(dialogue, range(1, len(dialogue) + 1)))
    assert [piece.utterances for piece in found] == cleaned
    assert +counts == rules


def test_stock_replies_are_cut_after_a_hundred():
    counts = Counter()
    cleaner = Cleaner(counts)
    kept = [list(cleaner.clean(Dialogue([f"第{i}个问题", "呵呵"]))) for i in range(150)]
    assert sum(map(bool, kept)) == 100
    assert counts["到处都是的回复"] == 50


FUZZED = {name: text.encode() for name, text in LAYOUT.items()} | {
    f"{layout}.{name.partition('.')[2]}": render(CHAT).encode()
    for layout, (name, render) in LAYOUTS.items()
}


@settings(max_examples=300, deadline=5000, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(FUZZED)),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 30), st.binary(max_size=12)), max_size=4
    ),
)
def test_damaged_files_of_every_kind_give_dialogues_or_one_sentence(name, edits, tmp_path_factory):
    data = FUZZED[name]
    for place, length, new in edits:
        at = int(place * len(data))
        data = data[:at] + new + data[at + length :]
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)
    try:
        found = read(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert all(text.strip() == text != "" for dialogue in found for text in dialogue)


@settings(max_examples=100, deadline=5000, suppress_health_check=list(HealthCheck))
@given(suffix=st.sampled_from([".txt", ".csv", ".json", ".jsonl", ".tsv", ".yml", ".mht"]),
       data=st.binary(max_size=300)
       | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))  # fmt: skip
def test_random_bytes_give_dialogues_or_one_sentence(suffix, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(data)
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", 'time,sender,content\n2026-01-02 20:15,a,"呵呵\n2026-01-02 20:16,b,"在"\n',
         "第 2 行起"),
        ("a.json", '{"a":1', "不完整"),
        ("a.txt", "2024-01-02 20:15:30\t小明\t你好\n2024-01-02 20:16:30\t我\t在\n", "列名"),
        ("a.txt", "\x01\x02\x03\x04", "控制字符"),
    ],
)  # fmt: skip
def test_further_broken_files_are_explained(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read(path)
    path.write_text("你好\n在\n", encoding="utf-8")
    with pytest.raises(UserError, match="--encoding"):
        list(read_source(find_sources([path], "utf-16")[0], ReadOptions()))


def test_a_folder_may_hold_files_without_dialogues(tmp_path, capsys):
    folder = tmp_path / "导出"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "README.txt").write_text("怎样使用", encoding="utf-8")
    (folder / "export_info.json").write_text('{"version": 1, "count": 3}', encoding="utf-8")
    (folder / "contacts.csv").write_text("wxid,昵称,备注\nx,小明,同学\n", encoding="utf-8")
    options = ["--save_path", str(tmp_path / "t.pkl"), "--log_path", str(tmp_path / "log")]
    assert main(["--train_path", str(folder), *options]) == 0
    report = capsys.readouterr().out
    assert "export_info.json：没有读" in report
    assert "contacts.csv：没有读" in report
    assert "README" not in report
    assert len(pickle.loads((tmp_path / "t.pkl").read_bytes())) == 2


VOICES = """Dialogue_ID,Speaker,Utterance
d2,小明,在吗
d2,小红,在的
d1,小红,吃了没
d2,小红,怎么了
d1,小明,"吃了, 你呢"
d1,小明,我吃的面
"""


def test_numbered_dialogues_know_their_speakers_when_asked(tmp_path):
    """对话编了号、写着说话人、没有时间的表：问起说话人时，同一人接连的几行是一句。"""
    path = tmp_path / "voices.csv"
    path.write_text(VOICES, encoding="utf-8")

    def read(**options: str) -> tuple[list[list[str]], Tally]:
        tally = Tally()
        source = find_sources([path])[0]
        found = read_source(source, ReadOptions(**options), tally)
        return [dialogue.utterances for dialogue in found], tally

    plain, _ = read()
    assert plain == [["在吗", "在的", "怎么了"], ["吃了没", "吃了, 你呢", "我吃的面"]]
    named, tally = read(speaker_column="Speaker")
    assert named == [["在吗", "在的，怎么了"], ["吃了没", "吃了, 你呢，我吃的面"]]
    assert not tally.warnings
    assert {name: count for (name, _), count in tally.speakers.items()} == {"小明": 3, "小红": 3}
    only, _ = read(reply_speaker="小明")
    assert only == [["吃了没", "吃了, 你呢，我吃的面"]]
