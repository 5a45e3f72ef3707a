"""排序：比内存大的东西借临时的 SQLite 库排好。"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_database(*statements: str) -> Iterator[sqlite3.Connection]:
    """一个用完就删的库，只用十几 MB 内存。

    Args:
        statements: 先执行的语句，如建表。
    """
    with tempfile.TemporaryDirectory(prefix="chitchat-") as folder:
        path = Path(folder) / "rows.db"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            settings = ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16000")
            for statement in (*(f"PRAGMA {setting}" for setting in settings), *statements, "BEGIN"):
                database.execute(statement)
            yield database
