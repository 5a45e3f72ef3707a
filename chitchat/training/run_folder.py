"""--save_model_path 指的文件夹：只留最新的几个检查点。"""

from __future__ import annotations

import shutil
from pathlib import Path


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
