"""排序：比内存大的东西借临时的 SQLite 库排好。"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from chitchat.errors import UserError


@contextlib.contextmanager
def temporary_database(*statements: str) -> Iterator[sqlite3.Connection]:
    """一个用完就删的库，只用十几 MB 内存。

    Args:
        statements: 先执行的语句，如建表。

    Raises:
        UserError: 临时文件夹写不下。
    """
    settings = ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16000")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="chitchat-") as folder,
            contextlib.closing(
                sqlite3.connect(Path(folder) / "rows.db", isolation_level=None)
            ) as database,
        ):
            for statement in (*(f"PRAGMA {setting}" for setting in settings), *statements, "BEGIN"):
                database.execute(statement)
            yield database
    except sqlite3.OperationalError as error:
        raise UserError(
            f"临时文件夹 {tempfile.gettempdir()} 写不下（{error}）："
            "请清出空间，或用环境变量 TMPDIR 指定别处的文件夹"
        ) from error


def group_rows(rows: Iterable[tuple[str, str, int]]) -> Iterator[tuple[list[str], list[int]]]:
    """编号相同的各行归到一起，不必相邻；编号第一次出现的次序就是各组的次序。

    Args:
        rows: 编号、文字、行号。

    Yields:
        一组的各句，以及它们的行号。
    """
    numbers: dict[str, int] = {}
    with temporary_database("CREATE TABLE rows (number, text, line)") as database:
        database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?)",
            ((numbers.setdefault(key, len(numbers)), text, line) for key, text, line in rows),
        )
        ordered = database.execute("SELECT * FROM rows ORDER BY number, rowid")
        for _, group in itertools.groupby(ordered, lambda row: row[0]):
            found = list(group)
            yield [row[1] for row in found], [row[2] for row in found]
