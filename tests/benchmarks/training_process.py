"""在伪终端里运行训练，从进度条读出走到了第几步；手动运行的几个脚本共用，只用于 Linux。"""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, ROOT / "train.py", "--no_cuda"]
TINY = {
    "model_type": "gpt2",
    "vocab_size": 13317,
    "n_positions": 160,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "activation_function": "gelu_pytorch_tanh",
}


def write_config(folder, **fields):
    """写下小模型的结构，返回路径。"""
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**TINY, **fields}), encoding="utf-8")
    return path


class TrainingProcess:
    """一个训练进程，或启动它的 torchrun。

    Attributes:
        text: 到目前为止的输出。
        step: 进度条上的更新次数；还没有开始更新时是 None。
        resumed_from: 从第几步接着训练，0 表示从头开始；还不知道时是 None。
        started: 启动的时刻，time.perf_counter() 的秒数；started_at 是 time.time() 的。
    """

    def __init__(self, command):
        self.text, self.step, self.resumed_from = "", None, None
        terminal, child_side = pty.openpty()
        fcntl.ioctl(child_side, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        self.started, self.started_at = time.perf_counter(), time.time()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "TQDM_MININTERVAL": "0"},  # 进度条每步都更新
            stdin=subprocess.DEVNULL,
            stdout=child_side,
            stderr=child_side,
        )
        os.close(child_side)
        self._reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
        self._reader.start()

    def _read(self, terminal):
        with open(terminal, "rb", buffering=0) as file:  # noqa: PTH123  文件描述符没有路径
            while True:
                try:
                    piece = file.read(65536)
                except OSError:  # 另一端都关上了
                    return
                self.text += piece.decode(errors="replace")
                recent = self.text[-len(piece) - 100 :]
                if bars := re.findall(r"(\d+)/\d+ \[", recent):
                    self.step = int(bars[-1])
                for step, afresh in re.findall(r"resume: (?:epoch=\d+ step=(\d+)|(no) )", recent):
                    self.resumed_from = 0 if afresh else int(step)

    @property
    def is_running(self):
        return self.process.poll() is None

    def wait_until(self, condition, interval=0.001):
        """等到条件成立；训练先结束时返回 False。"""
        while self.is_running:
            if condition():
                return True
            time.sleep(interval)
        return False

    def wait(self):
        """等它结束，读完输出，返回退出码。"""
        code = self.process.wait()
        self._reader.join(10)
        return code

    def kill(self):
        """SIGKILL；返回被杀时是否还在运行。"""
        was_running = self.is_running
        self.process.kill()
        return self.wait() < 0 and was_running
