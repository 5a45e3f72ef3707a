"""端口和信号：占住端口，读好模型就开始回答；SIGTERM 或 Ctrl+C 时把正在说的说完再走。"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import uvicorn

from chitchat.chat.web.api import Service, build_app
from chitchat.chat.web.connections import ACCEPT_BURST, Connection, LoopErrors, connection_limit
from chitchat.chat.web.gate import LOOPBACK, App, is_loopback
from chitchat.errors import UserError

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 60  # 停下时最多等多久
BACKLOG = 1024  # 还没有接的连接最多几个


def allowed_hosts(host: str) -> frozenset[str] | None:
    """Host 里可以有的名字；不只在本机听时是 None，由钥匙把关。"""
    return frozenset({*LOOPBACK, host.lower()}) if is_loopback(host) else None


def open_socket(host: str, port: int) -> socket.socket:
    """占住端口并开始听：读模型时来的连接在那里等着。

    Raises:
        UserError: 地址不对，或端口已经有程序在用。
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family, kind, protocol, _, address = found
        # 写明是 TCP，asyncio 才会让小的包立刻发出去，不攒 40 毫秒
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} 不是本机的地址（{error}）：请改成例如 127.0.0.1") from None
    try:
        if os.name != "nt":  # Windows 上它会让两个程序占住同一个端口
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UserError(
            f"{host} 的端口 {port} 用不了（{reason}）："
            "可能已经有一个服务器，请停掉它，或换一个 --port"
        ) from None
    return listener


@dataclass(frozen=True)
class Access:
    """谁可以用：钥匙，和别处的网页。"""

    api_key: str | None = None
    cors: str | None = None

    def check(self, host: str) -> None:
        """不合适的组合抛出 UserError。"""
        if not is_loopback(host) and self.api_key is None:
            raise UserError(
                f"--host {host} 让别的机器也连得上：请同时给出 --api_key，只让有钥匙的人用"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("--api_key 应为 ASCII 字母、数字和符号")
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("--api_key 不能是空的")
        if self.cors not in (None, "*") and not re.fullmatch(r"https?://[^/\s]+", self.cors):
            raise UserError(
                f"--cors 应为网站的来源，例如 http://localhost:3000，得到 {self.cors!r}"
            )


class _Server(uvicorn.Server):
    """收到信号就说完再停，以 0 退出；uvicorn 自己会在停下之后再发一次信号，退出码因此不是 0。"""

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(LoopErrors())
        await super().startup(sockets=sockets)
        for listener in sockets or ():  # asyncio 把它改成了一轮接几个
            listener.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def build_server(app: App) -> uvicorn.Server:
    """准备好的 uvicorn；run(sockets=[...]) 一直回答，直到收到信号。"""
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, limit=connection_limit()),
        loop="asyncio",
        backlog=ACCEPT_BURST,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return _Server(config)


def keep_logs_together() -> None:
    """uvicorn 和 asyncio 的警告和错误也写进本项目的日志，不写到标准错误。"""
    for name in ("uvicorn", "asyncio"):
        other = logging.getLogger(name)
        other.handlers = list(logging.getLogger("chitchat").handlers)
        other.propagate = False


def serve(service: Service, listener: socket.socket, *, host: str, access: Access) -> None:
    """一直回答，直到收到信号；收下的都说完才返回。"""
    keep_logs_together()
    app = build_app(service, hosts=allowed_hosts(host), api_key=access.api_key, cors=access.cors)
    service.scheduler.start()
    try:
        build_server(app).run(sockets=[listener])
    finally:
        service.scheduler.close()
