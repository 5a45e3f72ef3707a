"""连接：同时有几个、请求最多来多久、停下时哪些不等。uvicorn 自己只管请求来全之后的事。"""

from __future__ import annotations

import asyncio
import logging
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256  # 一批 32 句加排队 64 句之外，还有开着的网页
HEAD_SECONDS = 10  # 请求的头最多等多久
WRITE_SECONDS = 30  # 对方不读，最多等多久
ACCEPT_BURST = 16  # 事件循环一轮最多接几个；接进来才知道太多
OWN_FILES = 128  # 留给权重、日志和正在关的连接的文件描述符
TELL_SECONDS = 10  # 同样的毛病至少隔这么久才再说一次


def connection_limit() -> int:
    """最多同时几个连接：系统给的文件描述符少时，比 MAX_CONNECTIONS 少。"""
    try:
        import resource
    except ImportError:  # Windows 没有这个限制
        return MAX_CONNECTIONS
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, num_files - OWN_FILES))


class Connection(H11Protocol):
    """一个连接。

    连接满了，就关掉等请求等得最久的一个；都在等回答时，多出来的请求得到 503（由 Gate 回答）。
    """

    def __init__(self, *args: object, limit: int, **kwargs: object) -> None:
        """limit 是最多同时几个连接，其余同 H11Protocol。"""
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._since = 0.0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """没有正在回答的请求。"""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_listening(self) -> bool:
        """还在等对方把一个请求说完，关掉它不会打断回答。"""
        return self.is_idle or (self.cycle.more_body and not self.cycle.response_started)

    def connection_made(self, transport: asyncio.Transport) -> None:
        """收下；太多时关掉一个闲着的。"""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # 有一点没写出去，pause_writing 就知道
        self._since = self.loop.time()
        if self._num_open() > self._limit:
            others = self.connections - {self}
            listening = [c for c in others if c.is_listening and not c.transport.is_closing()]
            if listening:
                min(listening, key=lambda connection: connection._since).transport.abort()
        self._watch_head()

    def _num_open(self) -> int:
        """同时几个连接，不算已经在关的：它们要到事件循环的下一轮才从 connections 里消失。"""
        return sum(not c.transport.is_closing() for c in self.connections)

    def data_received(self, data: bytes) -> None:
        """收下一段。"""
        self.app_state = {"is_refused": self._num_open() > self._limit}
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """答完一个，等下一个。"""
        self._since = self.loop.time()
        super().on_response_complete()

    def _watch_head(self) -> None:
        """头从开始等的时候算起，不因为又来了一个字节而重新算。"""
        if not self.is_idle:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def pause_writing(self) -> None:
        """有写不出去的：对方太久不读就断开。"""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """都写出去了。"""
        self._write_timer = _cancelled(self._write_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """断开了。"""
        self._head_timer = _cancelled(self._head_timer)
        self._write_timer = _cancelled(self._write_timer)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """服务器要停了：正在答的答完，还没有说完的请求不等。"""
        if self.is_listening:
            self.transport.close()
        else:
            self.cycle.keep_alive = False


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class LoopErrors:
    """事件循环自己的错误：系统的毛病（例如文件描述符用完了）一行，隔一阵再说；别的照旧。

    asyncio 每次接不进连接都写一份 traceback，一秒上千份。
    """

    def __init__(self) -> None:
        self._told_at = -float("inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """是 ``loop.set_exception_handler`` 要的函数。"""
        error = context.get("exception")
        if not isinstance(error, OSError):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._told_at >= TELL_SECONDS:
            self._told_at = time.monotonic()
            logger.error("event loop: %s (%s)", context["message"], type(error).__name__)
