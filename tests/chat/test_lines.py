"""标准输入：管道里的编码逐行认出，终端里没有语言设置也能打中文。"""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import interact
from chitchat.errors import UserError

LINES = ["你好", "hello", "晚安，再见"]


def read_pipe(monkeypatch, data: bytes) -> list[str]:
    wrapper = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), "utf-8", errors="replace")
    monkeypatch.setattr("sys.stdin", wrapper)
    return [line.strip() for line in interact.read_lines(is_terminal=False)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be"]
)
def test_piped_encoding_is_recognised(encoding, end, monkeypatch):
    data = "".join(line + end for line in LINES).encode(encoding)
    assert read_pipe(monkeypatch, data) == LINES


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_encoding_seen_only_after_the_first_bytes_is_still_recognised(encoding, monkeypatch):
    data = "hello\n" * 3000 + "你好\n"
    assert read_pipe(monkeypatch, data.encode(encoding)) == ["hello"] * 3000 + ["你好"]


def test_other_bytes_are_refused_with_a_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"第 2 行.*iconv"):
        read_pipe(monkeypatch, b"hello\n\xff\xfe\xff\n")


def test_old_line_ends_still_end_a_line(monkeypatch):
    assert read_pipe(monkeypatch, "你好\r晚安\r\n".encode()) == ["你好", "晚安"]


def test_first_line_is_answered_before_the_second_is_sent():
    code = (
        "import interact\nfor x in interact.read_lines(is_terminal=False): print(ascii(x.strip()))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-u", "-c", code], **pipes) as process:
        for line in LINES:
            process.stdin.write(f"{line}\n".encode("gbk"))
            process.stdin.flush()
            assert process.stdout.readline().decode().strip() == ascii(line)
        process.stdin.close()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    "settings",
    [
        {"LC_ALL": "zh_CN.GBK"},
        {"LC_ALL": "xx_XX.UTF-8"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {},
    ],
    ids=str,
)
def test_typed_chinese_survives_a_locale_that_is_missing(settings):
    import pty

    code = (
        "import interact, chitchat.cli\n"
        "def main():\n"
        "    print(ascii(next(interact.read_lines(is_terminal=True))))\n"
        "    return 0\n"
        "chitchat.cli.run_cli(main)"
    )
    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**kept, "TERM": "dumb", **settings},
    )
    os.close(theirs)
    shown = b""
    while b"user:" not in shown:
        shown += os.read(ours, 4096)
    os.write(ours, "你好\r".encode())
    process.wait(timeout=20)
    while ascii("你好").encode() not in shown:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert ascii("你好") in shown.decode(errors="replace")
