"""网页和接口的聊天记录：格式与终端的相同，每天一个文件。"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

from chitchat.chat.transcript import split_lines

logger = logging.getLogger(__name__)


class ChatLog:
    """每问一次、答一次，一起写进当天的文件：许多人同时聊，也不会混在一起。"""

    def __init__(self, directory: Path) -> None:
        """文件夹没有就创建，失败时抛出 OSError。"""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._is_failing = False

    def add(self, question: str, replies: Sequence[str]) -> None:
        """记下一问和它的回复，交给操作系统；写不进去时只在日志里说一次，不影响聊天。"""
        now = datetime.datetime.now()
        pairs = [("user", question), *(("chatbot", reply) for reply in replies)]
        lines = [f"{who}:{line}\n" for who, text in pairs for line in split_lines(text) or [""]]
        path = self._directory / f"{now:%Y-%m-%d}.txt"
        try:
            path.touch(0o600)  # 别人说的话，只有自己读得到
            with path.open("ab", buffering=0) as file:
                file.write("".join([f"聊天记录{now}:\n", *lines]).encode())
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                with contextlib.suppress(OSError):
                    logger.warning("chat_log=%s error=%s", path, error)
