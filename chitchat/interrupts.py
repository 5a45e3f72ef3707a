"""启动时的 Ctrl+C。脚本最先导入这里，所以只用最轻的标准库，连 typing 也不用。"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from chitchat.errors import EXIT_INTERRUPTED


def guard_startup() -> None:
    """从现在到 run_cli 接手，Ctrl+C 安静地退出：导入 torch 要好几秒，那时打断会有 traceback。

    用 nohup 或 ``&`` 启动时 Ctrl+C 本来就不理会，保持不变。
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)


def exit_at_once(signum: int, frame: object) -> None:
    """不做任何收尾，立刻以 130 退出；只用在没有什么要收尾的时候。"""
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def exits_on_signal() -> Iterator[None]:
    """SIGTERM 或 Ctrl+C 时立刻以 0 退出：服务器开始回答之前没有什么要收尾，读模型却要好几秒。"""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: os._exit(0)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
