"""网页和接口的测试共用的 fixture：在一个线程里开真的服务器。"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import OPTIONS, Server

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import Engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.web.api import Service, build_app
from chitchat.chat.web.chat_log import ChatLog
from chitchat.chat.web.scheduler import Scheduler
from chitchat.chat.web.server import allowed_hosts, build_server, open_socket


@pytest.fixture
def make_bot(make_model, tokenizer):
    """随机初始化的模型：不同的种子几乎总是不同的话。"""

    def make(num_candidates: int = 1) -> Chatbot:
        model = make_model(n_embd=32, n_head=4, initializer_range=0.3).eval()
        engine = Engine(model.config.to_dict(), model.state_dict(), precision="int8")
        return Chatbot(engine, tokenizer, num_candidates=num_candidates)

    return make


@pytest.fixture
def start_server(make_bot, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """开一个服务器；结束时停下。"""
    stops = []

    def start(
        bot: Chatbot | None = None,
        *,
        options: SamplingOptions = OPTIONS,
        api_key: str | None = None,
        cors: str | None = None,
        **limits: int,
    ) -> Server:
        bot = bot or make_bot()
        service = Service(
            bot,
            Scheduler(bot, **limits),
            options,
            model_id="parrot",
            rng=random.Random(0),
            chat_log=ChatLog(tmp_path / "web"),
        )
        listener = open_socket("127.0.0.1", 0)
        app = build_app(service, hosts=allowed_hosts("127.0.0.1"), api_key=api_key, cors=cors)
        uvicorn_server = build_server(app)
        service.scheduler.start()
        thread = threading.Thread(target=lambda: uvicorn_server.run(sockets=[listener]))
        thread.start()

        def stop() -> None:
            uvicorn_server.should_exit = True
            thread.join(timeout=20)
            service.scheduler.close()

        stops.append(stop)
        return Server(service, listener.getsockname()[1])

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def server(start_server) -> Server:
    return start_server()
