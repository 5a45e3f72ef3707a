"""真的进程：占住端口、信号、kill -9、启动时就看得出的错。"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from conftest import ROOT

import interact
from chitchat.chat.web.server import Access, allowed_hosts, open_socket
from chitchat.checkpoint import save_checkpoint
from chitchat.cli import run_cli


def few_files() -> None:
    """系统给的文件描述符很少时，连接的上限也小，容易满。"""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))


FEW_FILES = {"preexec_fn": few_files}
LONG = {"temperature": 9, "top_k": 0, "max_tokens": 900, "stream": True}


@pytest.fixture
def model_dir(tmp_path, make_model, tokenizer) -> Path:
    """慢得来得及打断：一千个位置，随机的话。"""
    model = make_model(n_embd=256, n_layer=8, n_head=4, n_positions=1024)
    save_checkpoint(tmp_path / "m", model, tokenizer)
    return tmp_path / "m"


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(model_dir: Path, *options: str) -> list[str]:
    settings = ["--web", "--port", "0", "--max_len", "900", "--seed", "1", "--model_path"]
    script = [sys.executable, str(ROOT / "interact.py"), "--no_cuda"]
    return [*script, *settings, str(model_dir), *options]


@pytest.fixture
def start(model_dir):
    """开一个服务器进程；结束时杀掉。"""
    processes = []

    def run(*options: str, **settings: object) -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            command(model_dir, *options), **PIPES, env=ENVIRONMENT, **settings
        )
        processes.append(process)
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, process.communicate()[1]
        return process, int(found.group(1))

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def ask(port: int, **fields: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], **fields})
    connection.request(
        "POST", "/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    return connection.getresponse()


def test_signals_a_second_server_and_kill(start, model_dir, capsys):
    process, port = start()
    assert ask(port, max_tokens=5).status == 200
    finished = [path.read_text(encoding="utf-8") for path in Path("sample/web").iterdir()]
    assert re.fullmatch(r"聊天记录.*:\nuser:你好\nchatbot:.*\n", finished[0])

    with pytest.raises(SystemExit) as stop:  # 同一个端口
        run_cli(
            lambda: interact.main(
                ["--no_cuda", "--model_path", str(model_dir), "--web", "--port", str(port)]
            )
        )
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert str(port) in err
    assert "--port" in err

    response = ask(port, **LONG)  # 正在说
    response.read(2000)
    process.send_signal(signal.SIGTERM)
    whole = response.read()
    assert whole.endswith(b"data: [DONE]\n\n")
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == ""
    assert Path(next(Path("sample/web").iterdir())).read_text().startswith(finished[0])

    process, port = start()  # 说到一半被杀
    before = next(Path("sample/web").iterdir()).read_text()
    assert ask(port, max_tokens=5).read()
    response = ask(port, **LONG)
    response.read(2000)
    process.kill()
    after = next(Path("sample/web").iterdir()).read_text()
    assert re.fullmatch(r"聊天记录.*:\nuser:你好\nchatbot:.*\n", after.removeprefix(before))


def test_ctrl_c_ends_with_0_and_without_a_log_nothing_is_written(start):
    process, port = start("--no_chat_log")
    assert ask(port, max_tokens=5).status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == ""
    assert not Path("sample").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_read_ends_with_0(number, model_dir):
    """在后台导入 torch 时。"""
    _, *arguments = command(model_dir)
    traced = [sys.executable, "-X", "importtime", *arguments]
    with subprocess.Popen(traced, **PIPES, env=ENVIRONMENT) as process:
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == "torch.functional":
                process.send_signal(number)
                break
        rest = process.stderr.read()
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, said) == (0, [])


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
def test_a_signal_as_soon_as_the_address_is_printed_ends_with_0(start):
    process, _ = start()
    process.send_signal(signal.SIGTERM)
    assert (process.wait(timeout=20), process.stderr.read()) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="limits the number of files")
def test_a_crowd_of_idle_connections_and_half_a_request_at_the_end(start):
    """文件描述符只有 200 个，来了 400 个不说话的；停下时不等没有说完的。"""
    process, port = start(**FEW_FILES)
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", port)
        for _ in range(400):
            stack.enter_context(socket.create_connection(address, timeout=10))
        assert ask(port, max_tokens=5).status == 200
        half = stack.enter_context(socket.create_connection(address, timeout=10))
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        half.sendall(b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        garbage = stack.enter_context(socket.create_connection(address, timeout=10))
        garbage.sendall(b"\x16\x03\x01\r\n\r\n")
        response = ask(port, **LONG)
        response.read(2000)
        process.send_signal(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(timeout=5) == 0
    assert process.stderr.read() == ""
    log = Path("data/interact.log").read_text(encoding="utf-8")
    assert "Invalid HTTP request received" in log
    assert "status=499" in log
    assert "Traceback" not in log
    assert len(log) < 10_000


@pytest.mark.skipif(os.name == "nt", reason="limits the number of files")
def test_nobody_is_refused_while_idle_connections_make_room(start):
    """一下子来了许多请求：给一个腾出来的位子还没有空下来，不能因此不收另一个。"""
    process, port = start(**FEW_FILES)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        assert ask(port, max_tokens=5).status == 200
        process.send_signal(signal.SIGSTOP)  # 停一下，让它们同时到
        body = b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        newcomers = []
        for _ in range(40):
            newcomer = socket.create_connection(("127.0.0.1", port), timeout=60)
            newcomers.append(stack.enter_context(newcomer))
            newcomer.sendall(head + body)
        process.send_signal(signal.SIGCONT)
        assert [n.recv(12) for n in newcomers] == [b"HTTP/1.1 200"] * len(newcomers)


def no_starlette(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--host", "0.0.0.0"], ["0.0.0.0", "--api_key"]),
        (["--host", "::"], ["--api_key"]),
        (["--host", "no.such.host.invalid", "--api_key", "k"], ["no.such.host.invalid", "--host"]),
        (["--host", "192.0.2.1", "--api_key", "k"], ["192.0.2.1", "--port"]),
        (["--host", "127.evil.invalid"], ["127.evil.invalid", "--api_key"]),
        (["--api_key", ""], ["--api_key"]),
        (["--api_key", "钥匙"], ["--api_key", "ASCII"]),
        (["--cors", "localhost:3000"], ["--cors", "http://"]),
        (["--cors", "http://a/b"], ["--cors", "http://"]),
        (["--port", "65536"], ["--port", "65535"]),
        (["--num_candidates", "33"], ["--num_candidates", "32"]),
        (["--input_path", "a.txt", "--output_path", "b.txt"], ["--web", "--input_path"]),
        (no_starlette, ["pip install starlette uvicorn"]),
    ],
)
def test_wrong_use_is_refused_with_a_sentence(options, named, model_dir, capsys, monkeypatch):
    Path("a.txt").write_text("你好\n", encoding="utf-8")
    if callable(options):
        options(monkeypatch)
        options = []
    command = ["--no_cuda", "--model_path", str(model_dir), "--web", "--max_len", "9", *options]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: interact.main(command))
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    for name in named:
        assert name in err


@pytest.mark.parametrize("flag", [["--api_key", "k"], ["--cors", "*"]])
def test_flags_of_the_server_need_web(flag, model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: interact.main(["--model_path", str(model_dir), "--max_len", "9", *flag]))
    assert stop.value.code == 2
    assert "--web" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "127.1"])
def test_names_of_this_machine_need_no_key(host):
    Access().check(host)
    assert host.lower() in allowed_hosts(host)


def test_the_port_takes_connections_as_soon_as_it_is_held():
    """读模型时来的连接等着，不被拒绝。"""
    with (
        open_socket("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname(), timeout=5) as client,
    ):
        connection, address = listener.accept()
        connection.close()
        assert address == client.getsockname()
