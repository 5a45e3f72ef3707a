"""聊天脚本：脚本化的输入，屏幕上的输出、聊天记录、斜线命令、退出码。"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY_VOCAB

import interact
from chitchat.chat.generation import Batch
from chitchat.chat.terminal import prompt
from chitchat.checkpoint import save_checkpoint
from chitchat.cli import configure_logging, run_cli
from chitchat.corpus.reader import read_dialogues

REPLY = "早上好，吃饭了吗"
HEADER = r"聊天记录\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+:\n"


@pytest.fixture(autouse=True)
def _close_the_log() -> Iterator[None]:
    yield
    configure_logging(None, console=False)
    logging.getLogger("chitchat").propagate = True


class Terminal(io.StringIO):
    """冒充终端的标准输入。"""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def model_dir(tmp_path, make_parrot, tokenizer) -> Path:
    """总是回 REPLY 的模型，64 个位置。"""
    save_checkpoint(tmp_path / "parrot", make_parrot(REPLY), tokenizer)
    return tmp_path / "parrot"


@pytest.fixture
def random_dir(tmp_path, make_model, tokenizer) -> Path:
    """随机初始化的模型，每句回复都不同。"""
    save_checkpoint(tmp_path / "random", make_model(), tokenizer)
    return tmp_path / "random"


@pytest.fixture
def chat(monkeypatch, capsys, model_dir):
    """把几行文字从管道送进 interact.main；返回标准输出、标准错误。"""

    def run(*lines: str, model: Path = model_dir, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert interact.main(["--no_cuda", "--model_path", str(model), *options]) == 0
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def type_in_terminal(monkeypatch, capsys, model_dir):
    """在冒充的终端里逐句输入；条目是异常时抛出它。返回标准输出。"""

    def run(*entries: str | type[BaseException], options: tuple[str, ...] = ()) -> str:
        waiting = list(entries)

        def prompt_lines(history_path: Path | None) -> Iterator[str]:
            while True:
                entry = waiting.pop(0)
                if not isinstance(entry, str):
                    raise entry
                yield entry

        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr(prompt, "prompt_lines", prompt_lines)
        capsys.readouterr()
        assert interact.main(["--no_cuda", "--model_path", str(model_dir), *options]) == 0
        assert not waiting
        return capsys.readouterr().out

    return run


def read_samples() -> str:
    return Path("sample/sample.txt").read_text(encoding="utf-8")


def replies_in(out: str) -> list[str]:
    """除问候外，标准输出只能有 chatbot: 行。"""
    greeting, *lines = out.splitlines()
    assert "开始和 chatbot 聊天" in greeting
    assert all(line.startswith("chatbot:") for line in lines)
    return [line.removeprefix("chatbot:") for line in lines]


def test_piped_lines_are_utterances_and_only_replies_go_to_stdout(chat):
    out, err = chat("你好", "", "   ", "晚安")
    assert replies_in(out) == [REPLY, REPLY]
    assert err == ""


def test_sample_file_has_a_dated_header_and_every_turn_and_is_appended_to(chat):
    chat("你好", "晚安[SEP]")
    chat("再见")
    turn = f"chatbot:{REPLY}\n"
    first = rf"{HEADER}user:你好\n{turn}user:晚安\[SEP\]\n{turn}"
    assert re.fullmatch(first + rf"{HEADER}user:再见\n{turn}", read_samples())


def test_samples_and_log_go_where_the_flags_say(chat):
    chat("你好", options=("--save_samples_path", "a/b", "--log_path", "c/d.log"))
    assert re.fullmatch(
        rf"{HEADER}user:你好\nchatbot:{REPLY}\n", Path("a/b/sample.txt").read_text()
    )
    assert "device=cpu" in Path("c/d.log").read_text()
    assert not Path("sample").exists()


@pytest.mark.parametrize("ending", [EOFError, KeyboardInterrupt, "/quit"])
def test_each_way_to_end_a_terminal_chat_keeps_the_transcript(ending, type_in_terminal):
    out = type_in_terminal("你好", ending)
    assert out.splitlines()[1:2] == [f"chatbot:{REPLY}"]
    assert re.fullmatch(rf"{HEADER}user:你好\nchatbot:{REPLY}\n", read_samples())


def test_each_finished_line_is_in_the_file_before_the_next_is_asked_for(monkeypatch, model_dir):
    seen = []

    def prompt_lines(history_path: Path | None) -> Iterator[str]:
        seen.append(read_samples())
        yield "你好"
        seen.append(read_samples())

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(prompt, "prompt_lines", prompt_lines)
    assert interact.main(["--no_cuda", "--model_path", str(model_dir)]) == 0
    assert re.fullmatch(HEADER, seen[0])
    assert re.fullmatch(rf"{HEADER}user:你好\nchatbot:{REPLY}\n", seen[1])


@pytest.fixture
def press_ctrl_c(monkeypatch):
    """第几步时按下 Ctrl+C。"""

    def press(at_step: int) -> None:
        step, steps = Batch.step, []

        def watch(self):
            steps.append(1)
            if len(steps) == at_step:
                signal.raise_signal(signal.SIGINT)
            return step(self)

        monkeypatch.setattr(Batch, "step", watch)

    return press


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("at_step", [1, 4, 8])
def test_ctrl_c_stops_the_reply_and_what_was_said_stays(at_step, type_in_terminal, press_ctrl_c):
    press_ctrl_c(at_step)
    out = type_in_terminal("你好", "晚安", "/show", EOFError, options=("--max_history_len", "5"))
    said = REPLY[:at_step]
    assert out.splitlines()[1:3] == [f"chatbot:{said}", f"chatbot:{REPLY}"]
    assert out.splitlines()[3:] == ["你好", said, "晚安", REPLY]
    turns = f"user:你好\nchatbot:{said}\nuser:晚安\nchatbot:{REPLY}\n"
    assert re.fullmatch(HEADER + turns, read_samples())


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_before_the_candidates_are_there_takes_the_question_back(
    type_in_terminal, press_ctrl_c
):
    press_ctrl_c(3)
    options = ("--num_candidates", "3")
    out = type_in_terminal("你好", "/show", "晚安", "/retry", EOFError, options=options)
    shown = ["chatbot:", "（还没有说就停了，你的这句不算）", "还没有对话"]
    assert out.splitlines()[1:] == [*shown, f"chatbot:{REPLY}", f"chatbot:{REPLY}"]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_a_piped_chat_with_the_log_whole(chat, press_ctrl_c):
    press_ctrl_c(3)
    chat("你好", "晚安")
    assert re.fullmatch(rf"{HEADER}user:你好\n", read_samples())


def test_commands_are_not_utterances(chat):
    out, err = chat("/help", "/set", "/nonsense", "/undo", "/reset", "/quit", "你好")
    assert replies_in(out) == []
    assert re.fullmatch(HEADER, read_samples())
    for name in ("/help", "/reset", "/undo", "/set", "/quit"):
        assert f"\n{name}" in f"\n{err}"
    for knob in ("temperature", "topk", "topp", "repetition_penalty", "max_len"):
        assert re.search(rf"^{knob} = ", err, re.MULTILINE)
    assert "没有 /nonsense 这条命令" in err


@pytest.mark.parametrize("text", ["/微笑", "/24", "/", "/:strong", "//help", "/捂脸 哈哈"])
def test_slash_word_that_is_no_command_name_is_an_utterance(text, chat):
    out, err = chat("你好", text, "晚安")
    assert replies_in(out) == [REPLY] * 3
    assert f"\nuser:{text}\n" in read_samples()
    assert err == ""


def test_bom_before_the_first_line_is_removed(chat):
    out, err = chat("\ufeff/help", "你好")
    assert replies_in(out) == [REPLY]
    assert "/reset" in err
    chat("\ufeff早")
    assert "user:早\n" in read_samples()


@pytest.mark.parametrize("name", ["my chat.txt", '"my chat.txt"', "'my chat.txt'"])
def test_saved_name_may_hold_spaces(name, chat):
    chat("你好", f"/save {name}")
    assert list(read_dialogues(Path("my chat.txt"))) == [["你好", REPLY]]


def test_each_line_of_a_paste_has_its_speaker(type_in_terminal):
    type_in_terminal("甲\n\n 乙\r\n丙", "/save pasted.txt", EOFError)
    turns = f"user:甲\nuser:乙\nuser:丙\nchatbot:{REPLY}\n"
    assert re.fullmatch(HEADER + turns, read_samples())
    assert list(read_dialogues(Path("pasted.txt"))) == [["甲", "乙", "丙", REPLY]]


def contexts_of(monkeypatch) -> list[list[int]]:
    """记下每次送去生成的上下文。"""
    seen = []
    add = Batch.add

    def spy(self, rows):
        seen.extend(list(row.context) for row in rows)
        add(self, rows)

    monkeypatch.setattr(Batch, "add", spy)
    return seen


def ids_of(*utterances: str) -> list[int]:
    context = [101]
    for utterance in utterances:
        context += [*(TINY_VOCAB.index(char) for char in utterance), 102]
    return context


@pytest.mark.parametrize(
    ("lines", "max_history_len", "expected"),
    [
        (["你好", "晚安"], 5, ["你好", REPLY, "晚安"]),
        (["你好", "晚安"], 2, [REPLY, "晚安"]),
        (["你好", "晚安"], 1, ["晚安"]),
        (["你好", "/reset", "晚安"], 5, ["晚安"]),
        (["你好", "/undo", "晚安"], 5, ["晚安"]),
        (["你好", "再见", "/undo", "晚安"], 5, ["你好", REPLY, "晚安"]),
        (["你好", "/undo", "/undo", "晚安"], 5, ["晚安"]),
        (["你好", "再见", "/retry"], 5, ["你好", REPLY, "再见"]),
        (["你好", "/show", "/save x.txt", "晚安"], 5, ["你好", REPLY, "晚安"]),
        (["你好", "/set topk 3", "晚安"], 5, ["你好", REPLY, "晚安"]),
        (["你好", "/set max_history_len 1", "晚安"], 5, ["晚安"]),
    ],
)
def test_context_is_the_recent_history(lines, max_history_len, expected, chat, monkeypatch):
    contexts = contexts_of(monkeypatch)
    chat(*lines, options=("--max_history_len", str(max_history_len)))
    assert contexts[-1] == ids_of(*expected)


def test_history_that_does_not_fit_is_cut_with_a_notice(chat, monkeypatch):
    contexts = contexts_of(monkeypatch)
    out, err = chat("你好" * 40, options=("--max_len", "25"))
    assert replies_in(out) == [REPLY]
    assert contexts == [[101, *ids_of("你好" * 40)[1:-1][-37:], 102]]  # 64 - 25 - [CLS] - [SEP]
    assert "64" in err


def test_show_lists_what_the_model_sees(chat):
    _, err = chat("你好", "晚安", "/show", options=("--max_history_len", "3"))
    assert err == f"{REPLY}\n晚安\n{REPLY}\n"
    assert chat("/show")[1].count("\n") == 1


def test_save_writes_one_dialogue_of_a_corpus(chat):
    chat("/save empty.txt", "你好", "晚安！", "/save a/b.txt")
    saved = list(read_dialogues(Path("a/b.txt")))
    assert saved == [["你好", REPLY, "晚安！", REPLY]]
    assert not Path("empty.txt").exists()


@pytest.mark.parametrize("name", [".", "/", "here.txt", "folder", "~no-such-user/x", "长" * 200])
def test_save_never_overwrites(name, chat):
    Path("folder").mkdir()
    Path("here.txt").write_text("要紧", encoding="utf-8")
    out, err = chat("你好", f"/save {name}", "晚安")
    assert replies_in(out) == [REPLY, REPLY]
    assert err.startswith("没有写")
    assert Path("here.txt").read_text(encoding="utf-8") == "要紧"


def test_closed_stdin_is_an_empty_one(chat, monkeypatch, model_dir):
    monkeypatch.setattr("sys.stdin", None)
    assert interact.main(["--no_cuda", "--model_path", str(model_dir)]) == 0


def test_set_changes_the_knob(chat):
    out, err = chat("你好", "/set max_len 3", "你好", "/set")
    assert replies_in(out) == [REPLY, REPLY[:3]]
    assert "max_len = 3" in err


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("/set max_len 0", ["max_len", "不小于 1", "'0'"]),
        ("/set max_len 2.5", ["max_len", "整数", "2.5"]),
        ("/set max_len 62", ["max_len", "62", "61"]),
        ("/set temperature 0", ["temperature", "大于 0"]),
        ("/set temperature nan", ["temperature", "nan"]),
        ("/set topp 1.5", ["topp", "不大于 1", "1.5"]),
        ("/set topk -1", ["topk", "不小于 0", "-1"]),
        ("/set repetition_penalty 0", ["repetition_penalty", "大于 0"]),
        ("/set seed 3", ["用法", "temperature"]),
        ("/set max_len", ["用法"]),
        ("/set max_len 3 4", ["用法"]),
    ],
)
def test_bad_set_is_explained_and_leaves_every_knob(command, named, chat):
    _, before = chat("/set")
    _, err = chat(command, "/set")
    assert err.endswith(before)
    for name in named:
        assert name in err.removesuffix(before)


def test_seed_makes_the_chat_reproducible(chat, random_dir):
    def talk(seed: str) -> str:
        return chat("你好", "晚安", model=random_dir, options=("--topk", "0", "--seed", seed))[0]

    assert talk("7") == talk("7")
    assert len({talk(seed) for seed in "789"}) == 3


def test_without_a_seed_chats_differ(chat, random_dir):
    assert len({chat("你好", model=random_dir, options=("--topk", "0"))[0] for _ in range(3)}) > 1


def test_folder_without_tokenizer_chats_with_vocab_path(chat, model_dir, vocab_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (model_dir / name).unlink()
    assert replies_in(chat("你好", options=("--vocab_path", str(vocab_path)))[0]) == [REPLY]


def short_vocab(model_dir: Path) -> list[str]:
    path = model_dir.parent / "short.txt"
    path.write_text("\n".join(TINY_VOCAB[:-1]), encoding="utf-8")
    return ["--vocab_path", str(path)]


def other_vocab_of_the_same_size(model_dir: Path) -> list[str]:
    path = model_dir.parent / "other.txt"
    path.write_text("\n".join([*TINY_VOCAB[:104], *reversed(TINY_VOCAB[104:])]), encoding="utf-8")
    return ["--vocab_path", str(path)]


def no_tokenizer(model_dir: Path) -> list[str]:
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "vocab.txt").unlink()
    return []


def damaged_weights(model_dir: Path) -> list[str]:
    (model_dir / "model.safetensors").write_bytes(b"x")
    return []


def samples_path_is_a_file(model_dir: Path) -> list[str]:
    Path("occupied").write_text("x")
    return ["--save_samples_path", "occupied"]


def mmi_of_another_vocabulary(model_dir: Path) -> list[str]:
    other = model_dir.parent / "other"
    shutil.copytree(model_dir, other)
    (other / "tokenizer.json").unlink()
    swapped = "\n".join([*TINY_VOCAB[:104], *reversed(TINY_VOCAB[104:])])
    (other / "vocab.txt").write_text(swapped, encoding="utf-8")
    return ["--mmi_model_path", str(other), "--num_candidates", "2"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (mmi_of_another_vocabulary, ["--mmi_model_path", "other", "词表"]),
        (["--debug"], ["--debug", "--num_candidates"]),
        (["--greedy", "--num_candidates", "2"], ["--greedy", "--num_candidates"]),
        (["--model_path", "", "--vocab_path", "tiny_vocab.txt"], ["config.json"]),
        (["--model_path", "nowhere"], ["nowhere", "完好的模型文件夹", "parrot"]),
        (["--model_path", "."], ["config.json"]),
        (["--vocab_path", "none.txt"], ["none.txt", "--vocab_path"]),
        (short_vocab, [str(len(TINY_VOCAB)), str(len(TINY_VOCAB) - 1), "--vocab_path"]),
        (other_vocab_of_the_same_size, ["parrot", "other.txt", "第 105 项", "去掉 --vocab_path"]),
        (no_tokenizer, ["tokenizer.json", "vocab.txt", "--vocab_path"]),
        (samples_path_is_a_file, ["occupied"]),
        (damaged_weights, ["model.safetensors"]),
        (["--max_len", "62"], ["62", "61", "64"]),
        (["--max_len", "0"], ["--max_len", "不小于 1"]),
        (["--max_history_len", "0"], ["--max_history_len", "不小于 1"]),
        (["--temperature", "0"], ["--temperature", "大于 0"]),
        (["--topk", "-1"], ["--topk", "不小于 0"]),
        (["--topp", "1.1"], ["--topp", "不大于 1"]),
        (["--repetition_penalty", "-1"], ["--repetition_penalty", "大于 0"]),
        (["--min_p", "1.1"], ["--min_p", "不大于 1"]),
        (["--no_repeat_ngram_size", "-1"], ["--no_repeat_ngram_size", "不小于 0"]),
        (["--num_candidates", "0"], ["--num_candidates", "不小于 1"]),
        (["--num_candidates", "1001"], ["--num_candidates", "不大于 1000"]),
        (["--precision", "fp8"], ["--precision", "fp8", "int8"]),
        (["--mmi_model_path", "."], ["--mmi_model_path", "--num_candidates"]),
        (["--input_path", "x.txt"], ["--input_path", "--output_path"]),
        (["--input_path", "no.txt", "--output_path", "y.txt"], ["no.txt"]),
        (["--report"], ["--report", "--input_path"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--device", "a"], ["--device", "'a'"]),
        (["--top", "3"], ["--top"]),
    ],
)
def test_wrong_use_exits_2_with_one_sentence(options, named, model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    extra = options(model_dir) if callable(options) else options
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: interact.main(["--model_path", str(model_dir), *extra]))
    out, err = capsys.readouterr()
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert out == "" or replies_in(out) == []  # 在后台读模型，毛病可能在问候之后才发现
    assert err.startswith("错误：")
    for name in named:
        assert name in err
