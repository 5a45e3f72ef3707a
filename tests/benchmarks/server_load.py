"""服务器的负载：1、4、16、64 个人同时聊，每秒多少句，头一个字和整句要等多久。

再来 200 个人，然后看两千句之后的内存。
用法: ``python -m tests.benchmarks.server_load [--model_path model/base] [--peer URL]``。
只在本机来回。--peer 是另一个 OpenAI 格式的服务器（例如 ``transformers serve``），再来一遍。
每句都带种子，与单独问时比对；200 个人里多出来的应得 503。
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
LEVELS = (1, 4, 16, 64)
SAYINGS = ("你好", "今天好累啊", "你在干什么呢", "晚上吃什么好", "周末去哪里玩", "讲个笑话吧")


@dataclass
class Reply:
    """一句回复：状态、文字、头一个字和整句各等了多少秒。"""

    status: int
    text: str
    first: float
    whole: float


def ask(url: str, seed: int, model: str) -> Reply:
    """问一句，边收边看时间；忙时（503）不再试。"""
    parts = urlsplit(url)
    saying = SAYINGS[seed % len(SAYINGS)]
    messages = [{"role": "user", "content": saying}]
    fields = {"model": model, "messages": messages, "seed": seed, "stream": True}
    start = time.perf_counter()
    first, pieces = None, []
    with closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=900)) as connection:
        body = json.dumps({**fields, "max_tokens": 25}).encode()
        path, headers = "/v1/chat/completions", {"Content-Type": "application/json"}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices")
                piece = choices[0]["delta"].get("content") if choices else None
                if piece:
                    first = first or time.perf_counter() - start
                    pieces.append(piece)
    whole = time.perf_counter() - start
    return Reply(response.status, "".join(pieces), first or whole, whole)


def visit(
    url: str, model: str, num_visitors: int, num_each: int
) -> tuple[list[list[Reply]], float]:
    """各人一句接一句地问；返回每人的回复和一共的秒数。"""
    barrier = threading.Barrier(num_visitors + 1)

    def talk(visitor: int) -> list[Reply]:
        barrier.wait()
        return [ask(url, visitor * num_each + i, model) for i in range(num_each)]

    with ThreadPoolExecutor(num_visitors) as pool:
        waiting = [pool.submit(talk, visitor) for visitor in range(num_visitors)]
        barrier.wait()
        start = time.perf_counter()
        replies = [future.result() for future in waiting]
        return replies, time.perf_counter() - start


def percentile(values: list[float], fraction: float) -> float:
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]


def measure(name: str, url: str, model: str, num_replies: int) -> None:
    """打印每一级的一行。"""
    for num_visitors in LEVELS:
        num_each = max(1, num_replies // num_visitors)
        by_visitor, seconds = visit(url, model, num_visitors, num_each)
        replies = [reply for own in by_visitor for reply in own if reply.status == 200]
        num_refused = num_visitors * num_each - len(replies)
        cells = [name, f"{num_visitors}", f"{len(replies) / seconds:.1f}"]
        for values in ([r.first for r in replies], [r.whole for r in replies]):
            cells += [f"{statistics.median(values):.3f}", f"{percentile(values, 0.95):.3f}"]
        print("| " + " | ".join([*cells, str(num_refused)]) + " |", flush=True)


def resident_mb(pid: int) -> float:
    """进程占的内存；不是 Linux 时是 NaN。"""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+)", path.read_text()) if path.exists() else None
    return int(found.group(1)) / 1024 if found else float("nan")


@contextmanager
def own_server(model_path: str) -> Iterator[tuple[str, int]]:
    """我们的服务器，端口随便。"""
    command = [sys.executable, str(ROOT / "interact.py"), "--no_cuda", "--web", "--port", "0"]
    options = ["--model_path", model_path, "--no_chat_log"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r"http://\S+?:\d+", process.stdout.readline())
            yield found.group(), process.pid
        finally:
            process.terminate()
            print(f"exit code {process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default="model/base")
    parser.add_argument("--peer", help="另一个服务器的地址，用同一个模型")
    parser.add_argument("--peer_replies", type=int, default=32, help="另一个服务器每一级几句")
    parser.add_argument("--num_replies", type=int, default=128, help="每一级一共几句")
    parser.add_argument("--num_long", type=int, default=2000, help="看内存时一共几句")
    args = parser.parse_args()
    print("| 服务器 | 人数 | 句/秒 | 首字中位 s | 首字 95% s | 整句中位 s | 整句 95% s | 503 |")
    print("| --- " + "| --: " * 7 + "|")
    own_name = Path(args.model_path).resolve().name
    with own_server(args.model_path) as (url, pid):
        measure("本项目", url, own_name, args.num_replies)
        crowd, _ = visit(url, own_name, 200, 1)
        refused = [own[0].status for own in crowd].count(503)
        wrong = sum(
            own[0].status == 200 and own[0].text != ask(url, seed, own_name).text
            for seed, own in enumerate(crowd)
        )
        print(f"200 个人: {200 - refused} 句答了，{refused} 句 503，{wrong} 句与单独问时不同")
        before = resident_mb(pid)
        visit(url, own_name, 16, args.num_long // 16)
        print(f"内存 {before:.0f} MB，再答 {args.num_long} 句之后 {resident_mb(pid):.0f} MB")
    if args.peer:
        measure(args.peer, args.peer, args.model_path, args.peer_replies)


if __name__ == "__main__":
    main()
