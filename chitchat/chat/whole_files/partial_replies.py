"""做到一半的回复：与输出文件并排的 ``.part``，中断后由它接着做。"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from chitchat.checksums import checksum
from chitchat.cli import notify
from chitchat.errors import UserError
from chitchat.files import atomic_file, naming_file, parse_json


class PartialReplies:
    """做到一半的回复：第一行是由什么做出来的，以后每行一批，都是 JSON、TAB 和它的校验和。

    Attributes:
        path: 文件；有了第一批回复才出现。
        seed: 随机种子；没有指定时与上次的相同。
        replies: 已有的回复，对话的序号 → 文字。
    """

    def __init__(self, path: Path, identity: Mapping[str, object], seed: int | None) -> None:
        """读出已有的回复；末尾没写完的、校验和不对的一批不算，会重新做。

        Raises:
            UserError: 文件不是这个程序写的，或由别的输入、选项做出来；文件不变。
        """
        self.path = path
        self.replies: dict[int, str] = {}
        *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
        if rest and not lines:
            raise _foreign(path)
        header = _parse_header(path, lines[0]) if lines else {}
        self.seed = header.get("seed", secrets.randbits(32)) if seed is None else seed
        self._header = {**json.loads(json.dumps(identity, default=str)), "seed": self.seed}
        for name, value in header.items():
            if self._header.get(name) != value:
                raise UserError(
                    f"{path} 是做到一半的结果，但 {name} 与那时不同："
                    "要接着做，请用原来的输入和选项；要重新做，请先删去它"
                )
        for number, line in enumerate(lines[1:], 2):
            try:
                self.replies.update(parse_json(_unseal(line)))
            except (ValueError, TypeError):
                notify(f"{path} 第 {number} 行已损坏，那一批重新做")
        if rest:  # 没写完的一批
            os.truncate(path, path.stat().st_size - len(rest))
        self._file: TextIO | None = None

    def add(self, batch: Sequence[tuple[int, str]]) -> None:
        """记下一批（序号, 回复），交给操作系统。"""
        self.replies.update(batch)
        if self._file is None:
            if not self.path.exists():
                with atomic_file(self.path) as unfinished:
                    unfinished.write_text(_seal(self._header), encoding="utf-8", newline="\n")
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        with naming_file(self.path):
            self._file.write(_seal(batch))
            self._file.flush()

    def close(self) -> None:
        """关闭文件。"""
        if self._file is not None:
            self._file.close()


def _seal(value: object) -> str:
    """一行：JSON、TAB、校验和。"""
    text = json.dumps(value)
    return f"{text}\t{checksum(text.encode())}\n"


def _unseal(line: bytes) -> bytes:
    """一行里的 JSON；旧版本写的没有校验和。

    Raises:
        ValueError: 校验和不对。
    """
    text, mark, saved = line.partition(b"\t")
    if mark and checksum(text).encode() != saved:
        raise ValueError("wrong checksum")
    return text


def _parse_header(path: Path, line: bytes) -> dict:
    with contextlib.suppress(ValueError):
        header = parse_json(_unseal(line))
        if isinstance(header, dict) and "input_path" in header:
            return header
    raise _foreign(path)


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} 不是本程序做到一半的结果：请移走它，或换一个 --output_path")
