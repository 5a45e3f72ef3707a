"""聊天记录：一行 ``聊天记录{时间}:``，然后是 ``user:…``、``chatbot:…`` 各行。"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TextIO

from chitchat.files import naming_file

LINE_ENDS = re.compile(r"[\r\n]+")


def split_lines(text: str) -> list[str]:
    """有字的各行，去掉两端的空白。"""
    return [line.strip() for line in LINE_ENDS.split(text) if line.strip()]


class Transcript:
    """聊天记录：追加到 sample.txt，每写完一行就交给操作系统，中途被杀也不丢。"""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "sample.txt"
        self._file: TextIO = self._path.open("a", encoding="utf-8", buffering=1)
        self._write(f"聊天记录{datetime.datetime.now()}:\n")

    def add(self, speaker: str, text: str) -> None:
        """记下 ``speaker:text``；一次贴进来的好几行，每行各记一行。"""
        self._write("".join(f"{speaker}:{line}\n" for line in split_lines(text) or [""]))

    def _write(self, text: str) -> None:
        with naming_file(self._path):
            self._file.write(text)

    def close(self) -> None:
        """关闭文件。"""
        self._file.close()
