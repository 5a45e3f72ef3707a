"""语料文件：找出要读的文件，认出编码，逐行给出文字。"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import glob
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from chitchat.corpus.containers import (
    PACKED_SUFFIXES,
    TEXT_SUFFIXES,
    explaining_damage,
    open_container,
)
from chitchat.corpus.encodings import detect_encoding, find_mixed_line
from chitchat.corpus.generated import chunk_paths
from chitchat.errors import UserError
from chitchat.files import naming_file

MAX_LINE_BYTES = 16 << 20  # 读文字时一行最长多少字节
SAMPLE_BYTES = 1 << 14  # 认编码时看多少
_MARK = "\udc80"  # 合法的文字里不会有单独的代理码
_SPOOLED: set[Path] = set()  # 标准输入存成的临时文件
_LABELS = {"big5hkscs": "BIG5", "cp932": "SHIFT-JIS"}


def encoding_label(name: str) -> str:
    """Python 的编码名 → 给人看的名字。"""
    return _LABELS.get(name, name).removesuffix("-sig").upper()


@dataclass(frozen=True)
class Source:
    """一个要读的文件，或压缩包里的一个文件。

    Attributes:
        path: 磁盘上的文件。
        name: 给用户看的名字；在压缩包里时是 ``包:文件``。
        suffix: 去掉压缩后缀之后的后缀，小写。
        encoding: Python 的编码名。
        open_bytes: 从头打开，给出解压后的字节；参数是已打开的 ``path``。
        is_listed: 用户指名的；在文件夹里找到的不是，其中可以有与对话无关的文件。
    """

    path: Path
    name: str
    suffix: str
    encoding: str
    open_bytes: Callable[[BinaryIO], BinaryIO]
    is_listed: bool = True

    @contextlib.contextmanager
    def open(
        self,
        report: Callable[[int], None] = lambda position: None,
        *,
        has_long_lines: bool = False,
    ) -> Iterator[TextIO]:
        r"""以文字打开；只有 \n、\r、\r\n 是换行，U+0085、U+2028 等是普通字符，BOM 被去掉。

        Args:
            report: 每读一块就以磁盘文件已读的字节数调用一次。
            has_long_lines: 像 JSON，一行可以任意长；否则不许长过 MAX_LINE_BYTES，那会耗尽内存。

        Raises:
            UserError: 读到不合编码的字节（指出文件和行号），一行太长，或压缩包已损坏。
        """
        try:
            with explaining_damage(self.name), self.path.open("rb") as raw:
                limit = None if has_long_lines else MAX_LINE_BYTES
                stream = _Reporting(self.open_bytes(raw), lambda: report(raw.tell()), limit)
                with io.TextIOWrapper(io.BufferedReader(stream), self.encoding) as text:
                    yield text
        except UnicodeDecodeError as error:
            raise UserError(self._describe_bad_byte()) from error
        except UnicodeError as error:  # 没有 BOM 的 UTF-16、UTF-32
            raise UserError(
                f"{self.name} 不是 {self.encoding.upper()}（{error}）："
                "请去掉 --encoding，或改成真正的编码"
            ) from error

    def _describe_bad_byte(self) -> str:
        """找出第一处不合编码的字节，写成给用户的一句话。"""
        bad_bytes: list[int] = []

        def mark(error: UnicodeDecodeError) -> tuple[str, int]:
            bad_bytes.append(error.object[error.start])
            return _MARK, error.end

        codecs.register_error("chitchat.mark", mark)
        with explaining_damage(self.name), self.path.open("rb") as raw:
            stream = io.BufferedReader(
                _Reporting(self.open_bytes(raw), lambda: None, MAX_LINE_BYTES)
            )
            text = io.TextIOWrapper(stream, self.encoding, errors="chitchat.mark")
            number = next(n for n, line in enumerate(text, 1) if _MARK in line)
        return (
            f"{self.name} 第 {number} 行不是 {encoding_label(self.encoding)}："
            f"有字节 0x{bad_bytes[0]:02X}；整个文件是别的编码就用 --encoding 指定"
            "（如 gb18030、big5），只有几行不是，是两种编码混在了一起，请分开存成 UTF-8"
        )


class _Reporting(io.RawIOBase):
    """每读一块就汇报一次的字节流；一行超过 max_line 个字节就不再读，None 表示不限。"""

    def __init__(
        self, stream: BinaryIO, report: Callable[[], None], max_line: int | None = None
    ) -> None:
        self.stream = stream
        self.report = report
        self.max_line = max_line
        self.line_bytes = 0  # 最后一个换行之后有多少字节

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        chunk = self.stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        if self.max_line is not None:
            end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r"))
            self.line_bytes = len(chunk) - end - 1 + (self.line_bytes if end < 0 else 0)
            if self.line_bytes > self.max_line:
                raise UserError(
                    f"有一行超过 {self.max_line >> 20} MB，不像一句话："
                    "请检查文件，或改成一行一句、空行分隔的文本"
                )
        self.report()
        return len(chunk)


def find_sources(paths: Sequence[Path], encoding: str = "auto") -> list[Source]:
    """把文件、文件夹、通配符、标准输入变成要读的文件，按名字排列。

    Args:
        paths: 文件；文件夹（取其中所有认得的文件）；带 ``*``、``?`` 的写法；``-`` 是标准输入。
        encoding: ``auto`` 时逐个认出；否则是 Python 的编码名。

    Raises:
        UserError: 一个也没找到，编码名不对，不是文字，或缺少解压所需的包。
    """
    if encoding != "auto":
        try:
            is_text = codecs.lookup(encoding)._is_text_encoding
        except LookupError:
            is_text = False
        if not is_text:
            raise UserError(
                f"--encoding {encoding} 不是文字编码的名字；可用 utf-8、utf-16、gb18030、big5 等"
            )
    files = [(file, not path.is_dir()) for path in paths for file in _expand(path)]
    return [source for file, listed in files for source in _open(file, encoding, listed)]


def _open(path: Path, encoding: str, is_listed: bool) -> Iterator[Source]:
    for part in open_container(path):
        if path in _SPOOLED:
            part = part._replace(name=part.name.replace(str(path), "标准输入"))
        chosen = encoding
        if encoding == "auto":
            chosen = _detect(path, part.name, part.open_bytes)
        elif codecs.lookup(encoding).name == "utf-8":
            chosen = "utf-8-sig"
        yield Source(path, part.name, part.suffix, chosen, part.open_bytes, is_listed)


def _detect(path: Path, name: str, open_bytes: Callable[[BinaryIO], BinaryIO]) -> str:
    """认出编码；旧编码要看完全文，里面夹着 UTF-8 的就不知道该信哪一种。"""
    with explaining_damage(name):
        with path.open("rb") as raw:
            found = detect_encoding(open_bytes(raw).read(SAMPLE_BYTES))
        if not found.startswith("utf"):
            with path.open("rb") as raw:
                stream = _Reporting(open_bytes(raw), lambda: None, MAX_LINE_BYTES)
                number = find_mixed_line(io.BufferedReader(stream))
            if number:
                raise UserError(
                    f"{name} 里两种编码混在一起：大部分像 {encoding_label(found)}，"
                    f"第 {number} 行却是 UTF-8；请分开存成 UTF-8，或用 --encoding 指定其中一种"
                )
    return found


def _expand(path: Path) -> list[Path]:
    if str(path) == "-":
        return [_spool_stdin()]
    if path.is_file():
        return [path]
    if path.is_dir():
        found = list(_walk(path))
        problem = f"文件夹 {path} 里没有语料（{'、'.join((*TEXT_SUFFIXES, *PACKED_SUFFIXES))}）"
    else:
        names = glob.glob(_escape_folders(path), recursive=True)  # noqa: PTH207
        found = [file for file in map(Path, sorted(names)) if file.is_file()]
        problem = f"找不到语料 {path}"
    if not found:
        raise UserError(
            f"{problem}：请用 --train_path 指定一个或多个文件、文件夹或通配符，"
            "最简单的是一行一句、空行分隔对话的文本文件"
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """文件夹里认得的文件，隐藏的不要；分块的导出只给出它的清单。"""
    parts: set[Path] = set()
    for file in sorted(folder.rglob("*"), key=lambda file: (file.name != "manifest.json", file)):
        names = file.relative_to(folder).parts
        if not file.is_file() or any(name.startswith(".") for name in names) or file in parts:
            continue
        if file.name == "manifest.json" and (chunks := chunk_paths(file)):
            parts.update(chunks, [file.parent / "avatars.json"])
        is_about = file.stem.lower() in ("readme", "license", "说明", "使用说明")
        if file.suffix.lower() in (*TEXT_SUFFIXES, *PACKED_SUFFIXES) and not is_about:
            yield file


def _escape_folders(path: Path) -> str:
    """真有的文件夹名字里的方括号不是通配符。"""
    folder = Path(path.anchor)
    parts = list(path.parts[1:] if path.anchor else path.parts)
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    return str(Path(glob.escape(str(folder)), *parts))


def _spool_stdin() -> Path:
    """把标准输入存成临时文件：认编码和格式要从头读好几遍。"""
    folder = tempfile.TemporaryDirectory(prefix="chitchat-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "stdin"
    _SPOOLED.add(path)
    with naming_file(path), path.open("wb") as file:
        file.writelines(_stdin_blocks())
    return path


def _stdin_blocks() -> Iterator[bytes]:
    with naming_file("标准输入"):
        while block := sys.stdin.buffer.read(1 << 20):
            yield block
