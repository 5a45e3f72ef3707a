"""要么整个出现、要么不出现的文件和文件夹。"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chitchat.errors import UserError

# torch 和 safetensors 写文件失败时，异常里会有的字样
DISK_ERRORS = ("inline_container", "PytorchStreamWriter", "I/O error")


def check_writable(directory: Path) -> None:
    """不能写的文件夹现在就报告，而不是做完了再说；没有就创建，失败时抛出 OSError。"""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """在旁边写临时文件，成功后一次换名；失败时原文件不变，临时文件被删除。

    Args:
        path: 最终的文件；父目录会自动创建。

    Yields:
        供写入的临时路径。
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        with _explain_full_disk(path):
            yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """在旁边写临时文件夹，成功后换名为 ``path``；失败时原文件夹不变。

    Args:
        path: 最终的文件夹；已存在时整个被替换。

    Yields:
        供写入的空文件夹。
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    retired = path.with_name(f".{path.name}.old")
    if retired.exists() and not path.exists():
        retired.rename(path)  # 上次在两次换名之间被强行结束
    for leftover in (partial, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        with _explain_full_disk(path):
            yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            path.rename(retired)
        try:
            partial.rename(path)
        except BaseException:
            if retired.exists():
                retired.rename(path)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """磁盘写满时，torch 和 safetensors 抛出的不是 OSError，只能由文字认出；都变成一句话。"""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) or not any(sign in reason for sign in DISK_ERRORS):
            raise
        raise UserError(
            f"写不下 {path}（{reason}）：原有的文件没有变；请清出磁盘空间再试，训练可以加 --resume"
        ) from error


def _sync(path: Path) -> None:
    """让文件内容落盘，断电后不会出现换了名却是空的文件。"""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
