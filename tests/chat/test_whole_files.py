"""整个文件的回答：接着做、不覆盖、评价表。"""

import itertools
import json
from concurrent.futures import Future

import pytest

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import Engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.whole_files import answers as replies
from chitchat.chat.whole_files.answers import answer_file
from chitchat.chat.whole_files.partial_replies import PartialReplies
from chitchat.corpus.reader import read_dialogues
from chitchat.errors import UserError


@pytest.fixture
def model(make_model):
    return make_model(initializer_range=0.5).eval()


@pytest.fixture
def make_bot(model, tokenizer):
    def make(precision: str = "fp32", **options: object) -> Chatbot:
        engine = Engine(model.config.to_dict(), model.state_dict(), precision=precision)
        return Chatbot(engine, tokenizer, **options)

    return make


def answer(bot: Chatbot, source, target, **options: object) -> str:
    loading: Future[Chatbot] = Future()
    loading.set_result(bot)
    options = {"seed": 5, "with_report": False, "settings": {"model_path": "m"}, **options}
    return answer_file(
        loading, lambda: read_dialogues(source), target, SamplingOptions(max_len=8), **options
    )


@pytest.fixture
def dialogues_path(tmp_path):
    path = tmp_path / "dialogues.txt"
    path.write_text("你好\n\n早上\n你是谁\n\n天气真不错\n吃饭了\n再见\n", encoding="utf-8")
    return path


def answer_and_stop(monkeypatch, num_batches: int, *args, **options) -> None:
    """每批一段，做完几批就像被杀一样停下。"""
    answer_batches = replies.answer_batches

    def stop(*args, **kwargs):
        yield from itertools.islice(answer_batches(*args, **kwargs), num_batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replies, "MAX_ROWS", 1)
        patch.setattr(replies, "answer_batches", stop)
        with pytest.raises(KeyboardInterrupt):
            answer(*args, **options)


def test_a_file_gets_one_reply_per_dialogue_and_resumes(
    make_bot, dialogues_path, tmp_path, monkeypatch
):
    whole, resumed = tmp_path / "whole.txt", tmp_path / "new" / "resumed.txt"
    answer(make_bot(), dialogues_path, whole)
    sources, results = (list(read_dialogues(path)) for path in (dialogues_path, whole))
    assert [dialogue[:-1] for dialogue in results] == sources
    answer_and_stop(monkeypatch, 2, make_bot(), dialogues_path, resumed)
    part = resumed.with_name("resumed.txt.part")
    assert not resumed.exists()
    done = part.read_bytes()
    assert done.count(b"\n") == 3
    part.write_bytes(done[:-3])  # 第二批没写完
    answer(make_bot(), dialogues_path, resumed)
    assert resumed.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
    assert not part.exists()


def test_a_damaged_batch_is_made_again(make_bot, dialogues_path, tmp_path, monkeypatch, capsys):
    whole, resumed = tmp_path / "whole.txt", tmp_path / "resumed.txt"
    answer(make_bot(), dialogues_path, whole)
    part = tmp_path / "resumed.txt.part"
    for index in range(0, 60, 3):
        answer_and_stop(monkeypatch, 2, make_bot(), dialogues_path, resumed)
        done = part.read_bytes()
        start = done.index(b"\n") + 1
        damaged = bytearray(done)
        damaged[start + index % (len(done) - start)] ^= 1 << index % 8
        part.write_bytes(damaged)
        answer(make_bot(), dialogues_path, resumed)
        assert resumed.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
        resumed.unlink()
    assert capsys.readouterr().err.count("已损坏，那一批重新做") > 5
    answer_and_stop(monkeypatch, 1, make_bot(), dialogues_path, resumed)
    done = part.read_bytes()
    for index in range(done.index(b"\n")):  # 第一行坏了，就不能接着做
        part.write_bytes(done[:index] + bytes([done[index] ^ 1]) + done[index + 1 :])
        with pytest.raises(UserError, match="不是本程序做到一半的结果"):
            answer(make_bot(), dialogues_path, resumed)


def test_a_part_of_the_earlier_version_goes_on(make_bot, dialogues_path, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole.txt", tmp_path / "resumed.txt"
    answer(make_bot(), dialogues_path, whole)
    answer_and_stop(monkeypatch, 2, make_bot(), dialogues_path, resumed)
    part = tmp_path / "resumed.txt.part"
    old = b"".join(line.partition(b"\t")[0] + b"\n" for line in part.read_bytes().splitlines())
    part.write_bytes(old)
    header = json.loads(old.split(b"\n")[0])
    assert len(PartialReplies(part, header, None).replies) == 2
    answer(make_bot(), dialogues_path, resumed)
    assert resumed.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")


def test_without_a_seed_the_rest_uses_the_seed_of_the_first_part(
    make_bot, dialogues_path, tmp_path, monkeypatch
):
    target = tmp_path / "out.txt"
    answer_and_stop(monkeypatch, 1, make_bot(), dialogues_path, target, seed=None)
    seed = json.loads(target.with_name("out.txt.part").read_text().split("\t")[0])["seed"]
    answer(make_bot(), dialogues_path, target, seed=None)
    answer(make_bot(), dialogues_path, tmp_path / "again.txt", seed=seed)
    assert target.read_text() == (tmp_path / "again.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"model_path": "n"}}, "model_path"),
        ({"settings": {}}, "model_path"),
        ({"seed": 6}, "seed"),
        ({"with_report": True}, "input_path"),
    ],
)
def test_a_part_made_otherwise_is_not_continued(
    changes, named, make_bot, dialogues_path, tmp_path, monkeypatch
):
    answer_and_stop(monkeypatch, 1, make_bot(), dialogues_path, tmp_path / "out.txt")
    part = tmp_path / "out.txt.part"
    before = part.read_bytes()
    monkeypatch.setattr(replies, "require_sacrebleu", lambda: None)
    with pytest.raises(UserError, match=f"{named} 与那时不同"):
        answer(make_bot(), dialogues_path, tmp_path / "out.txt", **changes)
    assert part.read_bytes() == before


@pytest.mark.parametrize("name", ["dialogues.txt", "exists.txt", ".", "folder", "foreign.txt"])
@pytest.mark.parametrize("content", ["要紧的笔记", "笔记\n\n第二段", "[1]\n", "{}"])
def test_nothing_that_was_there_is_overwritten(name, content, make_bot, dialogues_path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "exists.txt").write_text(content, encoding="utf-8")
    (tmp_path / "foreign.txt.part").write_text(content, encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(UserError, match="output_path"):
        answer(make_bot(), dialogues_path, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_the_report_is_about_the_replies_whatever_the_file_is_called(
    make_bot, dialogues_path, tmp_path
):
    pytest.importorskip("sacrebleu")
    reports = [
        answer(make_bot(), dialogues_path, tmp_path / name, with_report=True)
        for name in ("out.txt", "out.tsv", "out.json")
    ]
    assert reports[0] == reports[1] == reports[2]
    assert "| 回复数 | 2 |" in reports[0].replace("  ", " ")
