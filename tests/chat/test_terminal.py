"""真的终端（pty）：回复写着的时候按的键和打的字、贴进来的几行、以前打过的话、补全。

随机的时刻每种试 TRIES 次；要试一百次：CHITCHAT_TRIES=100 pytest tests/chat/test_terminal.py
"""

from __future__ import annotations

import os
import random
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("没有 pty", allow_module_level=True)

import pty

import interact
from chitchat.chat.generation import Batch
from chitchat.chat.terminal.prompt import MAX_HISTORY, LineHistory
from chitchat.checkpoint import save_checkpoint
from chitchat.cli import run_cli
from chitchat.corpus.reader import read_dialogues

TRIES = int(os.environ.get("CHITCHAT_TRIES", "5"))
REPLY = "早上好，吃饭了吗"
STEP_SECONDS = 0.02
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])")


@pytest.fixture
def model_dir(tmp_path, make_parrot, tokenizer) -> Path:
    save_checkpoint(tmp_path / "parrot", make_parrot(REPLY), tokenizer)
    return tmp_path / "parrot"


class Terminal:
    """一次聊天：由 fork 出的子进程在 pty 里跑，省去每次几秒的导入。"""

    def __init__(self, model_dir: Path, *options: str) -> None:
        self.shown = ""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            _chat_in_child(["--no_cuda", "--model_path", str(model_dir), *options])

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def wait_for(self, pattern: str, seconds: float = 20) -> None:
        """等屏幕上在此之后出现 pattern。"""
        end = time.monotonic() + seconds
        seen = ""
        while not re.search(pattern, seen, re.DOTALL):
            assert time.monotonic() < end, f"no {pattern!r} in {seen!r}"
            seen = ESCAPES.sub("", seen + self._read(0.05))

    def _read(self, seconds: float) -> str:
        if not select.select([self.screen], [], [], seconds)[0]:
            return ""
        try:
            piece = os.read(self.screen, 65536).decode(errors="replace")
        except OSError:  # 对方走了
            return ""
        self.shown += piece
        return piece

    def exit_code(self, seconds: float = 20) -> int:
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.screen)
                assert "Traceback" not in self.shown
                return os.waitstatus_to_exitcode(status)
            self._read(0.02)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"does not end: {self.shown!r}")


def _chat_in_child(arguments: list[str]) -> None:
    try:
        os.environ |= {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(i, "w", closefd=False) for i in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        step = Batch.step

        def slowly(self):
            end = time.monotonic() + STEP_SECONDS
            while time.monotonic() < end:
                time.sleep(0.005)
            return step(self)

        Batch.step = slowly
        run_cli(lambda: interact.main(arguments))
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(stop.code)
    finally:
        os._exit(99)


def log_lines() -> list[str]:
    """聊天记录里的各行，不算开头的日期。"""
    text = Path("sample/sample.txt").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [line for line in text.splitlines() if not line.startswith("聊天记录")]


def turns(*utterances: str) -> list[str]:
    return [line for u in utterances for line in (f"user:{u}", f"chatbot:{REPLY}")]


def begin(model_dir: Path, seed: int) -> Terminal:
    """开始聊天，说一句，等到回复的随机一刻。"""
    Path("sample/sample.txt").unlink(missing_ok=True)
    terminal = Terminal(model_dir)
    terminal.wait_for("user:")
    terminal.type("你好\r")
    terminal.wait_for("chatbot:")
    time.sleep(random.Random(seed).uniform(0, STEP_SECONDS * (len(REPLY) + 4)))
    return terminal


@pytest.mark.parametrize("key", ["\x04", "\x1a"], ids=["ctrl-d", "ctrl-z"])
@pytest.mark.parametrize("seed", range(TRIES))
def test_end_of_file_pressed_while_a_reply_is_written_ends_the_chat_after_it(key, seed, model_dir):
    terminal = begin(model_dir, seed)
    terminal.type(key)
    assert terminal.exit_code() == 0
    assert log_lines() == turns("你好")


@pytest.mark.parametrize("seed", range(TRIES))
def test_text_typed_while_a_reply_is_written_is_the_next_utterance(seed, model_dir):
    terminal = begin(model_dir, seed)
    terminal.type("晚安\r再")
    terminal.type("见\r\x04")
    assert terminal.exit_code() == 0
    assert log_lines() == turns("你好", "晚安", "再见")


@pytest.mark.parametrize("seed", range(TRIES))
def test_ctrl_c_while_a_reply_is_written_stops_only_it(seed, model_dir):
    terminal = begin(model_dir, seed)
    terminal.type("晚安\x03")
    time.sleep(STEP_SECONDS * 2)
    terminal.type("\r\x04")
    assert terminal.exit_code() == 0
    asked, said, *rest = log_lines()
    assert asked == "user:你好"
    assert f"chatbot:{REPLY}".startswith(said)
    # 回复已经说完、提示符已经出来时，Ctrl+C 结束整个聊天
    assert rest == (turns("晚安") if said != f"chatbot:{REPLY}" or rest else [])


@pytest.mark.parametrize("key", ["\x04", "\x1a", "\x03"], ids=["ctrl-d", "ctrl-z", "ctrl-c"])
def test_each_key_ends_the_chat_at_the_prompt(key, model_dir):
    terminal = Terminal(model_dir)
    terminal.wait_for("user:")
    terminal.type("你好\r")
    terminal.wait_for("chatbot:.*user:")
    terminal.type(key)
    assert terminal.exit_code() == 0
    assert log_lines() == turns("你好")


@pytest.mark.parametrize("is_bracketed", [True, False])
def test_paste_of_twenty_lines_is_twenty_utterances(is_bracketed, model_dir):
    lines = [f"你好{chr(ord('a') + i)}" for i in range(20)]
    text = "\r".join(lines)
    terminal = Terminal(model_dir)
    terminal.wait_for("user:")
    terminal.type(f"\x1b[200~{text}\x1b[201~" if is_bracketed else text)
    terminal.type("!\r\x04")  # 最后一行没有换行，还可以接着改
    assert terminal.exit_code(40) == 0
    assert log_lines() == turns(*lines[:-1], f"{lines[-1]}!")
    shown = ESCAPES.sub("", terminal.shown)
    assert all(f"user:{line}" in shown for line in lines[1:-1]) or not is_bracketed


def test_a_line_can_be_edited(model_dir):
    terminal = Terminal(model_dir)
    terminal.wait_for("user:")
    terminal.type("晚好\x7f安\x1b[D早\r\x04")
    assert terminal.exit_code() == 0
    assert log_lines() == turns("晚早安")


def test_lines_of_earlier_chats_come_back(model_dir):
    for keys in ("你好\r晚安\r\x04", "\x1b[A\x1b[A\r\x04"):
        terminal = Terminal(model_dir)
        terminal.wait_for("user:")
        terminal.type(keys)
        assert terminal.exit_code() == 0
    assert log_lines() == turns("你好", "晚安", "你好")
    assert Path("sample/.history").read_text(encoding="utf-8") == "你好\n晚安\n你好\n"
    assert Path("sample/.history").stat().st_mode & 0o777 == 0o600


def test_input_history_can_be_turned_off(model_dir):
    terminal = Terminal(model_dir, "--no_input_history")
    terminal.wait_for("user:")
    terminal.type("你好\r")
    terminal.wait_for("chatbot:.*user:")
    terminal.type("\x1b[A")
    terminal.wait_for("你好")
    terminal.type("！\r\x04")
    assert terminal.exit_code() == 0
    assert log_lines() == turns("你好", "你好！")
    assert not Path("sample/.history").exists()


def test_history_keeps_the_last_thousand_lines(tmp_path):
    path = tmp_path / ".history"
    path.write_text("".join(f"{i}\n" for i in range(1500)), encoding="utf-8")
    history = LineHistory(path)
    assert list(history.load_history_strings())[:2] == ["1499", "1498"]
    history.store_string("甲\n乙")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == MAX_HISTORY + 1
    assert (lines[0], lines[-1]) == ("500", "甲 乙")


def test_history_that_cannot_be_read_or_written_is_none(tmp_path):
    history = LineHistory(tmp_path)
    assert list(history.load_history_strings()) == []
    history.store_string("甲")


def test_tab_completes_commands_and_knobs(model_dir):
    terminal = Terminal(model_dir)
    terminal.wait_for("user:")
    terminal.type("/sav\t")
    terminal.wait_for("/save")
    terminal.type(" chat.txt\r")
    terminal.wait_for("还没有可以保存的对话.*user:")
    terminal.type("/set tem\t")
    terminal.wait_for("temperature")
    terminal.type(" 0.5\r")
    terminal.wait_for(r"temperature = 0\.5")
    terminal.type("你好\t\r\x04")
    assert terminal.exit_code() == 0
    assert log_lines() == turns("你好")


def test_the_terminal_is_put_back(model_dir):
    import termios

    terminal = Terminal(model_dir)
    before = termios.tcgetattr(terminal.screen)
    terminal.wait_for("user:")
    terminal.type("你好\r\x04")
    terminal.wait_for("chatbot:")
    during = termios.tcgetattr(terminal.screen)
    assert not during[3] & termios.ECHO
    while os.waitpid(terminal.pid, os.WNOHANG)[0] == 0:
        after = termios.tcgetattr(terminal.screen)
        terminal._read(0.01)
    assert after[3] & termios.ECHO == before[3] & termios.ECHO != 0


def test_a_saved_chat_is_a_corpus(model_dir):
    terminal = Terminal(model_dir)
    terminal.wait_for("user:")
    terminal.type("你好\r/save chat.txt\r\x04")
    assert terminal.exit_code() == 0
    assert list(read_dialogues(Path("chat.txt"))) == [["你好", REPLY]]
