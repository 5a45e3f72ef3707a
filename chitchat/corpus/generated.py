"""读的时候才变出来的文本：Excel 的工作表，分块的导出，zst 压缩的文件。"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from chitchat.errors import UserError
from chitchat.files import parse_json

ZSTD_MODULES = ("compression.zstd", "backports.zstd", "zstandard")
ZSTD_BYTES = 512  # 一次解压这么多：zst 里的四个字节可以变出 128 KB


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

    def open_sheet(name: str) -> FromChunks:
        return FromChunks(lambda: rows(name))

    return [(f"{path}:{name}", ".csv", lambda raw, n=name: open_sheet(n)) for name in names]


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
    return FromChunks(lambda: _chunked(manifest))


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


def find_zstd(path: Path) -> Callable[[BinaryIO], BinaryIO]:
    """解压 .zst 的函数；用标准库（Python 3.14 起）或已安装的包。

    Args:
        path: 要读的文件，供错误信息使用。

    Raises:
        UserError: 没有安装这样的包。
    """
    module = next(filter(None, map(_import_if_there, ZSTD_MODULES)), None)
    if module is None:
        raise UserError(f"读 {path} 需要解压 zst 的包：请 pip install zstandard，或先自行解压")
    return lambda raw: io.BufferedReader(FromChunks(lambda: _unzstd(raw, module)))


def _import_if_there(name: str) -> ModuleType | None:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def _unzstd(raw: BinaryIO, module: ModuleType) -> Iterator[bytes]:
    """首尾相接的各帧解压之后的字节；断了、坏了都是 EOFError。

    zstandard 自己的 open 读到断处不出声，所以一帧一帧地解。
    """
    frame = None
    raw.seek(0)
    while data := raw.read(ZSTD_BYTES):
        while data:
            frame = frame or _start_frame(module)
            try:
                yield frame.decompress(data)
            except module.ZstdError as error:
                raise EOFError(str(error)) from error
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("最后一帧断了")


def _start_frame(module: ModuleType) -> object:
    """解压一帧的对象，有 decompress、unused_data 和 eof。"""
    decompressor = module.ZstdDecompressor()
    return decompressor.decompressobj() if module.__name__ == "zstandard" else decompressor


class FromChunks(io.RawIOBase):
    """由一块块的字节做成的流。

    Args:
        start: 从头给出各块；往回跳时再调用一次。
    """

    def __init__(self, start: Callable[[], Iterator[bytes]]) -> None:
        self.start = start
        self.chunks = start()
        self.rest = b""
        self.position = 0

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
        self.position += size
        return size

    def seekable(self) -> bool:
        """总能跳，只是往回跳要从头再来。"""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """跳到离开头（SEEK_SET）或现在（SEEK_CUR）offset 个字节处。"""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("SEEK_END")
        target = offset + (self.position if whence == io.SEEK_CUR else 0)
        if target < self.position:
            self.chunks, self.rest, self.position = self.start(), b"", 0
        while self.position < target and self.read(min(target - self.position, 1 << 16)):
            pass
        return self.position
