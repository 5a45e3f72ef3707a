"""真正的进程：十二段对话背得出来；聊天被杀或按下控制键，记录都完整。"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import ROOT, TINY_VOCAB

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])")
DIALOGUES = {
    "你好": "你好，早",
    "早上好": "早，吃饭了吗？",
    "吃饭了吗": "吃饭了！",
    "你是谁": "我是小柚",
    "我是谁": "你是你",
    "天气好吗": "天气真不错…",
    "晚安": "晚安，再见",
    "再见": "再见！",
    "hello": "hello你好",
    "你在吗": "在在在",
    "早不早": "很早很早",
    "真不错": "😂😂真好",
}
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": len(TINY_VOCAB),
    "n_positions": 160,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
EPOCHS = 40
KEYS = {"Ctrl+D": b"\x04", "Ctrl+C": b"\x03", "Ctrl+Z": b"\x1a"}
HEADER = r"聊天记录\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+:\n"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def run_script(folder: Path, script: str, *options: str, stdin: str = "") -> str:
    """运行一个脚本，成功才返回它的标准输出。"""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *options],
        cwd=folder,
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """预处理、训练之后的文件夹；路径用的全是默认值。"""
    folder = tmp_path_factory.mktemp("project")
    for name in ("data", "vocab", "model"):
        (folder / name).mkdir()
    # 每段写两遍：留作验证的那一段，在训练集里也还有。
    corpus = "\n\n".join(f"{opening}\n{reply}" for opening, reply in DIALOGUES.items())
    (folder / "data" / "train.txt").write_text(f"{corpus}\n\n{corpus}\n", encoding="utf-8")
    (folder / "vocab" / "vocab.txt").write_text("\n".join(TINY_VOCAB), encoding="utf-8")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    run_script(folder, "preprocess.py")
    options = ["--optimizer", "muon", "--lr", "1e-2", "--batch_size", "4", "--precision", "fp32"]
    options += ["--gradient_accumulation_steps", "1", "--save_total_limit", "1", "--val_num", "1"]
    run_script(folder, "train.py", "--no_cuda", "--epochs", str(EPOCHS), *options)
    return folder


def test_learned_replies_are_repeated_word_for_word(trained):
    options = ["--no_cuda", "--topk", "1", "--max_history_len", "1"]
    chat = run_script(
        trained,
        "interact.py",
        *["--model_path", f"model/epoch{EPOCHS}", "--save_samples_path", "heart", *options],
        stdin="".join(f"{opening}\n" for opening in DIALOGUES),
    )
    greeting, *replies = chat.splitlines()
    assert "chatbot" in greeting
    assert replies == [f"chatbot:{reply}" for reply in DIALOGUES.values()]
    turns = "".join(f"user:{u}\nchatbot:{r}\n" for u, r in DIALOGUES.items())
    samples = (trained / "heart" / "sample.txt").read_text(encoding="utf-8")
    assert re.fullmatch(HEADER + re.escape(turns), samples)


def start_chat(folder: Path, samples: str, **streams: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "interact.py"), "--no_cuda", "--topk", "1"]
    command += ["--model_path", f"model/epoch{EPOCHS}", "--save_samples_path", samples]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **streams)


def take_terminal(terminal: int) -> None:
    """在子进程里把伪终端变成控制终端，控制键才会变成信号。"""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def chats(trained) -> Iterator[dict[str, tuple[subprocess.Popen, int | None]]]:
    """一齐启动的几场聊天：每场的进程和伪终端；一齐启动是为了省时间。"""
    started = {"pipe": (start_chat(trained, "pipe", stdin=PIPE, stdout=PIPE), None)}
    for name in KEYS:
        ours, theirs = os.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        prepare = functools.partial(take_terminal, theirs)
        started[name] = (start_chat(trained, name, **streams, preexec_fn=prepare), ours)
        os.close(theirs)
    yield started
    for chat, _ in started.values():
        chat.kill()
        chat.wait()


def assert_samples_are_one_whole_turn(path: Path) -> None:
    turn = re.escape(f"user:你好\nchatbot:{DIALOGUES['你好']}\n")
    assert re.fullmatch(HEADER + turn, path.read_text(encoding="utf-8"))


def test_kill_9_in_mid_chat_loses_no_finished_line(trained, chats):
    chat, _ = chats["pipe"]
    with chat:
        chat.stdin.write("你好\n".encode())
        chat.stdin.flush()
        assert "chatbot" in chat.stdout.readline().decode()
        assert chat.stdout.readline().decode() == f"chatbot:{DIALOGUES['你好']}\n"
        time.sleep(0.2)
        chat.send_signal(signal.SIGKILL)
        assert chat.wait() == -signal.SIGKILL
    assert_samples_are_one_whole_turn(trained / "pipe" / "sample.txt")


def read_until(terminal: int, text: str) -> str:
    """从伪终端读，直到出现 text；移动光标、改颜色的控制序列不算。"""
    raw, seen, deadline = b"", "", time.monotonic() + 60
    while text not in seen:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], seen
        raw += os.read(terminal, 4096)
        seen = ESCAPES.sub("", raw.decode(errors="ignore"))
    return seen


@pytest.mark.parametrize("name", KEYS)
def test_control_key_in_a_terminal_ends_the_chat_with_exit_code_0(name, trained, chats):
    chat, terminal = chats[name]
    read_until(terminal, "user:")
    os.write(terminal, "你好\n".encode())
    assert f"chatbot:{DIALOGUES['你好']}" in read_until(terminal, "\nuser:")
    os.write(terminal, KEYS[name])
    assert chat.wait(timeout=20) == 0
    assert_samples_are_one_whole_turn(trained / name / "sample.txt")
