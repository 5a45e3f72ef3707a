"""故意弄坏：文件里翻转一位、截断、抹成零，进程被信号打断，磁盘写满，文件夹只读，两个进程同时写，捣乱的输入。

用法: python -m tests.faults [--injections 45] [--runs 6] [--only 名字的一部分]
每一次的结局：noticed 一句话说清楚；harmless 结果与没有坏时相同；wrong 悄悄读错；
traceback 冒出异常；hang 不停；lost 原来有的没了。后四种都应当是 0。手动运行，两核约二十分钟。
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from chitchat.chat.loading import load_engine
from chitchat.chat.whole_files.partial_replies import PartialReplies
from chitchat.checkpoint import load_model_tokenizer
from chitchat.cli import quiet_transformers
from chitchat.corpus.reader import read_dialogues
from chitchat.errors import UserError
from chitchat.tokens.token_table import load_token_table
from chitchat.tokens.tokenizer import load_tokenizer, vocab_text
from chitchat.training.processes import Processes
from chitchat.training.state import PREVIOUS_NAME, STATE_NAME, find_state

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("noticed", "harmless", "wrong", "traceback", "hang", "lost")
SECONDS = 60  # 一次运行超过它就算不停
SMALL = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0}
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # linux/prctl.h, linux/capability.h
CPU = torch.device("cpu")


def flip(data: bytearray, rng: random.Random) -> bytearray:
    """翻转一位。"""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    """从某处起没有了。"""
    return data[: rng.randrange(len(data))]


def blank(data: bytearray, rng: random.Random) -> bytearray:
    """某处起的一块（至多 512 字节）成了零。"""
    start = rng.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    return data


DAMAGES = {"翻转一位": flip, "截断": truncate, "一块成零": blank}


class Bench:
    """一个文件夹，里面有一套完好的语料、训练数据、检查点和训练状态。"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = random.Random(0)
        chars = "你好在吗吃了天气真不错我想去公园走晚安谢"
        text = "\n\n".join(
            "\n".join("".join(rng.choices(chars, k=6)) for _ in range(4)) for _ in range(120)
        )
        (folder / "data").mkdir()
        (folder / "data/train.txt").write_text(text + "\n", encoding="utf-8")
        config = json.loads((ROOT / "model/config_small.json").read_text(encoding="utf-8"))
        (folder / "small.json").write_text(json.dumps(config | SMALL))
        for save_path in ("train.pkl", "table"):
            self.check("preprocess", *self.preprocess(save_path))
        self.check("train", *self.train("model"))
        (folder / "in.txt").write_text("你好\n\n在吗\n\n" * 30, encoding="utf-8")

    def preprocess(self, save_path: str) -> list[str]:
        """preprocess.py 的参数。"""
        return ["--vocab_path", str(ROOT / "vocab/vocab.txt"), "--save_path", save_path]

    def train(self, folder: str, *more: str) -> list[str]:
        """train.py 的参数。"""
        return [
            *("--no_cuda", "--vocab_path", str(ROOT / "vocab/vocab.txt"), "--max_len", "64"),
            *("--model_config", "small.json", "--save_model_path", folder, "--epochs", "3"),
            *("--save_steps", "2", "--train_path", "train.pkl", "--optimizer", "adamw", *more),
        ]

    def answer(self, output: str) -> list[str]:
        """interact.py 答整个文件的参数。"""
        return [
            *("--no_cuda", "--model_path", "model/epoch3", "--seed", "1", "--input_path", "in.txt"),
            *("--output_path", output),
        ]

    def start(self, script: str, *arguments: str, limit: int | None = None) -> subprocess.Popen:
        """启动一个脚本；limit 是它能写的最大文件，字节，像磁盘满了一样。

        它不能像 root 那样写只读的文件夹。
        """

        def restrict() -> None:
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [sys.executable, str(ROOT / f"{script}.py"), *arguments, "--log_path", "log"],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=restrict,
        )

    def check(self, script: str, *arguments: str) -> None:
        """应当成功的一次运行。"""
        process = self.start(script, *arguments)
        output = process.communicate(timeout=5 * SECONDS)[0].decode(errors="replace")
        if process.returncode:
            raise AssertionError(f"{script} {arguments}: {output[-2000:]}")


def look(read: Callable[[], object], whole: object) -> str:
    """读一次坏了的文件，结局是什么。"""
    started = time.monotonic()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = read()
    except UserError:
        outcome = "noticed"
    except Exception:  # noqa: BLE001
        outcome = "traceback"
    else:
        outcome = "harmless" if found == whole else "wrong"
    return "hang" if time.monotonic() - started > SECONDS else outcome


def read_weights(folder: Path) -> str:
    """模型的权重和词表，一个指纹。"""
    engine = load_engine(str(folder), precision="fp32", device=CPU)
    text = vocab_text(load_model_tokenizer(str(folder), None))
    cache = engine.new_cache(1, 8)
    logits = engine.logits(engine.hidden(torch.tensor([[101, 2000, 3000, 102]]), cache))
    return f"{hash(text)} {logits.double().sum().item():.9f}"


def damaged_files(bench: Bench, number: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """每种文件、每种坏法，number 次；给出种类和结局。"""
    folder = bench.folder
    identity = torch.load(folder / "model" / STATE_NAME, weights_only=True)["identity"]

    def table(name: str) -> Callable[[], object]:
        return lambda: [row.tolist() for row in load_token_table(folder / name, 13317)]

    def state() -> object:
        found = find_state(folder / "model", identity, Processes())
        return found["progress"], {k: v.tolist() for k, v in found["model"].items()}

    def partial() -> object:
        replies = PartialReplies(folder / "out.part", {"input_path": "x"}, 0)
        replies.close()
        return dict(replies.replies)

    replies = PartialReplies(folder / "out.part", {"input_path": "x"}, 0)
    for i in range(0, 60, 4):
        replies.add([(j, f"回复{j}") for j in range(i, i + 4)])
    replies.close()
    (folder / "model" / PREVIOUS_NAME).unlink(missing_ok=True)  # 只剩一份时，坏了要说
    readers = {
        "train.pkl": table("train.pkl"),
        "train.pkl.json": table("train.pkl"),
        "table/tokens.npy": table("table"),
        "table/offsets.npy": table("table"),
        "table/meta.json": table("table"),
        **{
            f"model/epoch3/{name}": lambda: read_weights(folder / "model/epoch3")
            for name in ("model.safetensors", "config.json", "tokenizer.json", "checksums.json")
        },
        f"model/{STATE_NAME}": state,
        "out.part": partial,
    }
    for name, read in readers.items():
        path, whole = folder / name, read()
        content = path.read_bytes()
        for kind, damage in DAMAGES.items():
            for _ in range(number):
                path.write_bytes(damage(bytearray(content), rng))
                outcome = look(read, whole)
                if name == "out.part" and outcome == "wrong":
                    found = partial()  # 少了几批会重做，多出或改了才是读错
                    outcome = "noticed" if found.items() <= whole.items() else "wrong"
                yield f"{name.split('/')[-1]} {kind}", outcome
            path.write_bytes(content)


def run_and_judge(
    process: subprocess.Popen, is_intact: Callable[[], bool], *, codes: tuple[int, ...]
) -> str:
    """等一个进程结束，看它留下的；codes 是应有的退出码。"""
    try:
        output = process.communicate(timeout=SECONDS)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hang"
    if not is_intact():
        return "lost"
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if process.returncode == 0:
        return "harmless"
    return "noticed" if process.returncode in codes else "wrong"


def is_whole_pickle(path: Path, whole: bytes) -> bool:
    """没有，或与 whole 一样。"""
    return not path.exists() or path.read_bytes() == whole


def signals(bench: Bench, number: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """每个脚本在随机的时刻收到各种信号；留下的文件要么完整要么没有，再运行一次要成功。"""
    folder = bench.folder
    whole = (folder / "train.pkl").read_bytes()
    states = torch.load(folder / "model" / STATE_NAME, weights_only=True)["progress"]
    bench.check("interact", *bench.answer("whole.txt"))
    replies = (folder / "whole.txt").read_bytes()

    def trained() -> bool:
        bench.check("train", *bench.train("again", "--resume"))
        progress = torch.load(folder / "again" / STATE_NAME, weights_only=True)["progress"]
        return progress == states

    def answered() -> bool:
        if not (folder / "again.txt").exists():  # 没有在信号之前做完
            bench.check("interact", *bench.answer("again.txt"))
        return (folder / "again.txt").read_bytes() == replies

    jobs = {
        "preprocess": (
            bench.preprocess("again.pkl"), 2.0, lambda: is_whole_pickle(folder / "again.pkl", whole)
        ),
        "train": (bench.train("again"), 12.0, trained),
        "interact": (bench.answer("again.txt"), 6.0, answered),
    }  # fmt: skip
    for script, (arguments, seconds, is_intact) in jobs.items():
        for name in ("SIGKILL", "SIGTERM", "SIGINT"):
            for _ in range(number):
                for path in ("again", "again.pkl", "again.pkl.json", "again.txt", "again.txt.part"):
                    shutil.rmtree(folder / path, ignore_errors=True)
                    (folder / path).unlink(missing_ok=True)
                process = bench.start(script, *arguments)
                time.sleep(rng.uniform(0.3, seconds))
                process.send_signal(getattr(signal, name))
                codes = (-getattr(signal, name), 130, 143)
                yield f"{script} {name}", run_and_judge(process, is_intact, codes=codes)


def ask(port: int) -> None:
    """向服务器要一句回复；连不上、答到一半断了都不管。"""
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "stream": True})
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        body.encode(),
        {"Content-Type": "application/json"},
    )
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(request, timeout=SECONDS).read()


def servers(bench: Bench, number: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """服务器读模型、等人、正在回答时收到信号；聊天记录里都是完整的行。"""
    folder = bench.folder

    def is_intact() -> bool:
        lines = [line for path in folder.glob("sample/web/*") for line in path.open("rb")]
        starts = (b"user:", b"chatbot:", "聊天记录".encode())
        return all(line.startswith(starts) and line.endswith(b"\n") for line in lines)

    for name in ("SIGKILL", "SIGTERM", "SIGINT"):
        for _ in range(number):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            arguments = ["--no_cuda", "--model_path", "model/epoch3", "--web", "--port", str(port)]
            process = bench.start("interact", *arguments)
            ends = time.monotonic() + rng.uniform(0.3, 8)
            asking = threading.Thread(target=lambda p=port, e=ends: keep_asking(p, e))
            asking.start()
            time.sleep(ends - time.monotonic())
            process.send_signal(getattr(signal, name))
            codes = (-getattr(signal, name), 130)
            yield f"服务器 {name}", run_and_judge(process, is_intact, codes=codes)
            asking.join()


def keep_asking(port: int, ends: float) -> None:
    """到 ends（time.monotonic）为止，四个人不停地问。"""
    while time.monotonic() < ends:
        askers = [threading.Thread(target=ask, args=(port,)) for _ in range(4)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        time.sleep(0.05)


def full_disks(bench: Bench, number: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """写到一半写不下了；原来的还在。"""
    folder = bench.folder
    before = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix
    }
    keep = [p for p in before if p.name in ("train.pkl", "tokens.npy", STATE_NAME)]

    def is_intact() -> bool:
        return all(path.exists() and path.read_bytes() == before[path] for path in keep)

    jobs = {
        "preprocess .pkl": ("preprocess", bench.preprocess("train.pkl"), 12_000),
        "preprocess 文件夹": ("preprocess", bench.preprocess("table"), 5_000),
        "train": ("train", bench.train("model", "--resume", "--epochs", "4"), 500_000),
        "interact": ("interact", bench.answer("full.txt"), 2_000),
    }
    for name, (script, arguments, most) in jobs.items():
        for _ in range(number):
            process = bench.start(script, *arguments, limit=rng.randrange(200, most))
            yield f"磁盘满 {name}", run_and_judge(process, is_intact, codes=(2,))
            (folder / "full.txt").unlink(missing_ok=True)
            (folder / "full.txt.part").unlink(missing_ok=True)


def read_only_folders(bench: Bench) -> Iterator[tuple[str, str]]:
    """要写的文件夹不让写：原来的还在，说一句话；只是原来的文件只读，照样换成新的。"""
    folder = bench.folder
    closed = folder / "closed"
    closed.mkdir()
    shutil.copytree(folder / "model", closed / "model")
    for name in ("train.pkl", "train.pkl.json"):
        shutil.copy(folder / name, closed)
    before = {path: path.read_bytes() for path in closed.rglob("*") if path.is_file()}

    def is_intact() -> bool:
        return {p: p.read_bytes() for p in closed.rglob("*") if p.is_file()} == before

    terminal = ["--no_cuda", "--model_path", "model/epoch3"]
    jobs = {
        "preprocess 新的 .pkl": ("preprocess", bench.preprocess("closed/new.pkl")),
        "preprocess 原有的 .pkl": ("preprocess", bench.preprocess("closed/train.pkl")),
        "preprocess 文件夹": ("preprocess", bench.preprocess("closed/table")),
        "train": ("train", bench.train("closed/new")),
        "train 接着练": ("train", bench.train("closed/model", "--resume", "--epochs", "4")),
        "interact 整个文件": ("interact", bench.answer("closed/out.txt")),
        "interact 终端": ("interact", [*terminal, "--save_samples_path", "closed/sample"]),
        "服务器": ("interact", [*terminal, "--web", "--port", "0",
                               "--save_samples_path", "closed/sample"]),
    }  # fmt: skip
    for path in (*closed.rglob("*"), closed):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for name, (script, arguments) in jobs.items():
        process = bench.start(script, *arguments)
        yield f"只读的文件夹 {name}", run_and_judge(process, is_intact, codes=(2,))
    closed.chmod(0o755)
    bench.check("preprocess", *bench.preprocess("closed/train.pkl"))
    is_whole = (closed / "train.pkl").read_bytes() == (folder / "train.pkl").read_bytes()
    yield "只读的 .pkl", "harmless" if is_whole else "wrong"


def two_at_once(bench: Bench, number: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """两个进程写同一处：结果完整，训练的后一个被拒绝。"""
    folder = bench.folder
    whole = (folder / "train.pkl").read_bytes()
    for script, arguments in {
        "preprocess": bench.preprocess("both.pkl"),
        "train": bench.train("both"),
    }.items():
        for _ in range(number):
            processes = [bench.start(script, *arguments)]
            time.sleep(rng.uniform(0, 1))
            processes.append(bench.start(script, *arguments))

            def is_intact(script: str = script) -> bool:
                if script == "preprocess":
                    return is_whole_pickle(folder / "both.pkl", whole)
                return not any(folder.glob("both/epoch*/*.part"))

            outcomes = [run_and_judge(p, is_intact, codes=(2,)) for p in processes]
            if script == "train" and outcomes.count("harmless") == 2:
                last = torch.load(folder / "both" / STATE_NAME, weights_only=True)["progress"]
                outcomes = ["harmless" if last["epoch"] == 3 else "wrong"]
            yield f"两个 {script}", max(outcomes, key=OUTCOMES.index)
            shutil.rmtree(folder / "both", ignore_errors=True)


def hostile_inputs(bench: Bench) -> Iterator[tuple[str, str]]:
    """捣乱的输入，在另一个进程里读，内存至多 4 GB。"""
    folder = bench.folder
    row = [101, *range(200, 300), 102]
    files: dict[str, bytes] = {
        "deep.json": b"[" * 100_000,
        "deep2.json": b'{"a":' * 100_000,
        "digits.json": b"[[" + b"9" * 5000 + b"]]",
        "line.txt": "好".encode() * 20_000_000,
        "quote.csv": '时间,昵称,内容\n2024-01-01 10:00:00,甲,"没有完\n'.encode() + b"1,2,3\n" * 9,
        "surrogate.json": b'[["\\ud800","a"]]',
        "binary.txt": bytes(range(256)) * 100,
        "utf16.txt": "你好\n好\n".encode("utf-16")[:-1],
        "mixed.txt": "你好\n\n".encode("gbk") * 500 + "你好\n".encode(),
        "zip.zip": b"PK\x03\x04" + b"\0" * 100,
        "escape.csv": "a\x1b[2J,b\u202e\n1,2\n".encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        process = bench.start("preprocess", "--train_path", name, *bench.preprocess("hostile.pkl"))
        yield f"输入 {name}", run_and_judge(process, lambda: True, codes=(2,))
    pickles = {
        "shared.pkl": pickle.dumps([row * 10] * 200_000),
        "huge.pkl": pickle.dumps([[101, 10**30, 102]]),
        "class.pkl": pickle.dumps([Path()]),
        "text.pkl": b"\x80\x04\x95",
    }
    for name, content in pickles.items():
        (folder / name).write_bytes(content)
        yield f"训练数据 {name}", look(lambda n=name: load_token_table(folder / n, 13317), None)
    yield "词表 /dev/zero", look(lambda: load_tokenizer(Path("/dev/zero")), None)
    yield "没有的语料", look(lambda: list(read_dialogues(folder / "nothing.txt")), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--injections", type=int, default=45, help="每种坏文件弄坏几次")
    parser.add_argument("--runs", type=int, default=6, help="每种信号、每种写满的磁盘几次")
    parser.add_argument("--only", default="", help="只做名字里有它的一组")
    args = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    rng = random.Random(0)
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        groups = {
            "files": lambda: damaged_files(bench, args.injections, rng),
            "inputs": lambda: hostile_inputs(bench),
            "signals": lambda: signals(bench, args.runs, rng),
            "server": lambda: servers(bench, args.runs, rng),
            "disks": lambda: full_disks(bench, args.runs, rng),
            "read_only": lambda: read_only_folders(bench),
            "two": lambda: two_at_once(bench, args.runs, rng),
        }
        for name, group in groups.items():
            for kind, outcome in group() if args.only in name else ():
                table.setdefault(kind, Counter())[outcome] += 1
                print(f"{kind}: {outcome}", file=sys.stderr, flush=True)
    print(f"| 种类 | 次数 | {' | '.join(OUTCOMES)} |\n| --- |{' --: |' * (1 + len(OUTCOMES))}")
    total: Counter[str] = Counter()
    for kind, counts in table.items():
        total += counts
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        print(f"| {kind} | {counts.total()} | {cells} |")
    cells = " | ".join(str(total[outcome]) for outcome in OUTCOMES)
    print(f"| 合计（{len(table)} 种） | {total.total()} | {cells} |")


if __name__ == "__main__":
    main()
