"""一次聊天：历史、斜线命令、聊天记录。显示交给调用者；本模块不加载 torch。"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from chitchat.chat.options import KNOBS, SamplingOptions
from chitchat.chat.terminal.keyboard import no_stop_key
from chitchat.chat.transcript import Transcript, split_lines
from chitchat.errors import UserError
from chitchat.files import atomic_file
from chitchat.tokens.tokenizer import decode_response, encode_utterances

StopKey = Callable[[], AbstractContextManager[Callable[[], bool]]]

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chitchat.chat.candidates import Candidate
    from chitchat.chat.chatbot import Chatbot, Reply

# 命令 → 写法和说明；/help 和补全都照它来
COMMANDS = {
    "/help": ("/help", "显示这份说明"),
    "/reset": ("/reset", "忘掉前面的对话，重新开始"),
    "/undo": ("/undo", "撤回上一轮（你的一句和它的回复）"),
    "/retry": ("/retry", "对你上一句重新回答"),
    "/show": ("/show", "显示模型现在看得到的历史"),
    "/save": ("/save 文件", "把这次聊天按语料的格式写进文件"),
    "/set": ("/set 名字 值", "改一个旋钮，例如 /set temperature 0.8；不带名字时列出现在的值"),
    "/quit": ("/quit", "结束聊天"),
}
COMMAND = re.compile(r"/[a-zA-Z_]+(?:\s|\Z)")  # “/微笑”、“/24”之类是普通的话
MAX_KEPT_UTTERANCES = 1000  # 历史只为 /undo 多留一些，聊多久内存都不涨


class Repl:
    """一次聊天：历史、旋钮、记录，以及每一行输入的处理。"""

    def __init__(
        self,
        tokenizer: Tokenizer,
        loading: Future[Chatbot],
        options: SamplingOptions,
        transcript: Transcript,
        rng: random.Random,
        *,
        show: Callable[[str], None],
        tell: Callable[[str], None],
        stop_key: StopKey = no_stop_key,
        is_debug: bool = False,
    ) -> None:
        """准备聊天。

        Args:
            tokenizer: 模型的 tokenizer。
            loading: 正在后台读入的模型，第一次要回答时才等它。
            options: 采样的旋钮。
            transcript: 聊天记录。
            rng: 随机数源。
            show: 原样显示回复的一部分。
            tell: 显示一段说明，自成一行。
            stop_key: 回复写着的时候，怎样知道用户要停下它。
            is_debug: 是否列出全部候选。
        """
        self.tokenizer = tokenizer
        self.loading = loading
        self.options = options
        self.transcript = transcript
        self._rng = rng
        self._show = show
        self._tell = tell
        self._stop_key = stop_key
        self.is_debug = is_debug
        self.history: list[list[int]] = []
        self.texts: list[str] = []  # 与 history 一一对应的原文

    @property
    def bot(self) -> Chatbot:
        """模型；还没有读完就等它。"""
        return self.loading.result()

    def handle(self, line: str) -> bool:
        """处理一行输入；返回 False 表示用户要结束聊天。"""
        text = line.strip()
        if COMMAND.match(text):
            return self._run_command(text)
        if text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        """回答一句，边生成边显示。"""
        self.transcript.add("user", text)
        self._remember(text, encode_utterances(self.tokenizer, [text])[0])
        bot = self.bot  # 模型读不出时，在显示“chatbot:”之前就说
        with self._stop_key() as is_stopped:
            reply = bot.reply(self.history, self.options, self._rng)
            self._speak(reply, is_stopped)
            if reply.token_ids:
                self.transcript.add("chatbot", reply.text)
                self._remember(reply.text, reply.token_ids)
            else:
                self._forget(slice(-1, None))
                self._tell("（还没有说就停了，你的这句不算）")
        if self.is_debug:
            self._show_candidates(reply.candidates)
        if reply.is_truncated:
            self._tell(f"（对话太长，模型只有 {bot.max_positions} 个位置，这次没有用上最早的部分）")

    def _speak(self, reply: Reply, is_stopped: Callable[[], bool]) -> None:
        """把回复逐段显示出来；用户要停就停，说了一半的词也显示完。"""
        num_shown = 0
        self._show("chatbot:")
        for piece in reply:
            self._show(piece)
            num_shown += len(piece)
            if is_stopped():
                reply.close()
        self._show(f"{reply.text[num_shown:]}\n")

    def _remember(self, text: str, token_ids: list[int]) -> None:
        self.history.append(token_ids)
        self.texts.append(text)
        self._forget(slice(None, -MAX_KEPT_UTTERANCES))

    def _forget(self, part: slice) -> None:
        del self.history[part], self.texts[part]

    def _show_candidates(self, candidates: Sequence[Candidate]) -> None:
        """列出全部候选，选中的在最前。"""
        for candidate in candidates:
            backward = "" if candidate.backward is None else f" 反向 {candidate.backward:7.3f}"
            text = decode_response(self.tokenizer, candidate.token_ids)
            self._tell(f"  正向 {candidate.likelihood:7.3f}{backward}  {text}")

    def _run_command(self, text: str) -> bool:
        """执行一条斜线命令。"""
        name, *arguments = text.split()
        if name == "/quit":
            return False
        if name == "/help":
            self._tell("\n".join(f"{usage:<15} {note}" for usage, note in COMMANDS.values()))
        elif name == "/reset":
            self._forget(slice(None))
            self._tell("好，前面的对话已忘掉")
        elif name == "/undo":
            self._tell("已撤回上一轮" if self.history else "还没有可以撤回的对话")
            self._forget(slice(-2, None))
        elif name == "/retry":
            self._retry()
        elif name == "/show":
            shown = self.texts[-self.options.max_history_len :]
            self._tell("\n".join(shown) or "还没有对话")
        elif name == "/save":
            self._save(text.removeprefix(name).strip())
        elif name == "/set":
            self._set_knob(arguments)
        else:
            self._tell(f"没有 {name} 这条命令，输入 /help 查看全部命令")
        return True

    def _retry(self) -> None:
        """撤回上一轮，再答一次。"""
        if not self.texts:
            self._tell("还没有可以重答的话")
            return
        question = self.texts[-2]
        self._forget(slice(-2, None))
        self._answer(question)

    def _save(self, name: str) -> None:
        """把这次聊天写成一段语料；文件名里可以有空格，两端的引号不算。"""
        if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
            name = name[1:-1]
        if not name or not self.texts:
            self._tell("用法：/save 文件" if self.texts else "还没有可以保存的对话")
            return
        path = Path(name)
        try:
            path = path.expanduser()
            if path.exists():
                self._tell(f"没有写：{path} 已经存在，请换一个名字")
                return
            with atomic_file(path) as partial:
                lines = [line for text in self.texts for line in split_lines(text)]
                partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # 后两种是 pathlib 认不出的写法
            self._tell(f"没有写成 {path}：{getattr(error, 'strerror', None) or error}")
            return
        self._tell(f"已写进 {path}")

    def _set_knob(self, arguments: list[str]) -> None:
        """不带参数时列出旋钮，否则改其中一个；写错时旋钮不变。"""
        if not arguments:
            for name, knob in KNOBS.items():
                self._tell(f"{name} = {getattr(self.options, knob.field)}（{knob.description}）")
            return
        if len(arguments) != 2 or arguments[0] not in KNOBS:
            self._tell(f"用法：/set 名字 值，名字是 {'、'.join(KNOBS)} 之一")
            return
        name, value = arguments
        knob = KNOBS[name]
        bot = self.bot  # 模型读不出时照样报告，不当作旋钮写错
        try:
            changed = dataclasses.replace(self.options, **{knob.field: knob.read(value)})
            bot.check_options(changed)
        except UserError as error:
            self._tell(f"{name} 没有改：{error}")
            return
        self.options = changed
        self._tell(f"{name} = {getattr(changed, knob.field)}")
