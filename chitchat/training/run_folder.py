"""--save_model_path 指的文件夹：同时只许一次训练，旧的一次整个收起来，只留最新的几个检查点。"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from chitchat.cli import notify
from chitchat.errors import UserError
from chitchat.files import check_writable

logger = logging.getLogger(__name__)

LOCK_NAME = ".training.lock"
# 一次训练留下的；别的（model/base、config*.json、用户自己的文件）从不动
LEFT_BY_A_RUN = re.compile(
    r"training_state(\.old\d+|\.previous|\.damaged)?\.pt|epoch[0-9]+|min_ppl_model|runs|loss\.png"
)


@contextlib.contextmanager
def occupy(folder: Path) -> Iterator[None]:
    """占住这个文件夹，直到离开；进程死了也就放开了。文件系统不支持锁的话照常运行。

    Raises:
        UserError: 另一个进程正占着。
        OSError: 不能写。
    """
    check_writable(folder)
    with (folder / LOCK_NAME).open("ab") as file:
        try:
            _lock(file)
        except BlockingIOError:
            raise UserError(
                f"另一个训练正在往 {folder} 里写：请等它结束，或换一个 --save_model_path"
            ) from None
        except OSError as error:
            logger.info("no file lock here: %s", error)
        yield


def _lock(file: BinaryIO) -> None:
    """锁住打开的文件；别的进程锁着时抛出 BlockingIOError，不支持时抛出别的 OSError。"""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock 会传给读数据的子进程
    except PermissionError as error:  # Windows 总是用它表示已被锁住，POSIX 允许用它
        raise BlockingIOError(*error.args) from error


def set_aside(folder: Path) -> Path | None:
    """把上一次训练留下的整个移进 ``old1`` 之类的新文件夹，返回它；没有时是 None。

    新的一次因此不会与旧的混在一起，还没存下状态就中断的话，也不会接到旧的上面去。
    """
    found = [path for path in folder.iterdir() if LEFT_BY_A_RUN.fullmatch(path.name)]
    if not found:
        return None
    folders = (folder / f"old{i}" for i in itertools.count(1))
    old = next(path for path in folders if not (path.exists() or path.is_symlink()))
    old.mkdir()
    # 先是状态，旧的在前：中断了也接不上它
    for path in sorted(found, key=lambda path: (path.suffix != ".pt", path.name)):
        path.rename(old / path.name)
    logger.info("earlier run set aside: folder=%s items=%d", old, len(found))
    return old


def make_room(folder: Path, pretrained_model: str) -> None:
    """从头训练之前，把文件夹里旧的一次训练收起来，并告诉用户。

    Args:
        folder: 检查点所在的文件夹。
        pretrained_model: 这次从哪个模型开始；它也被收起来了的话，说它现在在哪里。
    """
    old = set_aside(folder)
    if old is None:
        return
    notify(
        f"{folder} 里已有一次训练，它的检查点、训练状态和曲线都移进了 {old}；"
        "要接着它训练，请移回来再加 --resume"
    )
    start = Path(pretrained_model)
    if pretrained_model and (old / start.name).is_dir() and not start.exists():
        notify(f"--pretrained_model 也在其中，下次请写 --pretrained_model {old / start.name}")


def remove_old_checkpoints(save_model_dir: Path, limit: int, last_epoch: int) -> None:
    """只保留到 last_epoch（从 1 数）为止的 limit 个 epoch 文件夹；limit 为 0 时全部保留。

    编号更大的文件夹属于另一次训练，不动它们。
    """
    for folder in save_model_dir.glob("epoch*"):
        number = folder.name.removeprefix("epoch")
        if limit and number.isdigit() and int(number) <= last_epoch - limit:
            shutil.rmtree(folder.resolve())
            if folder.is_symlink():
                folder.unlink()
