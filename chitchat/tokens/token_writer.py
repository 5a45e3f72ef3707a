"""写训练数据：边编码边写，内存里只有当前一批；写成 train.pkl 或可映射进内存的文件夹。"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from chitchat.checksums import describe_files
from chitchat.errors import UserError
from chitchat.files import atomic_directory, atomic_file
from chitchat.tokens.batch_encoder import EncodedBatch

META_NAME = "meta.json"
TOKENS_NAME = "tokens.npy"
OFFSETS_NAME = "offsets.npy"


class TokenWriter(Protocol):
    """接受一批批对话。"""

    def write(self, batch: EncodedBatch) -> None:
        """写下一批对话。"""


class ListWriter:
    """逐批写出 ``list[list[int]]`` 的 pickle（协议 4），与一次 ``pickle.dump`` 读回来相同。"""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        file.write(b"\x80\x04]")  # PROTO 4、EMPTY_LIST

    def write(self, batch: EncodedBatch) -> None:
        """写下一批对话。"""
        self.file.write(pickle_rows(batch))

    def finish(self) -> None:
        """写下结尾。"""
        self.file.write(b".")


def pickle_rows(batch: EncodedBatch) -> bytes:
    """把一批对话（每段至少一个 token）写成 pickle 指令，接到栈顶的列表后面：``( ](…e ](…e … e``。

    整数按大小用 BININT1（K，1 字节）、BININT2（M，2 字节）或 BININT（J，4 字节）。
    整批用 numpy 一次写好，不建立 Python 的列表和整数。

    来源: 各指令见 Python 标准库 pickletools 的说明。
    """
    tokens, lengths = batch
    if not len(lengths):
        return b""
    widths = np.where(tokens < 256, 1, np.where(tokens < 65536, 2, 4))  # (N,)，1、2 或 4 字节
    sizes = 1 + widths
    starts = np.cumsum(lengths) - lengths
    ends = starts + lengths - 1
    sizes[starts] += 2  # 前面的 EMPTY_LIST、MARK
    sizes[ends] += 1  # 后面的 APPENDS
    stops = np.cumsum(sizes)
    opcodes = stops - widths - 1  # 每个整数的指令所在的位置
    opcodes[ends] -= 1
    out = np.empty(int(stops[-1]), dtype=np.uint8)
    out[opcodes] = np.array([0, ord("K"), ord("M"), 0, ord("J")], np.uint8)[widths]
    for byte in range(4):
        has_byte = widths > byte
        out[opcodes[has_byte] + 1 + byte] = (tokens[has_byte] >> (8 * byte)) & 0xFF
    out[opcodes[starts] - 2] = ord("]")
    out[opcodes[starts] - 1] = ord("(")
    out[stops[ends] - 1] = ord("e")
    return b"(" + out.tobytes() + b"e"


class TableWriter:
    """逐批写出 tokens.npy 与 offsets.npy。"""

    def __init__(self, folder: Path, vocab_size: int, stack: contextlib.ExitStack) -> None:
        self.tokens = _ArrayFile(folder / TOKENS_NAME, np.min_scalar_type(vocab_size - 1), stack)
        self.offsets = _ArrayFile(folder / OFFSETS_NAME, np.dtype(np.int64), stack)
        self.offsets.append(np.zeros(1, np.int64))

    def write(self, batch: EncodedBatch) -> None:
        """写下一批对话。"""
        self.offsets.append(self.tokens.length + np.cumsum(batch.lengths))
        self.tokens.append(batch.tokens)

    def finish(self) -> None:
        """补写两个文件头里的长度。"""
        self.tokens.finish()
        self.offsets.finish()


class _ArrayFile:
    """长度事先不知道的一维 .npy；文件头留有余地，写完之后补上长度。"""

    def __init__(self, path: Path, dtype: np.dtype, stack: contextlib.ExitStack) -> None:
        self.dtype = dtype
        self.length = 0
        self.file = stack.enter_context(path.open("wb"))
        self._write_header()
        self.start = self.file.tell()

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.astype(self.dtype, copy=False).data)
        self.length += len(values)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        if self.file.tell() != self.start:
            raise AssertionError("numpy 的文件头没有给长度留出余地")


def meta_path(path: Path) -> Path:
    """训练数据的说明写在哪里：文件夹里的 meta.json，或 .pkl 旁边的 .pkl.json。"""
    return path.with_name(f"{path.name}.json") if path.suffix == ".pkl" else path / META_NAME


@contextlib.contextmanager
def open_writer(path: Path, vocab_size: int, meta: dict) -> Iterator[TokenWriter]:
    """打开训练数据来写；正常结束时整个出现，出错时原有的不变。

    Args:
        path: 以 .pkl 结尾是 pickle，否则是文件夹。
        vocab_size: 词表大小，决定文件夹里用几个字节存一个 id。
        meta: 写进说明的内容；写到一半时还可以往里添。

    Raises:
        UserError: 文件夹里有别的东西，不能整个换掉。
    """
    if path.suffix == ".pkl":
        with atomic_file(path) as partial, partial.open("wb") as file:
            writer = ListWriter(file)
            yield writer
            writer.finish()
            file.flush()
            files = describe_files([partial])
            meta["files"] = {path.name: files[partial.name]}
        with atomic_file(meta_path(path)) as partial:
            partial.write_text(_to_json(meta), encoding="utf-8")
        return
    check_folder(path)
    with atomic_directory(path) as partial:
        with contextlib.ExitStack() as stack:
            writer = TableWriter(partial, vocab_size, stack)
            yield writer
            writer.finish()
        meta["files"] = describe_files([partial / TOKENS_NAME, partial / OFFSETS_NAME])
        (partial / META_NAME).write_text(_to_json(meta), encoding="utf-8")


def check_folder(path: Path) -> None:
    """确认要写的文件夹不存在、是空的，或只有上次的训练数据。"""
    if not path.exists():
        return
    ours = {META_NAME, TOKENS_NAME, OFFSETS_NAME}
    others = [] if not path.is_dir() else [f.name for f in path.iterdir() if f.name not in ours]
    if others or not path.is_dir():
        found = f"里有 {others[0]} 等别的文件" if others else "是一个文件"
        raise UserError(
            f"--save_path {path} {found}，不能整个换成训练数据："
            "请指定一个新的文件夹（如 data/train），或以 .pkl 结尾的文件"
        )


def _to_json(meta: dict) -> str:
    return json.dumps(meta, ensure_ascii=False, indent=2) + "\n"
