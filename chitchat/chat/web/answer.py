"""一次回答的响应：一次给全，或边生成边发（SSE）；对方走了就让出它的行。"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chitchat.chat.web.chat_log import ChatLog
from chitchat.chat.web.choices import Choice
from chitchat.chat.web.errors import ApiError
from chitchat.chat.web.gate import Receive, Scope, Send
from chitchat.chat.web.requests import ChatRequest
from chitchat.chat.web.responses import Completion, event, usage
from chitchat.chat.web.scheduler import Ticket

SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Answer(Response):
    """一次回答：一次给全（whole），或作为响应边生成边发；对方走了就不再生成。"""

    def __init__(
        self,
        wanted: ChatRequest,
        choices: Sequence[Choice],
        *,
        model_id: str,
        chat_log: ChatLog | None,
        notes: dict[str, object],
    ) -> None:
        """准备回答。

        Args:
            wanted: 请求。
            choices: 已经排队的各个回复。
            model_id: 模型的名字。
            chat_log: 聊天记录；None 表示不记。
            notes: 写进这个请求的那行日志。
        """
        super().__init__(media_type="text/event-stream", headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._chat_log = chat_log
        self._wanted = wanted
        self._choices = choices
        self._notes = notes
        self._completion = Completion(model_id)

    async def whole(self, request: Request) -> Response:
        """等全部说完。"""
        async with self._settling(request.receive):
            for choice in self._choices:
                async for _ in choice.pieces():
                    pass
            return JSONResponse(self._completion.whole(self._choices))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """一段段地发出去。"""
        async with self._settling(receive):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in self._events():
                await send({"type": "http.response.body", "body": event(data), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[object]:
        completion = self._completion
        try:
            async for choice, piece in _interleave(self._choices):
                if piece is None:
                    yield completion.closing(choice)
                else:
                    yield completion.piece(choice, piece) if piece else completion.opening(choice)
        except Exception:  # noqa: BLE001  头已经发了，只能在流里说；毛病在日志里
            yield ApiError(500, "生成时出了错，请看服务器的日志", code="internal_error").body
            return
        if self._wanted.has_usage:
            yield completion.accounts(self._choices)
        yield "[DONE]"

    @contextlib.asynccontextmanager
    async def _settling(self, receive: Receive) -> AsyncIterator[None]:
        """看着对方有没有走；不管怎样结束，都让出批里的行，记下说过的话。"""
        tickets = [choice.ticket for choice in self._choices]
        watcher = asyncio.create_task(_cancel_when_gone(receive, tickets))
        try:
            yield
        finally:
            watcher.cancel()
            for choice in self._choices:
                if choice.finish_reason is None:
                    choice.ticket.cancel()
            counts = usage(self._choices)
            self._notes |= {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
            if any(choice.finish_reason is None for choice in self._choices):
                self._notes["is_given_up"] = True
            texts = [choice.text for choice in self._choices if choice.text]
            if self._chat_log is not None and texts:
                self._chat_log.add(self._wanted.history[-1], texts)


async def _cancel_when_gone(receive: Receive, tickets: Sequence[Ticket]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for ticket in tickets:
        ticket.cancel()


async def _interleave(choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, str | None]]:
    """各个回复谁有新的文字就给出谁的：先是一个空的，然后是各段，说完时是 None。"""
    pieces: asyncio.Queue[tuple[Choice, str | Exception | None]] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                pieces.put_nowait((choice, piece))
            pieces.put_nowait((choice, None))
        except Exception as error:  # noqa: BLE001  交给等着的人
            pieces.put_nowait((choice, error))

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        for choice in choices:
            yield choice, ""
        for _ in choices:
            while (item := await pieces.get())[1] is not None:
                if isinstance(item[1], Exception):
                    raise item[1]
                yield item
            yield item
    finally:
        for task in pumps:
            task.cancel()
