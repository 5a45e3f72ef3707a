"""终端的键盘：回复写着的时候打的字留给下一个提示符，那时按 Ctrl+C 只停下这句回复。"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn


@contextlib.contextmanager
def keep_keys() -> Iterator[None]:
    """这期间打的字不显示、不解释，原样排着队；提示符出现时由它读走。

    平常的终端自己编辑一行：那时按下的 Ctrl+D 在提示符改变终端的状态时会丢失，Ctrl+C 会清空
    已经打的字，Ctrl+Z 会越过它们。Windows 没有这些事。
    """
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError):  # Windows，或者不是真的终端
        yield
        return
    iflag, oflag, cflag, lflag, *speeds, keys = termios.tcgetattr(terminal)
    iflag &= ~termios.ICRNL
    lflag &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
    lflag |= termios.ISIG | termios.NOFLSH
    keys[termios.VSUSP] = bytes([os.fpathconf(terminal, "PC_VDISABLE")])
    keys[termios.VMIN], keys[termios.VTIME] = 1, 0
    now = [iflag, oflag, cflag, lflag, *speeds, keys]
    termios.tcsetattr(terminal, termios.TCSADRAIN, now)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextlib.contextmanager
def stop_key() -> Iterator[Callable[[], bool]]:
    """这期间按 Ctrl+C 不抛出异常，只记下来。

    Yields:
        有没有按过。
    """
    presses = []
    previous = signal.signal(signal.SIGINT, lambda signum, frame: presses.append(signum))
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def no_stop_key() -> Iterator[Callable[[], bool]]:
    """管道里没有这样的键：Ctrl+C 照旧结束整个聊天。"""
    yield lambda: False


@contextlib.contextmanager
def suspend_key_ends_chat() -> Iterator[None]:
    """让 Ctrl+Z 像 Ctrl+D 一样结束聊天，而不是把程序挂到后台；没有 SIGTSTP 的系统上不变。"""

    def end(signum: int, frame: object) -> NoReturn:
        raise EOFError

    if not hasattr(signal, "SIGTSTP"):
        yield
        return
    previous = signal.signal(signal.SIGTSTP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, previous)
