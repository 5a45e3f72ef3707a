"""读写文件的零件：要么整个出现、要么不出现的文件和文件夹，坏了时说得清是哪个。"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chitchat.errors import UserError

# torch 和 safetensors 写文件失败时，异常里会有的字样
DISK_ERRORS = ("inline_container", "PytorchStreamWriter", "I/O error")
LEFTOVER_OWNER = re.compile(r"(\d+@[A-Za-z0-9-]*)?")  # 临时文件名里的“进程号@主机”


ROOT = Path(__file__).resolve().parents[1]


def find_shipped(path: Path) -> Path:
    """相对路径在当前文件夹里没有、项目里有时，是项目里的那一个；否则原样。

    从别的文件夹运行脚本时，默认的词表和结构因此也找得到。
    """
    shipped = ROOT / path
    return shipped if not path.exists() and shipped.exists() else path


def parse_json(text: str | bytes) -> object:
    """读 JSON；坏的都抛出 ValueError，套得太深的也是。"""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON 套得太深") from None


def check_writable(directory: Path) -> None:
    """不能写的文件夹现在就报告，而不是做完了再说；没有就创建，失败时抛出 OSError。"""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


@contextlib.contextmanager
def naming_file(path: Path | str) -> Iterator[None]:
    """读写时的 OSError 若没有说是哪个文件（磁盘满了、坏了时就没有），补上 path。"""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path, *, previous: str = "") -> Iterator[Path]:
    """在旁边写临时文件，成功后一次换名；失败时原文件不变，临时文件被删除。

    Args:
        path: 最终的文件；父目录会自动创建。是符号链接时写到它所指的地方，链接不变。
        previous: 原来的文件改叫这个名字留着，在同一个文件夹里；空串表示不留。

    Yields:
        供写入的临时路径。
    """
    path, partial, _ = _prepare(path)
    try:
        with naming_file(path), _explain_full_disk(path):
            yield partial
            _sync(partial)
        if previous and path.is_file():
            path.replace(path.with_name(previous))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """在旁边写临时文件夹，成功后换名为 ``path``；失败时原文件夹不变。

    Args:
        path: 最终的文件夹；已存在时整个被替换。是符号链接时换掉它所指的，链接不变。

    Yields:
        供写入的空文件夹。
    """
    path, partial, retired = _prepare(path)
    partial.mkdir()
    try:
        with naming_file(path), _explain_full_disk(path):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
        if path.exists():
            path.rename(retired)
        try:
            partial.rename(path)
        except BaseException:
            if retired.exists() and not path.exists():
                retired.rename(path)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prepare(path: Path) -> tuple[Path, Path, Path]:
    """跟随链接，收拾死去的进程留下的；给出最终的、临时的、换下来的三个路径。

    后两个名字里有主机和进程号，同时写一处的两个进程因此不会毁掉对方的临时文件。
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    for leftover in sorted(path.parent.glob(f"{glob.escape(prefix)}*")):
        owner, _, kind = leftover.name.removeprefix(prefix).rpartition(".")
        if kind not in ("part", "old") or not LEFTOVER_OWNER.fullmatch(owner) or _is_alive(owner):
            continue
        if kind == "old" and not path.exists():
            leftover.rename(path)  # 那个进程在两次换名之间被强行结束
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    stem = f"{prefix}{os.getpid()}@{_host()}"
    return path, path.with_name(f"{stem}.part"), path.with_name(f"{stem}.old")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32]


def _is_alive(owner: str) -> bool:
    """临时文件的主人 ``进程号@主机`` 是否还在写；空的是旧版本留下的，都已不在。"""
    pid, _, host = owner.partition("@")
    if not pid or (host == _host() and int(pid) == os.getpid()):
        return False
    if host != _host() or os.name == "nt":  # 无从得知：留着，不冒险
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """磁盘写满时，torch 和 safetensors 抛出的不是 OSError，只能由文字认出；都变成一句话。"""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not any(sign in str(error) for sign in DISK_ERRORS):
            raise
        raise UserError(
            f"写不下 {path}（{error}）：原有的文件没有变；请清出磁盘空间再试，训练可以加 --resume"
        ) from error


def _sync(path: Path) -> None:
    """让文件内容落盘，断电后不会出现换了名却是空的文件。"""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
