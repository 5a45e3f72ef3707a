"""各个地址：OpenAI 的 models 和 chat/completions，网页和它要的旋钮，health。"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chitchat.chat.options import KNOBS, SamplingOptions
from chitchat.chat.web.answer import Answer
from chitchat.chat.web.chat_log import ChatLog
from chitchat.chat.web.choices import Choice, open_choices
from chitchat.chat.web.errors import ApiError, shown
from chitchat.chat.web.gate import (
    CLIENT_CLOSED,
    App,
    Gate,
    RequestLog,
    busy,
    error_response,
    read_body,
)
from chitchat.chat.web.page import load_page
from chitchat.chat.web.requests import ChatRequest, parse_chat_request
from chitchat.chat.web.responses import model_card
from chitchat.chat.web.scheduler import QueueFullError, Scheduler

if TYPE_CHECKING:
    from chitchat.chat.chatbot import Chatbot

logger = logging.getLogger(__name__)

MAX_CHOICES = 8
BODY_SECONDS = 30  # 请求体最多等多久
SMALL_BODY = 50_000  # 字节；更大的请求体在别的线程里读，不让事件循环等它
LARGE_BODY_RATE = 5_000_000  # 大的请求体每秒最多读多少字节：json 解析时，别的线程一步也走不了


@dataclass
class Service:
    """各个地址共用的东西。

    Attributes:
        bot: 模型。
        scheduler: 排队和生成。
        options: 旋钮的默认值，也是回复长度和历史句数的上限。
        model_id: 模型的名字。
        rng: 请求没有指定种子时由它给出。
        chat_log: 聊天记录；None 表示不记。
    """

    bot: Chatbot
    scheduler: Scheduler
    options: SamplingOptions
    model_id: str
    rng: random.Random
    chat_log: ChatLog | None

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.max_choices = min(MAX_CHOICES, self.scheduler.max_rows // self.bot.num_candidates)
        self._told: set[str] = set()
        self._reader = ThreadPoolExecutor(1, "reading")  # 只有一个：来得再多也只占一个核

    async def health(self, request: Request) -> Response:
        """还在、正在生成几句、排队几句。"""
        counts = {"running": self.scheduler.num_running, "waiting": self.scheduler.num_waiting}
        return JSONResponse({"status": "ok", **counts})

    async def list_models(self, request: Request) -> Response:
        """模型列表，只有一个。"""
        card = model_card(self.model_id, self.created)
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(self, request: Request) -> Response:
        """一个模型。"""
        name = request.path_params["name"]
        if name != self.model_id:
            message = f"没有模型 {shown(name)}：这里只有 {self.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(model_card(self.model_id, self.created))

    async def list_knobs(self, request: Request) -> Response:
        """旋钮的表和这里的默认值，网页的滑块照它来。"""
        knobs = [
            {
                "field": knob.field,
                "description": knob.description,
                "is_whole": knob.kind is int,
                "minimum": knob.minimum,
                "above": knob.above,
                "maximum": knob.maximum,
                "default": getattr(self.options, knob.field),
            }
            for knob in KNOBS.values()
        ]
        settings = {"model": self.model_id, "num_candidates": self.bot.num_candidates}
        return JSONResponse({**settings, "knobs": knobs})

    async def complete(self, request: Request) -> Response:
        """回答一次。"""
        with _full_queue_is_503():  # 满了就不必读请求体
            self.scheduler.check_room(1, self.bot.num_candidates)
        try:
            body = await asyncio.wait_for(read_body(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"请求体 {BODY_SECONDS} 秒还没有来完", code="timeout") from None
        if len(body) <= SMALL_BODY:
            wanted, choices = self._open(body)
        else:
            loop = asyncio.get_running_loop()
            wanted, choices = await loop.run_in_executor(self._reader, self._open_slowly, body)
        self._tell_ignored(wanted)
        for choice in choices:
            choice.ticket.open()
        with _full_queue_is_503():
            self.scheduler.submit([choice.ticket for choice in choices])
        answer = Answer(
            wanted,
            choices,
            model_id=self.model_id,
            chat_log=self.chat_log,
            notes=request.scope["notes"],
        )
        return answer if wanted.is_stream else await answer.whole(request)

    def _open(self, body: bytes) -> tuple[ChatRequest, list[Choice]]:
        """由请求体得到要做的事和还没有排队的各个回复。"""
        wanted = parse_chat_request(
            body, self.options, model_id=self.model_id, max_choices=self.max_choices
        )
        with _full_queue_is_503():  # 读请求体、等前面的人的时候，可能满了
            self.scheduler.check_room(1, self.bot.num_candidates)
        return wanted, open_choices(self.bot, wanted, self.rng)

    def _open_slowly(self, body: bytes) -> tuple[ChatRequest, list[Choice]]:
        time.sleep(len(body) / LARGE_BODY_RATE)
        return self._open(body)

    def _tell_ignored(self, wanted: ChatRequest) -> None:
        """没有作用的字段，每种在日志里说一次。"""
        for name in (name for name in wanted.ignored if name not in self._told):
            if len(self._told) < 100:
                self._told.add(name)
                logger.info("ignored=%s", ascii(name)[1:-1][:60])


@contextlib.contextmanager
def _full_queue_is_503() -> Iterator[None]:
    try:
        yield
    except QueueFullError:
        raise busy("排队的人太多，请稍后再试", "queue_full") from None


async def _on_gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_CLOSED)  # 没有人收；日志里是 499


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """没有这个地址，或方法不对。"""
    path = shown(request.scope["path"])
    told = {404: f"没有 {path} 这个地址", 405: f"{path} 不能用 {shown(request.method)}"}
    message = told.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _on_crash(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "服务器出了错，请看它的日志", code="internal_error"))


def build_app(
    service: Service, *, hosts: frozenset[str] | None, api_key: str | None, cors: str | None
) -> App:
    """各个地址，外面是门、CORS 和日志；参数同 Gate。"""
    routes = [
        Route("/", load_page(), methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/v1/models", service.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.show_model, methods=["GET"]),
        Route("/v1/knobs", service.list_knobs, methods=["GET"]),
        Route("/v1/chat/completions", service.complete, methods=["POST"]),
    ]
    handlers = {
        ApiError: _on_api_error,
        ClientDisconnect: _on_gone,
        HTTPException: _on_http_error,
        Exception: _on_crash,
    }
    app: App = Starlette(routes=routes, exception_handlers=handlers)
    app = Gate(app, hosts=hosts, api_key=api_key, cors=cors)
    if cors is not None:
        app = CORSMiddleware(
            app,
            allow_origins=[cors],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # openai 的 JS 客户端带着十来个 x-stainless-*
        )
    return RequestLog(app)
