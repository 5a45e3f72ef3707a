"""语料文件：找出要读的文件，解压，认出编码，逐行给出文字。"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import importlib
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, TextIO

from chitchat.errors import UserError

TEXT_SUFFIXES = (".txt", ".tsv", ".json", ".jsonl", ".conv", ".csv")
COMPRESSED_SUFFIXES = (".gz", ".zip", ".zst")
SAMPLE_BYTES = 1 << 14  # 认编码、认格式时看多少
_MARK = "\udc80"  # 合法的文字里不会有单独的代理码


@dataclass(frozen=True)
class Source:
    """一个要读的文件，或压缩包里的一个文件。

    Attributes:
        path: 磁盘上的文件。
        name: 给用户看的名字；在压缩包里时是 ``包:文件``。
        suffix: 去掉压缩后缀之后的后缀，小写。
        encoding: Python 的编码名。
        open_bytes: 从头打开，给出解压后的字节；参数是已打开的 ``path``。
    """

    path: Path
    name: str
    suffix: str
    encoding: str
    open_bytes: Callable[[BinaryIO], BinaryIO]

    @contextlib.contextmanager
    def open(self, report: Callable[[int], None] = lambda position: None) -> Iterator[TextIO]:
        r"""以文字打开；只有 \n、\r、\r\n 是换行，U+0085、U+2028 等是普通字符，BOM 被去掉。

        Args:
            report: 每读一块就以磁盘文件已读的字节数调用一次。

        Raises:
            UserError: 读到不合编码的字节（指出文件和行号），或压缩包已损坏。
        """
        try:
            with self.path.open("rb") as raw:
                stream = _Reporting(self.open_bytes(raw), lambda: report(raw.tell()))
                with io.TextIOWrapper(io.BufferedReader(stream), self.encoding) as text:
                    yield text
        except UnicodeDecodeError as error:
            raise UserError(self._describe_bad_byte()) from error
        except (EOFError, zipfile.BadZipFile, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self.name} 没有压缩完整（{error}）：请重新下载或解压后再试"
            ) from error

    def _describe_bad_byte(self) -> str:
        """找出第一处不合编码的字节，写成给用户的一句话。"""
        bad_bytes: list[int] = []

        def mark(error: UnicodeDecodeError) -> tuple[str, int]:
            bad_bytes.append(error.object[error.start])
            return _MARK, error.end

        codecs.register_error("chitchat.mark", mark)
        with self.path.open("rb") as raw:
            text = io.TextIOWrapper(self.open_bytes(raw), self.encoding, errors="chitchat.mark")
            number = next(n for n, line in enumerate(text, 1) if _MARK in line)
        label = self.encoding.removesuffix("-sig").upper()
        return (
            f"{self.name} 第 {number} 行不是 {label}：有字节 0x{bad_bytes[0]:02X}；"
            "请在编辑器里另存为 UTF-8，或用 --encoding 指定真正的编码（如 gb18030）"
        )


class _Reporting(io.RawIOBase):
    """每读一块就汇报一次的字节流。"""

    def __init__(self, stream: BinaryIO, report: Callable[[], None]) -> None:
        self.stream = stream
        self.report = report

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        chunk = self.stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self.report()
        return len(chunk)


def find_sources(paths: Sequence[Path], encoding: str = "auto") -> list[Source]:
    """把文件、文件夹、通配符变成要读的文件，按名字排列。

    Args:
        paths: 文件；文件夹（取其中所有认得的文件）；或带 ``*``、``?`` 的写法。
        encoding: ``auto`` 时逐个认出；否则是 Python 的编码名。

    Raises:
        UserError: 一个也没找到，编码名不对，或缺少解压所需的包。
    """
    if encoding != "auto":
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise UserError(
                f"--encoding {encoding} 不是编码的名字；可用 utf-8、utf-16、gb18030、big5 等"
            ) from error
    files = [file for path in paths for file in _expand(path)]
    return [source for file in files for source in _open_container(file, encoding)]


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.suffix.lower() in (*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES)
        ]
        suffixes = "、".join((*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES))
        problem = f"文件夹 {path} 里没有语料（{suffixes}）"
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        found = [file for file in found if file.is_file()]
        problem = f"找不到语料 {path}"
    if not found:
        raise UserError(
            f"{problem}：请用 --train_path 指定一个或多个文件、文件夹或通配符，"
            "最简单的是一行一句、空行分隔对话的文本文件"
        )
    return found


def _open_container(path: Path, encoding: str) -> Iterator[Source]:
    """一个文件里的各个语料：压缩包里可以有好几个，其余恰好一个。"""
    suffix = path.suffix.lower()
    if suffix == ".zip":
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} 不是完整的 zip 文件：请重新下载或解压后再试")
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith(TEXT_SUFFIXES)]
        if not names:
            raise UserError(f"{path} 里没有语料：应有 {'、'.join(TEXT_SUFFIXES)} 文件")
        openers = [(n, lambda raw, n=n: zipfile.ZipFile(raw).open(n)) for n in names]  # noqa: SIM115
        parts = [(f"{path}:{n}", PurePath(n).suffix, opener) for n, opener in openers]
    elif suffix == ".gz":
        parts = [(str(path), Path(path.stem).suffix, gzip.open)]
    elif suffix == ".zst":
        parts = [(str(path), Path(path.stem).suffix, _find_zstd(path))]
    else:
        parts = [(str(path), suffix, lambda raw: raw)]
    for name, inner_suffix, opener in parts:
        chosen = encoding
        if encoding == "auto":
            with path.open("rb") as raw:
                try:
                    chosen = detect_encoding(opener(raw).read(SAMPLE_BYTES))
                except (EOFError, OSError, zipfile.BadZipFile) as error:
                    raise UserError(f"{name} 读不出来（{error}）：请重新下载或解压") from error
        elif codecs.lookup(encoding).name == "utf-8":
            chosen = "utf-8-sig"
        yield Source(path, name, inner_suffix.lower(), chosen, opener)


def _find_zstd(path: Path) -> Callable[[BinaryIO], BinaryIO]:
    """标准库（Python 3.14 起）或已安装的包里，解压 .zst 的函数。"""
    for module, function in (
        ("compression.zstd", "open"),
        ("backports.zstd", "open"),
        ("zstandard", "open"),
    ):
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(module), function)
    raise UserError(f"读 {path} 需要解压 zst 的包：请 pip install zstandard，或先自行解压")


def detect_encoding(sample: bytes) -> str:
    """由开头的若干字节认出编码：UTF-8、UTF-16 或 GB 18030。

    夹着少数坏字节的 UTF-8 仍算 UTF-8，读到那里再指出行号，免得整个文件变成乱码。
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in sample:  # 没有 BOM 的 UTF-16：ASCII 字符的高字节是 0
        return "utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    num_bad = text.count("\ufffd")
    num_good = sum(char > "\x7f" for char in text) - num_bad
    if num_bad <= num_good:
        return "utf-8-sig"
    try:
        codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return "utf-8-sig"
    return "gb18030"
