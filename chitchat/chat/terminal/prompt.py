"""提示符：用 prompt_toolkit 编辑一行，有以前打过的话、命令的补全，贴进来的几行各是一句。"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from chitchat.chat.options import KNOBS
from chitchat.chat.terminal.repl import COMMANDS

PROMPT = "user:"
MAX_HISTORY = 1000  # 行


class LineHistory(History):
    """打过的话，一行一句，最多留最近的 MAX_HISTORY 行；读写不了就当没有。"""

    def __init__(self, path: Path) -> None:
        """读入以前的；太长了就截短。"""
        super().__init__()
        self._path = path
        self._lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self._lines = lines[-MAX_HISTORY:]
            if len(lines) > MAX_HISTORY:
                path.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")

    def load_history_strings(self) -> Iterable[str]:
        """以前的，最新的在最前。"""
        return reversed(self._lines)

    def store_string(self, string: str) -> None:
        """记下一句，只有自己能读。"""
        text = " ".join(string.splitlines())
        with contextlib.suppress(OSError):
            opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(opened, "a", encoding="utf-8", errors="replace") as file:
                file.write(f"{text}\n")


class CommandCompleter(Completer):
    """按 Tab 补全斜线命令和 /set 的旋钮名。"""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        """可以接上的各种写法。"""
        text = document.text_before_cursor
        words = text.split(" ")
        if not text.startswith("/"):
            return
        if len(words) == 1:
            names = {name: note for name, (_, note) in COMMANDS.items()}
        elif len(words) == 2 and words[0] == "/set":
            names = {name: knob.description for name, knob in KNOBS.items()}
        else:
            return
        for name, note in names.items():
            if name.startswith(words[-1]):
                yield Completion(name, -len(words[-1]), display_meta=note)


class _Paste:
    """贴进来的几行：头一行马上说，其余排着队，最后没有换行的半行留在提示符里接着改。"""

    def __init__(self) -> None:
        self.waiting: deque[str] = deque()
        self.rest = ""

    def accept(self, event: KeyPressEvent) -> None:
        """终端说有人贴了一段文字。"""
        first, *others = event.data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        event.current_buffer.insert_text(first)
        if others:
            *whole, self.rest = others
            self.waiting.extend(whole)
            event.current_buffer.validate_and_handle()


def prompt_lines(history_path: Path | None) -> Iterator[str]:
    """在终端里逐句读。

    Args:
        history_path: 打过的话记在哪里；None 表示只记到这次结束。

    Raises:
        EOFError: 按了 Ctrl+D 或 Ctrl+Z。
        KeyboardInterrupt: 按了 Ctrl+C。
    """
    bindings, paste = KeyBindings(), _Paste()
    bindings.add(Keys.BracketedPaste)(paste.accept)
    bindings.add("c-z")(lambda event: event.app.exit(exception=EOFError))
    session: PromptSession[str] = PromptSession(
        PROMPT,
        history=InMemoryHistory() if history_path is None else LineHistory(history_path),
        completer=CommandCompleter(),
        complete_while_typing=False,
        key_bindings=bindings,
    )
    while True:
        while paste.waiting:
            line = paste.waiting.popleft()
            print_formatted_text(f"{PROMPT}{line}")
            session.history.append_string(line)
            yield line
        rest, paste.rest = paste.rest, ""
        line = session.prompt(default=rest)
        # 终端送来不合编码的字节（如 GBK），到这里是单独的代理码，写不进聊天记录。
        yield line.encode("utf-8", "replace").decode("utf-8")
