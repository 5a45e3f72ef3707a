"""一个文件里有什么：压缩包、Excel、分块的导出，或者根本不是文字。先看开头的几个字节，不信后缀。"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from chitchat.corpus.generated import find_zstd, open_chunked, open_excel
from chitchat.errors import UserError

TEXT_SUFFIXES = (
    ".txt", ".tsv", ".json", ".jsonl", ".ndjson", ".conv", ".csv", ".yml", ".yaml", ".mht",
    ".mhtml",
)  # fmt: skip
PACKED_SUFFIXES = (
    ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".xlsx", ".xlsm",
)  # fmt: skip
_BAD_ARCHIVE = (
    EOFError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, tarfile.TarError, lzma.LZMAError,
)  # fmt: skip
# zip 的目录坏了时，文件名不是 UTF-8，各个数对不上，成了 zipfile 不认得的版本，或像有密码的
_BAD_ZIP = (UnicodeDecodeError, NotImplementedError, struct.error, OverflowError, RuntimeError)
_NOT_TEXT = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "旧版 Office 文件（.xls、.doc）",
     "在 Excel 或 WPS 里另存为 .xlsx、CSV 或纯文本"),
    (b"7z\xbc\xaf\x27\x1c", "7z 压缩包", "先解压"),
    (b"Rar!\x1a\x07", "RAR 压缩包", "先解压"),
    (b"%PDF", "PDF 文档", "另存为纯文本"),
    (b"SQLite format 3\0", "SQLite 数据库", "用导出工具把里面的聊天导出成 CSV、JSON 或 TXT"),
    (b"\x93NUMPY", "NumPy 数组（train.py 可以直接用的训练数据里有这种文件）", "用原来的语料"),
    (b"\x89PNG", "PNG 图片", "换成文字"),
    (b"\xff\xd8\xff", "JPEG 图片", "换成文字"),
    (b"GIF8", "GIF 图片", "换成文字"),
    (b"\x7fELF", "程序", "换成文字"),
    (b"ID3", "MP3 音频", "换成文字"),
    (b"version https://git-lfs", "Git LFS 的指针，不是文件本身", "用 git lfs pull 取回"),
)  # fmt: skip


class Part(NamedTuple):
    """文件里的一个语料。

    Attributes:
        name: 给用户看的名字。
        suffix: 去掉压缩后缀之后的后缀，小写。
        open_bytes: 从头打开，给出解压后的字节；参数是已打开的磁盘文件。
    """

    name: str
    suffix: str
    open_bytes: Callable[[BinaryIO], BinaryIO]


def open_container(path: Path) -> list[Part]:
    """一个文件里的各个语料：压缩包和 Excel 里可以有好几个，其余恰好一个。

    Raises:
        UserError: 不是文字，或压缩包读不了；说明它是什么、怎么办。
    """
    with path.open("rb") as file:
        head = file.read(1 << 12)
    _refuse_binary(path, head)
    suffix = path.suffix.lower()
    if head.startswith(b"PK\x03\x04") or suffix == ".zip":
        return _open_zip(path)
    if suffix in (".xlsx", ".xlsm"):
        raise UserError(f"{path} 不是 Excel 文件：请重新导出，或改成真正的后缀")
    for magic, names, opener in (
        (b"\x1f\x8b", (".gz", ".tgz"), gzip.open),
        (b"BZh", (".bz2",), bz2.open),
        (b"\xfd7zXZ\0", (".xz",), lzma.open),
        (b"\x28\xb5\x2f\xfd", (".zst",), None),
    ):
        if head.startswith(magic) or suffix in names:
            opener = opener or find_zstd(path)
            return _open_compressed(path, opener)
    if _is_tar(head):
        return _open_tar(path, lambda raw: raw)
    if path.name == "manifest.json" and b"chunked-jsonl" in head:
        return [Part(str(path), ".jsonl", lambda raw: open_chunked(path))]
    return [Part(str(path), suffix, lambda raw: raw)]


def _refuse_binary(path: Path | str, head: bytes) -> None:
    kind = next(((what, how) for magic, what, how in _NOT_TEXT if head.startswith(magic)), None)
    if kind is None and head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        kind = ("pickle（像是 preprocess.py 写出的训练数据，交给 train.py 用）", "用原来的语料")
    if kind is None and head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        kind = ("网页", "重新下载真正的文件；若是导出工具的网页版，改选 JSON、CSV 或 TXT")
    if kind:
        raise UserError(f"{path} 是{kind[0]}，不是文字：请{kind[1]}")


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _open_compressed(path: Path, opener: Callable[[BinaryIO], BinaryIO]) -> list[Part]:
    with path.open("rb") as raw, explaining_damage(path):
        head = opener(raw).read(1 << 12)
    if _is_tar(head):
        return _open_tar(path, opener)
    _refuse_binary(path, head)
    return [Part(str(path), Path(path.stem).suffix.lower(), opener)]


def _wanted(name: str) -> bool:
    """压缩包里的这个文件要不要：macOS 附带的和隐藏的不要。"""
    parts = PurePath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(TEXT_SUFFIXES)


def _open_tar(path: Path, opener: Callable[[BinaryIO], BinaryIO]) -> list[Part]:
    with (
        path.open("rb") as raw,
        explaining_damage(path),
        tarfile.open(fileobj=opener(raw)) as archive,
    ):
        names = [member.name for member in archive if member.isfile() and _wanted(member.name)]

    _refuse_repeated(path, names)

    def open_member(raw: BinaryIO, name: str) -> BinaryIO:
        return tarfile.open(fileobj=opener(raw)).extractfile(name)

    return _parts(path, names, open_member)


def _parts(
    path: Path, names: list[str], open_member: Callable[[BinaryIO, str], BinaryIO]
) -> list[Part]:
    if not names:
        raise UserError(f"{path} 里没有语料：应有 {'、'.join(TEXT_SUFFIXES)} 文件")
    return [
        Part(
            f"{path}:{name}", PurePath(name).suffix.lower(), lambda raw, n=name: open_member(raw, n)
        )
        for name in names
    ]


@contextlib.contextmanager
def explaining_damage(name: Path | str, *more: type[Exception]) -> Iterator[None]:
    """解压时的异常变成一句话；有编号的 OSError 是真正的读盘错误，补上文件名，照样抛出。

    bz2 坏了时抛出的 OSError 没有编号；zip 的目录坏了时，zipfile 会去读一个负的位置，编号是 EINVAL。

    Args:
        name: 给用户看的名字。
        more: 除了各种压缩坏了的，还有哪些异常也是。
    """
    try:
        yield
    except (*_BAD_ARCHIVE, OSError, *more) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or str(name)
            raise
        raise UserError(
            f"{name} 读不出来（{error}）：可能没有压缩完整，请重新下载或解压后再试"
        ) from error


def _open_zip(path: Path) -> list[Part]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} 不是完整的 zip 文件：请重新下载或解压后再试")
    with explaining_damage(path, *_BAD_ZIP), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    all_names = {member.filename for member in members}
    if any(name.startswith("xl/") for name in all_names):
        return [Part(*part) for part in open_excel(path)]
    if "word/document.xml" in all_names:
        raise UserError(f"{path} 是 Word 文档，不是文字：请另存为纯文本")
    wanted = [member for member in members if _wanted(member.filename)]
    for member in wanted:
        if member.flag_bits & 1:
            raise UserError(f"{path} 里的 {member.filename} 加了密码：请先用解压软件解开")
        if member.compress_type not in (
            zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA,
        ):  # fmt: skip
            raise UserError(
                f"{path} 里的 {member.filename} 用了少见的压缩方法"
                f"（{zipfile.compressor_names.get(member.compress_type, member.compress_type)}）："
                "请先用解压软件解开"
            )
    _refuse_repeated(path, [member.filename for member in wanted])

    def open_member(raw: BinaryIO, name: str) -> BinaryIO:
        with explaining_damage(f"{path}:{name}", *_BAD_ZIP):
            return zipfile.ZipFile(raw).open(name)

    return _parts(path, [member.filename for member in wanted], open_member)


def _refuse_repeated(path: Path, names: list[str]) -> None:
    """同一个名字的两个文件，按名字只取得到后一个。"""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path} 里有 {names.count(repeated[0])} 个都叫 {repeated[0]} 的文件，不知道该读哪个："
            "请先解压，改成不同的名字"
        )
