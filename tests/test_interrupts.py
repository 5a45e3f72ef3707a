"""开头几秒按 Ctrl+C：三个脚本都安静地以 130 退出，从脚本的第一行起。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from chitchat import interrupts
from chitchat.cli import run_cli

# 这个模块导入完时按 Ctrl+C；此后脚本还要导入别的
MOMENTS = {
    "preprocess.py": ["argparse", "logging", "numpy"],
    "train.py": ["argparse", "logging", "numpy", "torch.functional", "torch"],
    "interact.py": ["argparse", "logging", "tokenizers"],
}


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("script", "moment"), [(name, m) for name, moments in MOMENTS.items() for m in moments]
)
def test_ctrl_c_during_the_imports_exits_130_without_a_traceback(script, moment):
    command = [sys.executable, "-X", "importtime", str(ROOT / script)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == moment:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, said) == (130, [])


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_inside_main_and_again_while_leaving(presses):
    code = (
        "from chitchat.interrupts import guard_startup\n"
        "guard_startup()\n"
        "import atexit, os, signal, time\n"
        "from chitchat.cli import run_cli\n"
        "def press(): os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
        f"if {presses} == 2: atexit.register(press)\n"
        "run_cli(press)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_ignored_ctrl_c_stays_ignored(monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.guard_startup()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_without_the_guard_run_cli_leaves_the_handler_alone():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run_cli(lambda: 0)
    assert signal.getsignal(signal.SIGINT) is before
