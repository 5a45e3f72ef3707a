"""网页和接口的测试共用的：在一个线程里开真的服务器，用标准库的 http.client 去问。"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from chitchat.chat.options import SamplingOptions
from chitchat.chat.web.api import Service

OPTIONS = SamplingOptions(max_len=20, max_history_len=5)
PATH = "/v1/chat/completions"


@dataclass
class Reply:
    """一个响应。"""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    @property
    def events(self) -> list:
        """SSE 的各条，[DONE] 原样。"""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == ""
        assert all(part.startswith("data: ") for part in parts)
        texts = [part.removeprefix("data: ") for part in parts]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]


class Server:
    """正在运行的服务器。"""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())

    def post(self, fields: object, **headers: str) -> Reply:
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        return self.ask("POST", PATH, body, **{"Content_Type": "application/json", **headers})

    def chat(self, text: str, **fields: object) -> Reply:
        return self.post({"messages": [{"role": "user", "content": text}], **fields})

    def wait_until_idle(self) -> None:
        scheduler = self.service.scheduler
        wait_for(lambda: scheduler.num_running + scheduler.num_waiting == 0)


def wait_for(is_true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
