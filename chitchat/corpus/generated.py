"""读的时候才变出来的文本：Excel 的工作表，分块的导出。"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from chitchat.errors import UserError
from chitchat.files import parse_json


def open_excel(path: Path) -> list[tuple[str, str, Callable[[BinaryIO], BinaryIO]]]:
    """Excel 的每张工作表变成一份 CSV：名字、后缀、打开它的函数。

    Raises:
        UserError: 没有安装 openpyxl，或文件坏了。
    """
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(
            f"读 {path} 需要 openpyxl：请 pip install openpyxl，或另存为 CSV"
        ) from error
    with _excel_errors(path):
        names = openpyxl.load_workbook(path, read_only=True).sheetnames

    def rows(name: str) -> Iterator[bytes]:
        with _excel_errors(path):
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            for row in book[name].iter_rows(values_only=True):
                line = io.StringIO()
                csv.writer(line).writerow(["" if cell is None else str(cell) for cell in row])
                yield line.getvalue().encode("utf-8", "replace")
            book.close()

    return [(f"{path}:{name}", ".csv", lambda raw, n=name: FromChunks(rows(n))) for name in names]


@contextlib.contextmanager
def _excel_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise UserError(f"{path} 读不出来（{error}）：请在 Excel 或 WPS 里另存为 CSV") from error


def open_chunked(manifest: Path) -> FromChunks:
    """QQ-chat-exporter 分块导出：清单一行，接着是各块。"""
    return FromChunks(_chunked(manifest))


def _chunked(manifest: Path) -> Iterator[bytes]:
    content = parse_json(manifest.read_text(encoding="utf-8-sig"))
    yield json.dumps(content, ensure_ascii=False).encode() + b"\n"
    for path in chunk_paths(manifest):
        with path.open("rb") as file:
            while data := file.read(1 << 16):
                yield data
        yield b"\n"


def chunk_paths(manifest: Path) -> list[Path]:
    """清单所指的各块，按次序；不是这种清单时是空的。"""
    try:
        content = parse_json(manifest.read_text(encoding="utf-8-sig"))
        is_chunked = "chunked-jsonl" in json.dumps(content)
    except (OSError, ValueError, RecursionError):
        return []
    chunked = content.get("chunked") if isinstance(content, dict) else None
    folder = manifest.parent / str((chunked or {}).get("chunksDir", "chunks"))
    return sorted(folder.glob("*.jsonl")) if is_chunked else []


class FromChunks(io.RawIOBase):
    """由一块块的字节做成的流。"""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.rest = b""

    def readable(self) -> bool:
        """总是可读。"""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """填进一些字节，返回个数；0 表示没有了。"""
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = chunk
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size
