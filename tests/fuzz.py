"""模糊测试：把完好的输入随意改动，或凭空造出来，读它的程序只许读懂，或用一句话拒绝。

用法: python -m tests.fuzz [--examples 2000] [--only 名字的一部分] [--atheris 次数]
打印每一处试了多少个输入，read 读懂了，refused 一句话拒绝了，escaped 漏了：异常，或十秒不停，
这时写出缩到最小的输入。--atheris 另用 atheris（pip install atheris）看着走过的代码来改，
每一处再试这么多次。手动运行。
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/corpus"))

from test_layouts import FUZZED, LAYOUT, TEXT, pack  # noqa: E402

from chitchat.architecture import build_model  # noqa: E402
from chitchat.chat.loading import load_engine  # noqa: E402
from chitchat.chat.options import SamplingOptions  # noqa: E402
from chitchat.chat.web.errors import ApiError  # noqa: E402
from chitchat.chat.web.requests import parse_chat_request  # noqa: E402
from chitchat.chat.whole_files.partial_replies import PartialReplies  # noqa: E402
from chitchat.chat_template import wrap_tokenizer  # noqa: E402
from chitchat.checkpoint import load_model_tokenizer, save_checkpoint  # noqa: E402
from chitchat.checksums import CHECKSUMS_NAME, describe_files  # noqa: E402
from chitchat.cli import quiet_transformers  # noqa: E402
from chitchat.corpus.formats.base import ReadOptions  # noqa: E402
from chitchat.corpus.reader import read_source  # noqa: E402
from chitchat.corpus.sources import find_sources  # noqa: E402
from chitchat.errors import UserError  # noqa: E402
from chitchat.tokens.token_table import load_token_table  # noqa: E402
from chitchat.tokens.tokenizer import encode_dialogues, load_tokenizer  # noqa: E402
from chitchat.training.state import DamagedStateError, read_state  # noqa: E402

VOCAB_SIZE = 2000  # 词表的前这么多项，含特殊 token
SECONDS = 10  # 一个输入超过它就算不停
MAX_BYTES = 4 << 30
REFUSALS = (UserError, ApiError, DamagedStateError)
CPU = torch.device("cpu")
# 各种格式里有意思的片段，比随机的字节更容易走到深处。
PIECES = [
    *(b"", b"\0", b"\n", b"\r\n", b'"', b"'", b",", b"\t", b"{", b"}", b"[", b"]", b":", b"-"),
    *(b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u202e", b"\x1b[2J", b"null"),
    *(b"true", b"1e999", b"9" * 40, b"-1", b"0", b"NaN", b"[[" * 40, b'{"a":' * 40, b"2147483648"),
    *("好".encode(), "\u3000".encode(), "😂".encode(), "：".encode(), "好".encode("gbk")),
]


# 只看本项目的代码走到了哪里；要在导入之前说。
ATHERIS_CHILD = """
import sys
import atheris
with atheris.instrument_imports(include=["chitchat"]):
    from tests import fuzz
fuzz.atheris_child(*sys.argv[1:])
"""


@dataclass(frozen=True)
class Target:
    """读一种东西的地方。

    Attributes:
        inputs: 造输入的办法。
        read: 读一个输入；读不懂时抛 REFUSALS 里的一种。
        seeds: 完好的输入；有它的才能交给 atheris。
    """

    inputs: st.SearchStrategy
    read: Callable[[object], object]
    seeds: Sequence[bytes] = ()


def edited(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """完好的输入改动零到三处：删去一段、换成几个字节或一个片段、把一段重复许多次。"""
    edit = st.tuples(
        st.floats(0, 1),
        st.integers(0, 40),
        st.binary(max_size=8) | st.sampled_from(PIECES),
        st.sampled_from([1, 1, 1, 1, 50]),
    )

    def apply(data: bytes, edits: list[tuple[float, int, bytes, int]]) -> bytes:
        for place, length, new, times in edits:
            at = int(place * len(data))
            data = data[:at] + (new or data[at : at + length]) * times + data[at + length :]
        return data

    return st.builds(apply, st.sampled_from(list(seeds)), st.lists(edit, max_size=3))


def from_bytes(seeds: Sequence[bytes], read: Callable[[bytes], object]) -> Target:
    """由完好的字节改动而来；偶尔是凭空的字节。"""
    return Target(edited(seeds) | st.binary(max_size=200), read, seeds)


class Folder:
    """各处共用的文件：一个临时文件夹，里面有词表、模型、训练状态和它们完好的字节。"""

    def __init__(self, path: Path) -> None:
        self.path = path
        vocab = (ROOT / "vocab/vocab.txt").read_text(encoding="utf-8").splitlines()[:VOCAB_SIZE]
        self.tokenizer = load_tokenizer(self.write("vocab.txt", "\n".join(vocab).encode()))
        config = json.loads((ROOT / "model/config_small.json").read_text(encoding="utf-8"))
        config |= {
            "n_layer": 1,
            "n_embd": 8,
            "n_head": 2,
            "n_positions": 32,
            "vocab_size": VOCAB_SIZE,
        }
        (path / "small.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE}))
        model = build_model(path / "small.json", self.tokenizer)
        save_checkpoint(path / "model", model, self.tokenizer)
        (path / "model" / CHECKSUMS_NAME).unlink()  # 否则改动在读之前就看出来了
        state = {"progress": {"epoch": 1}, "model": {"w": torch.ones(2, 3)}, "identity": {"a": 1}}
        torch.save(state | {"updater": [], "random_states": []}, path / "state.pt")
        replies = PartialReplies(path / "out.part", {"input_path": "x"}, 0)
        replies.add([(0, "好"), (1, "在")])
        replies.close()

    def write(self, name: str, data: bytes) -> Path:
        """写一个文件，返回它的路径。"""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def read_corpus(self, name: str, data: bytes) -> None:
        """preprocess.py 读一份语料。"""
        for source in find_sources([self.write(name, data)]):
            for dialogue in read_source(source, ReadOptions()):
                if not all(text and text == text.strip() for text in dialogue.utterances):
                    raise AssertionError(dialogue.utterances)

    def read_table(self, name: str, data: bytes) -> None:
        """train.py 读文件夹里的训练数据，校验和总是对的。"""
        arrays = {"tokens": np.arange(9, dtype=np.uint16), "offsets": np.array([0, 4, 9])}
        folder = self.path / "table"
        folder.mkdir(exist_ok=True)
        for array_name, array in arrays.items():
            np.save(folder / f"{array_name}.npy", array)
        (folder / name).write_bytes(data)
        if name != "meta.json":
            files = describe_files(folder / f"{array_name}.npy" for array_name in arrays)
            (folder / "meta.json").write_text(json.dumps({"vocab_size": 13317, "files": files}))
        for row in load_token_table(folder, 13317):
            row.tolist()

    def read_model(self, name: str, data: bytes) -> None:
        """interact.py 读一个模型文件夹，其中一个文件改动过。"""
        path = self.path / "model" / name
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            load_model_tokenizer(str(self.path / "model"), None)
            load_engine(str(self.path / "model"), precision="fp32", device=CPU)
        finally:
            path.write_bytes(whole)

    def bytes_of(self, name: str) -> bytes:
        """文件里的字节。"""
        return (self.path / name).read_bytes()


def npy(array: np.ndarray) -> bytes:
    """一个 .npy 文件。"""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def xlsx() -> bytes:
    """一个 .xlsx 文件。"""
    from openpyxl import Workbook

    book, out = Workbook(), io.BytesIO()
    for row in (["question", "answer"], ["你好", "你也好"], ["晚安", "好梦"]):
        book.active.append(row)
    book.save(out)
    return out.getvalue()


def chat_requests() -> st.SearchStrategy[bytes]:
    """像样的请求体：字段对，值随意；一半的字段合乎规定。"""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    )
    roles = st.sampled_from(["user", "assistant", "system", "developer"]) | anything
    content = st.text(max_size=9) | st.just([{"type": "text", "text": "你好"}]) | anything
    plain = st.builds(lambda text: {"role": "user", "content": text}, st.text(min_size=1))
    message = plain | plain | st.fixed_dictionaries({"role": roles, "content": content})
    fields = ["n", "stop", "seed", "stream", "stream_options", "temperature", "top_p", "top_k"]
    fields += ["max_tokens", "tools", "logprobs", "response_format", "min_p", "model", "其他"]
    value = st.sampled_from([1, 0, 0.5, True, None, "好", ["好"], {}]) | anything
    return st.builds(
        lambda messages, rest: json.dumps({"messages": messages, **rest}).encode(),
        st.lists(message, min_size=1, max_size=3) | anything,
        st.dictionaries(st.sampled_from(fields), value, max_size=4),
    )


def build_targets(folder: Folder) -> dict[str, Target]:
    """各处的名字和 Target。"""
    return (
        corpus_targets(folder) | data_targets(folder) | model_targets(folder) | chat_targets(folder)
    )


def corpus_targets(folder: Folder) -> dict[str, Target]:
    """preprocess.py 读的。"""

    def named(files: dict[str, bytes]) -> Target:
        inputs = st.sampled_from(sorted(files)).flatmap(
            lambda name: st.tuples(st.just(name), edited([files[name]]))
        )
        return Target(inputs, lambda pair: folder.read_corpus(*pair))

    squeezed = [squeeze(TEXT.encode()) for squeeze in (gzip.compress, lzma.compress)]
    packed = [pack(f"a.{kind}", TEXT.encode()) for kind in ("zip", "tar", "tgz", "tar.bz2")]
    suffixes = st.sampled_from([".txt", ".csv", ".json", ".jsonl", ".tsv", ".yml", ".mht", ".conv"])
    texts = st.binary(max_size=300) | st.text(max_size=200).map(
        lambda text: text.encode("utf-8", "replace")
    )
    return {
        "语料的各种写法": named({name: FUZZED[name] for name in LAYOUT}),
        "聊天记录的各种写法": named({k: v for k, v in FUZZED.items() if k not in LAYOUT}),
        "凭空的语料": Target(
            st.tuples(suffixes, texts), lambda pair: folder.read_corpus(f"a{pair[0]}", pair[1])
        ),
        "压缩包": from_bytes([*packed, *squeezed], lambda data: folder.read_corpus("a.bin", data)),
        "xlsx": from_bytes([xlsx()], lambda data: folder.read_corpus("a.xlsx", data)),
    }


def data_targets(folder: Folder) -> dict[str, Target]:
    """train.py 读的训练数据。"""
    rows = [[101, 872, 102, 13316, 3], [101, 5, 102]]
    parts = {
        "tokens.npy": npy(np.arange(9, dtype=np.uint16)),
        "offsets.npy": npy(np.array([0, 4, 9])),
        "meta.json": b'{"vocab_size": 13317, "files": {"tokens.npy": {"size": 1, "crc32": "0"}}}',
    }
    return {
        "train.pkl": from_bytes(
            [pickle.dumps(rows, protocol=protocol) for protocol in (0, 2, 4)],
            lambda data: load_token_table(folder.write("fuzzed.pkl", data), 13317),
        ),
        **{
            name: from_bytes([seed], lambda data, name=name: folder.read_table(name, data))
            for name, seed in parts.items()
        },
    }


def model_targets(folder: Folder) -> dict[str, Target]:
    """模型文件夹、词表和训练状态。"""
    files = ("config.json", "model.safetensors", "tokenizer.json")
    return {
        "vocab.txt": from_bytes(
            [folder.bytes_of("vocab.txt")],
            lambda data: load_tokenizer(folder.write("fuzzed.txt", data)),
        ),
        **{
            f"模型的 {name}": from_bytes(
                [folder.bytes_of(f"model/{name}")],
                lambda data, name=name: folder.read_model(name, data),
            )
            for name in files
        },
        "training_state.pt": from_bytes(
            [folder.bytes_of("state.pt")], lambda data: read_state(folder.write("fuzzed.pt", data))
        ),
    }


def chat_targets(folder: Folder) -> dict[str, Target]:
    """interact.py 读的：做到一半的回复、聊天模板、服务器收到的请求体。"""

    def request(data: bytes) -> None:
        parse_chat_request(data, SamplingOptions(), model_id="base", max_choices=8)

    def template(utterances: list[str]) -> None:
        messages = [{"role": "user", "content": text} for text in utterances]
        ids = wrapped.apply_chat_template(messages, return_dict=False)
        (encoded,) = encode_dialogues(folder.tokenizer, [utterances])
        cls, sep = (folder.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
        if ids != [cls, *(i for row in encoded for i in (*row, sep))]:
            raise AssertionError(f"{utterances}: {ids}")

    def partial(data: bytes) -> None:
        PartialReplies(folder.write("fuzzed.part", data), {"input_path": "x"}, 0).close()

    utterance = st.text(max_size=20).filter(
        lambda text: folder.tokenizer.encode(text, add_special_tokens=False).ids
    )
    wrapped = wrap_tokenizer(copy.deepcopy(folder.tokenizer), 320)
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "n": 2, "stop": ["。"]})
    return {
        "做到一半的回复": from_bytes([folder.bytes_of("out.part")], partial),
        "聊天模板": Target(st.lists(utterance, min_size=1, max_size=4), template),
        "请求体，改动": from_bytes([body.encode()], request),
        "请求体，凭空": Target(chat_requests(), request),
    }


def prepare() -> None:
    """日志和别的库的警告不打印，一个线程，内存至多再用 MAX_BYTES。"""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    quiet_transformers()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """SECONDS 秒还不停就抛 TimeoutError。"""

    def stop(*_args: object) -> None:
        raise TimeoutError(f"{SECONDS} 秒还不停")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def try_one(target: Target, value: object) -> str:
    """读一个输入：read 读懂了，refused 一句话拒绝了；别的异常照样抛出。"""
    with contextlib.redirect_stderr(io.StringIO()), time_limit():
        try:
            target.read(value)
        except REFUSALS as error:
            if "\n" in str(error):
                raise AssertionError(f"不止一句：{error}") from error
            return "refused"
    return "read"


def run_hypothesis(name: str, target: Target, examples: int) -> Counter[str]:
    """试 examples 个输入；漏了的缩到最小，打印出来。"""
    counts: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(target.inputs)
    def run(value: object) -> None:
        last[0] = value
        counts[try_one(target, value)] += 1

    last: list[object] = [None]
    try:
        run()
    except Exception as error:  # noqa: BLE001
        counts["escaped"] += 1
        print(f"{name}: {type(error).__name__}: {error}\n  {last[0]!r:.600}", file=sys.stderr)
    return counts


def run_atheris(name: str, seeds: Sequence[bytes], runs: int) -> Counter[str]:
    """在另一个进程里用 atheris 试 runs 个输入。"""
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds):
            (Path(corpus) / str(i)).write_bytes(seed)
        command = [sys.executable, "-c", ATHERIS_CHILD, name, corpus, str(runs)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(f"{name}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}", file=sys.stderr)
        return Counter(escaped=1)
    return Counter(json.loads(ended.stdout.splitlines()[-1]))


def atheris_child(name: str, corpus: str, runs: str) -> None:
    """run_atheris 的另一头：试够了就打印数目，结束进程。"""
    import atheris

    prepare()
    counts: Counter[str] = Counter()
    path = tempfile.TemporaryDirectory()
    target = build_targets(Folder(Path(path.name)))[name]

    def one_input(data: bytes) -> None:
        counts[try_one(target, data)] += 1
        if counts.total() >= int(runs):
            path.cleanup()
            print(json.dumps(counts), flush=True)
            os._exit(0)  # libFuzzer 自己结束时不执行 Python 的收尾

    longest = max(map(len, target.seeds)) + 1000
    options = [f"-max_len={longest}", f"-artifact_prefix={corpus}/", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, corpus], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="每一处试几个输入")
    parser.add_argument("--only", default="", help="只试名字里有它的")
    parser.add_argument("--atheris", type=int, default=0, help="每一处再用 atheris 试几次")
    args = parser.parse_args()
    prepare()
    columns = ("read", "refused", "escaped")
    print(f"| 哪里 | 办法 | 输入 | {' | '.join(columns)} |\n| --- | --- | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as path:
        os.chdir(path)
        for name, target in build_targets(Folder(Path(path))).items():
            if args.only not in name:
                continue
            methods = {"hypothesis": lambda n=name, t=target: run_hypothesis(n, t, args.examples)}
            if args.atheris and target.seeds:
                methods["atheris"] = lambda n=name, t=target: run_atheris(n, t.seeds, args.atheris)
            for method, run in methods.items():
                counts = run()
                cells = " | ".join(str(counts[column]) for column in columns)
                print(f"| {name} | {method} | {counts.total()} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
