"""一个请求的各个回复：排队、逐段给出文字、遇到 stop 就停、数 token、记下聊天记录。"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from chitchat.chat.context import TextStream
from chitchat.chat.web.requests import ChatRequest
from chitchat.chat.web.scheduler import Ticket
from chitchat.tokens.tokenizer import decode_response

if TYPE_CHECKING:
    from chitchat.chat.chatbot import Chatbot


class StopFilter:
    """收下一段段文字，给出可以发出去的；遇到 stop 中的任何一个就停，它和之后的都不给。

    末尾可能是某个 stop 的开头，就先留着，等看得出来再给。
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def put(self, piece: str) -> str:
        """收下一段文字。"""
        if self.is_stopped:
            return ""
        text = self._held + piece
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        size = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def end(self) -> str:
        """不再有文字：给出留着的。"""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """text 的末尾与 stop 的开头最多有几个字相同。"""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class Choice:
    """一个回复：逐段给出文字的异步迭代器。

    Attributes:
        index: 第几个，从 0 开始。
        ticket: 它的号。
        text: 到目前为止给出的文字。
        finish_reason: ``stop`` 或 ``length``；还没说完时是 None。
    """

    def __init__(self, bot: Chatbot, index: int, ticket: Ticket, stops: Sequence[str]) -> None:
        self.index = index
        self.ticket = ticket
        self.text = ""
        self.finish_reason: str | None = None
        self._stream = TextStream(bot.tokenizer)
        self._filter = StopFilter(stops)
        self._bot = bot

    async def pieces(self) -> AsyncIterator[str]:
        """逐段给出文字；被取消时到此为止，finish_reason 仍是 None。"""
        async for token_id in self.ticket.tokens():
            if piece := self._filter.put(self._stream.put(token_id)):
                self.text += piece
                yield piece
            if self._filter.is_stopped:
                break
        is_given_up = self.ticket.is_cancelled
        if self._filter.is_stopped:
            self.ticket.cancel()
        elif piece := self._filter.put(self._stream.end()) + self._filter.end():
            self.text += piece
            yield piece
        if not is_given_up:
            is_cut = self.ticket.is_cut and not self._filter.is_stopped
            self.finish_reason = "length" if is_cut else "stop"

    def list_candidates(self) -> list[dict[str, object]]:
        """全部候选和它们的分数，选中的在最前。"""
        return [
            {
                "text": decode_response(self._bot.tokenizer, candidate.token_ids),
                "likelihood": candidate.likelihood,
                "backward": candidate.backward,
            }
            for candidate in self.ticket.candidates
        ]


def open_choices(bot: Chatbot, request: ChatRequest, rng: random.Random) -> list[Choice]:
    """每个要的回复一个 Choice，还没有排队。

    第一个回复与命令行用同一个 ``--seed`` 时的第一句相同。

    Args:
        bot: 模型。
        request: 请求。
        rng: 请求没有指定种子时，由它给出。
    """
    history = bot.encode_history(request.history, request.options)
    context, _ = bot.build_context(history, request.options)
    seed = rng.getrandbits(32) if request.seed is None else request.seed
    choices = []
    for i in range(request.num_choices):
        source = random.Random(f"{seed}/{i}" if i else seed)
        rows = bot.candidate_rows(context, request.options, source)
        choices.append(Choice(bot, i, Ticket(rows), request.stops))
    return choices
