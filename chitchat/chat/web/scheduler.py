"""排队和一起生成：一个线程带着一批，每走一步，新来的可以加入，说完的、走开的退出。"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from chitchat.chat.generation import MAX_ROWS, Batch, Row
from chitchat.chat.options import SamplingOptions

if TYPE_CHECKING:
    from chitchat.chat.candidates import Candidate
    from chitchat.chat.chatbot import Chatbot

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # 排队的最多几句，再来的请它稍后再试
MAX_PREFILL = 256  # 每一步最多送入几个新来的 token（至少一句）：已经在说的不能停太久


class QueueFullError(Exception):
    """排队的人太多。"""


class Ticket:
    """一句回复的号：在事件循环里逐个等它的 token，随时可以取消。

    Attributes:
        rows: 一行；有多个候选时是每个候选一行。
        candidates: 说完之后的全部候选，选中的在最前；只有一行时是空的。
        token_ids: 到目前为止给出的 token。
        is_cancelled: 是否不要了。
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.candidates: list[Candidate] = []
        self.token_ids: list[int] = []
        self.is_cancelled = False
        self._events: asyncio.Queue[int | Exception | None] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """排队之前，在等它的事件循环里调用。"""
        self._loop = asyncio.get_running_loop()

    @property
    def is_cut(self) -> bool:
        """回复是不是因为到了 max_len 才停的。"""
        return len(self.token_ids) >= self.rows[0].options.max_len

    def cancel(self) -> None:
        """不要了：它的行在下一步之前让出来，等着的人不再等。"""
        self.is_cancelled = True
        self._events.put_nowait(None)

    async def tokens(self) -> AsyncIterator[int]:
        """逐个给出 token；有多个候选时，选好之后一起给出。"""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            self.token_ids.append(event)
            yield event

    def deliver(self, *events: int | Exception | None) -> None:
        """由生成的线程送来；None 表示说完了。"""
        with contextlib.suppress(RuntimeError):  # 事件循环已经关了
            self._loop.call_soon_threadsafe(lambda: [self._events.put_nowait(e) for e in events])


class Scheduler:
    """带着一批的线程。"""

    def __init__(
        self, bot: Chatbot, *, max_rows: int = MAX_ROWS, max_waiting: int = MAX_WAITING
    ) -> None:
        """准备好，start 之后才开始。

        Args:
            bot: 模型。
            max_rows: 一起生成的最多几行。
            max_waiting: 排队的最多几句。
        """
        self._bot = bot
        self.max_rows = max_rows
        self._max_waiting = max_waiting
        self._batch = Batch(bot.generator)
        self._running: list[Ticket] = []
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    @property
    def num_running(self) -> int:
        """正在生成的句数。"""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """排队的句数。"""
        return sum(not ticket.is_cancelled for ticket in tuple(self._waiting))

    def start(self) -> None:
        """开始生成；先自己说几句，TorchScript 最初几次很慢，不让第一个人等。"""
        options, rng = SamplingOptions(max_len=3), random.Random(0)
        sep = self._bot.ids.sep
        for num_rows in (1, 1, 3):
            contexts = [[self._bot.ids.cls] + [sep] * (2 + i) for i in range(num_rows)]
            self._bot.generator.generate([Row(context, options, rng) for context in contexts])
        self._thread.start()

    def close(self) -> None:
        """把已经收下的都说完，然后停下。"""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check_room(self, num_tickets: int, num_rows: int) -> None:
        """看还收不收得下这么多句、一共这么多行。

        Raises:
            QueueFullError: 排队的太多。
        """
        with self._changed:
            kept = [ticket for ticket in self._waiting if not ticket.is_cancelled]
            num_rows += sum(len(t.rows) for t in (*self._running, *kept))
            is_idle = num_rows <= self.max_rows  # 都放得进批里，不算排队
            if not is_idle and len(kept) + num_tickets > self._max_waiting:
                raise QueueFullError

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """排队；要么都收下，要么都不收。

        Raises:
            QueueFullError: 排队的太多。
        """
        with self._changed:
            self.check_room(len(tickets), sum(len(t.rows) for t in tickets))
            self._waiting.extend(tickets)
            self._changed.notify()

    def _run(self) -> None:
        is_going = True
        while is_going:
            try:
                is_going = self._admit()
                self._step()
            except Exception as error:
                logger.exception("generation failed")
                for ticket in self._running:
                    ticket.deliver(error)
                self._batch, self._running = Batch(self._bot.generator), []

    def _admit(self) -> bool:
        """让走开的退出，让排着队的加入；没有事做就等。返回 False 表示该停了。"""
        with self._changed:
            while not (self._waiting or self._running or self._is_closing):
                self._changed.wait()
            for ticket in (t for t in self._running if t.is_cancelled):
                for row in ticket.rows:
                    self._batch.remove(row)
            self._running = [t for t in self._running if not t.is_cancelled]
            tickets = self._next_tickets()
            self._running += tickets
            for _, alike in itertools.groupby(tickets, key=lambda t: id(t.rows[0].context)):
                self._batch.add(row for ticket in alike for row in ticket.rows)
            return bool(self._running or self._waiting or not self._is_closing)

    def _next_tickets(self) -> list[Ticket]:
        """从队首取出这一步加入的，不多于批里的空位和 MAX_PREFILL。"""
        chosen: list[Ticket] = []
        room = self.max_rows - sum(len(t.rows) for t in self._running)
        num_tokens, context = 0, None
        while self._waiting:
            ticket = self._waiting[0]
            if not ticket.is_cancelled:
                row = ticket.rows[0]
                if row.context is not context:  # 同一个请求的几个回复，上下文只算一次
                    num_tokens, context = num_tokens + len(row.context), row.context
                if len(ticket.rows) > room or (chosen and num_tokens > MAX_PREFILL):
                    break
                room -= len(ticket.rows)
                chosen.append(ticket)
            self._waiting.popleft()
        return chosen

    def _step(self) -> None:
        owners = {ticket.rows[0]: ticket for ticket in self._running if len(ticket.rows) == 1}
        for row, token_id in self._batch.step():
            if row in owners:
                owners[row].deliver(token_id)
        finished = [t for t in self._running if all(row.is_finished for row in t.rows)]
        self._running = [t for t in self._running if t not in finished]
        for ticket in finished:
            if len(ticket.rows) > 1:
                ticket.candidates = self._bot.ranker.rank(ticket.rows)
                ticket.deliver(*ticket.candidates[0].token_ids)
            ticket.deliver(None)
