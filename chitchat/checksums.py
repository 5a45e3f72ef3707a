"""校验和：写文件时记下，读的时候核对，错了一位也看得出来。

CRC-32 防的是磁盘和传输出的错，不防有意的改动；zlib 每秒算 3 GB，比读盘快。
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from chitchat.errors import UserError
from chitchat.files import parse_json

CHECKSUMS_NAME = "checksums.json"
BLOCK_BYTES = 1 << 18  # 再大，一块就要向系统要新的内存，慢七成


def checksum(data: bytes) -> str:
    """一段字节的 CRC-32，八个十六进制数字。"""
    return f"{zlib.crc32(data):08x}"


def file_checksum(path: Path) -> str:
    """文件的 CRC-32，八个十六进制数字；一块一块地读，多大的文件都只用很少的内存。"""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def describe_files(paths: Iterable[Path]) -> dict[str, dict]:
    """文件名 → 字节数和校验和，可以写进 json，见 find_damage。"""
    return {
        path.name: {"size": path.stat().st_size, "crc32": file_checksum(path)} for path in paths
    }


def is_same_size(path: Path, described: Mapping) -> bool:
    """文件与 describe_files 记下的一样大；不一样大的，是别的工具后来改写的，或断了。"""
    return path.stat().st_size == described.get("size")


def find_damage(path: Path, described: Mapping) -> str:
    """一样大的文件，校验和不对的话怎样不对；对的话是空串。"""
    found, wanted = file_checksum(path), described.get("crc32")
    return "" if found == wanted else f"校验和应为 {wanted}，实为 {found}"


def write_checksums(folder: Path) -> None:
    """把文件夹里现有的各个文件的校验和写进 checksums.json。"""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    text = json.dumps(describe_files(paths), indent=2)
    (folder / CHECKSUMS_NAME).write_text(f"{text}\n", encoding="utf-8", newline="\n")


def check_folder(folder: Path) -> None:
    """核对文件夹里记下了校验和的各个文件；没有 checksums.json（别的工具做的）就不管。

    大小变了的也不管：那是改写过的，断了的话读它的时候自然看得出来。

    Raises:
        UserError: 有一个文件损坏。
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return
    own = f"要是你自己改的，就删去 {path}"
    try:
        saved = {name: dict(entry) for name, entry in parse_json(path.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path} 已损坏：请从原处重新复制整个文件夹；{own}") from None
    for name, described in saved.items():
        file = folder / Path(name).name
        if file.is_file() and is_same_size(file, described):
            damage = find_damage(file, described)
            if damage:
                raise UserError(f"{file} 已损坏（{damage}）：请从原处重新复制；{own}")
