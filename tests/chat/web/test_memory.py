"""答过两千个请求，什么也不留下：完整的、流式的、写错的、半路走开的。"""

from __future__ import annotations

import contextlib
import gc
import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from serving import PATH, Server, wait_for
from starlette.requests import Request

from chitchat.chat.generation import Row
from chitchat.chat.web.answer import Answer
from chitchat.chat.web.choices import Choice
from chitchat.chat.web.connections import Connection
from chitchat.chat.web.scheduler import Ticket

pytest_plugins = ["web_server"]

KINDS = (Answer, Choice, Connection, Request, Row, Ticket)
JSON = {"Content-Type": "application/json"}


def ask_many(server: Server, number: int) -> None:
    """每十个请求换一个连接；其中一个问了就走，一个写错了，四个流式。"""
    for start in range(0, number, 10):
        with contextlib.closing(server.connect()) as connection:
            for i in range(start, start + 9):
                text = "你好" if i % 10 else ""
                fields = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
                body = json.dumps({**fields, "stream": i % 10 > 4}).encode()
                connection.request("POST", PATH, body, JSON)
                response = connection.getresponse()
                assert response.status == (200 if text else 400)
                response.read()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    server.wait_until_idle()


def num_left() -> int:
    gc.collect()
    return sum(type(thing) in KINDS for thing in gc.get_objects())


def resident_bytes() -> int:
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


def test_two_thousand_requests_leave_nothing_behind(server):
    ask_many(server, 200)
    before = resident_bytes()
    ask_many(server, 2000)
    assert resident_bytes() - before < 4_000_000
    wait_for(lambda: num_left() == 0, seconds=10)
