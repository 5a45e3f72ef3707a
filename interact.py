"""对话：在终端里与训练好的模型聊天，聊天记录写进 sample/sample.txt。"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from chitchat.checkpoint import check_vocab_size, load_model, load_model_tokenizer
from chitchat.decoding import Chatbot, SamplingOptions
from chitchat.runtime import (
    CliParser,
    UserError,
    bounded,
    configure_logging,
    quiet_transformers,
    run_cli,
    seed_everything,
    select_devices,
)
from chitchat.tokenizer import decode_response, encode_utterances

logger = logging.getLogger("chitchat.interact")

GREETING = "开始和 chatbot 聊天，按 Ctrl+D、Ctrl+C 或 Ctrl+Z 结束，输入 /help 查看命令"
HELP = """\
/help           显示这份说明
/reset          忘掉前面的对话，重新开始
/undo           撤回上一轮（你的一句和它的回复）
/set            显示各旋钮现在的值
/set 名字 值    改一个旋钮，例如 /set temperature 0.8
/quit           结束聊天"""
MAX_KEPT_UTTERANCES = 1000  # 历史只为 /undo 多留一些，聊多久内存都不涨


class Knob(NamedTuple):
    """一个采样旋钮，命令行参数和 /set 共用。"""

    field: str  # SamplingOptions 的字段名
    parse: Callable[[str], float]
    description: str


KNOBS = {
    "temperature": Knob("temperature", bounded(float, above=0), "采样温度，越小越保守"),
    "topk": Knob("top_k", bounded(int, minimum=0), "只从最可能的 K 个 token 中采样，0 表示不限"),
    "topp": Knob(
        "top_p",
        bounded(float, minimum=0, maximum=1),
        "只从累计概率达到 P 的最可能的 token 中采样，0 表示不限",
    ),
    "repetition_penalty": Knob(
        "repetition_penalty", bounded(float, above=0), "对本轮回复里已有 token 的惩罚，1 表示不惩罚"
    ),
    "max_len": Knob("max_len", bounded(int, minimum=1), "每句回复最多的 token 数"),
    "max_history_len": Knob(
        "max_history_len", bounded(int, minimum=1), "上下文里最多的历史句数，双方合计"
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    parser = CliParser(description="与训练好的模型聊天")
    add = parser.add_argument
    add("--device", default="0", help="GPU 编号（默认 %(default)s）；没有 GPU 时用 CPU")
    add("--no_cuda", action="store_true", help="只用 CPU")
    for name, knob in KNOBS.items():
        default = getattr(SamplingOptions, knob.field)
        text = f"{knob.description}（默认 %(default)s）"
        add(f"--{name}", dest=knob.field, type=knob.parse, default=default, metavar="N", help=text)
    add("--log_path", type=Path, default=Path("data/interact.log"), help="日志（默认 %(default)s）")
    add("--vocab_path", type=Path, help="词表文件（默认用模型文件夹里自带的）")
    add("--model_path", default="model/epoch40", help="模型文件夹（默认 %(default)s）")
    add(
        "--save_samples_path",
        dest="save_samples_dir",
        type=Path,
        default=Path("sample/"),
        help="聊天记录 sample.txt 放在哪个文件夹下（默认 %(default)s）",
    )
    add("--seed", type=bounded(int, minimum=0), help="随机种子（默认每次不同）")
    return parser


class Transcript:
    """聊天记录：追加到 sample.txt，每写完一行就交给操作系统，中途被杀也不丢。"""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (directory / "sample.txt").open("a", encoding="utf-8", buffering=1)
        self._file.write(f"聊天记录{datetime.datetime.now()}:\n")

    def add(self, speaker: str, text: str) -> None:
        """记下一行 ``speaker:text``。"""
        self._file.write(f"{speaker}:{text}\n")

    def close(self) -> None:
        """关闭文件。"""
        self._file.close()


class Repl:
    """一次聊天：历史、旋钮、记录，以及每一行输入的处理。"""

    def __init__(
        self, bot: Chatbot, options: SamplingOptions, transcript: Transcript, *, is_terminal: bool
    ) -> None:
        self.bot = bot
        self.options = options
        self.transcript = transcript
        self.is_terminal = is_terminal
        self.history: list[list[int]] = []

    def handle(self, line: str) -> bool:
        """处理一行输入；返回 False 表示用户要结束聊天。"""
        text = line.strip()
        if text.startswith("/"):
            return self._run_command(text)
        if text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        """回答一句，边生成边显示。"""
        self.transcript.add("user", text)
        self.history += encode_utterances(self.bot.tokenizer, [text])
        print("chatbot:", end="", flush=True)
        response, is_truncated = self.bot.reply(
            self.history, self.options, lambda piece: print(piece, end="", flush=True)
        )
        print(flush=True)
        self.transcript.add("chatbot", decode_response(self.bot.tokenizer, response))
        self.history.append(response)
        del self.history[:-MAX_KEPT_UTTERANCES]
        if is_truncated:
            self._tell(
                f"（对话太长，模型只有 {self.bot.max_positions} 个位置，这次没有用上最早的部分）"
            )

    def _run_command(self, text: str) -> bool:
        """执行一条斜线命令。"""
        name, *arguments = text.split()
        if name == "/quit":
            return False
        if name == "/help":
            self._tell(HELP)
        elif name == "/reset":
            self.history.clear()
            self._tell("好，前面的对话已忘掉")
        elif name == "/undo":
            self._tell("已撤回上一轮" if self.history else "还没有可以撤回的对话")
            del self.history[-2:]
        elif name == "/set":
            self._set_knob(arguments)
        else:
            self._tell(f"没有 {name} 这条命令，输入 /help 查看全部命令")
        return True

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
        try:
            changed = dataclasses.replace(self.options, **{knob.field: knob.parse(value)})
            self.bot.check_options(changed)
        except (argparse.ArgumentTypeError, UserError) as error:
            self._tell(f"{name} 没有改：{error}")
            return
        self.options = changed
        self._tell(f"{name} = {getattr(changed, knob.field)}")

    def _tell(self, text: str) -> None:
        """说明文字：终端里直接显示，否则写到标准错误，让标准输出只有回复。"""
        print(text, file=sys.stdout if self.is_terminal else sys.stderr, flush=True)


@contextlib.contextmanager
def suspend_key_ends_chat() -> Iterator[None]:
    """让 Ctrl+Z 像 Ctrl+D 一样结束聊天，而不是把程序挂到后台；没有 SIGTSTP 的系统上不变。"""

    def end(signum: int, frame: object) -> NoReturn:
        raise EOFError

    if not hasattr(signal, "SIGTSTP"):
        yield
        return
    previous = signal.signal(signal.SIGTSTP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, previous)


def read_lines(*, is_terminal: bool) -> Iterator[str]:
    """逐行给出用户的话；终端里带提示符和行编辑，否则一行标准输入是一句。"""
    if not is_terminal:
        yield from sys.stdin
        return
    # 导入 readline 就给 input() 加上行编辑和历史；Windows 没有它，控制台自带这些功能。
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        yield input("user:")


def chat(repl: Repl) -> None:
    """一句接一句地聊，直到输入结束、/quit、Ctrl+D、Ctrl+C 或 Ctrl+Z。"""
    print(GREETING, flush=True)
    with contextlib.closing(repl.transcript), suspend_key_ends_chat():
        try:
            for line in read_lines(is_terminal=repl.is_terminal):
                if not repl.handle(line):
                    break
        except (EOFError, KeyboardInterrupt):
            if repl.is_terminal:
                print()


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    args = build_parser().parse_args(argv)
    configure_logging(args.log_path, console=False)
    quiet_transformers()
    if args.seed is not None:
        seed_everything(args.seed)
    device = select_devices(args.device, no_cuda=args.no_cuda)[0]
    options = SamplingOptions(**{k.field: getattr(args, k.field) for k in KNOBS.values()})
    tokenizer = load_model_tokenizer(args.model_path, args.vocab_path)
    model = load_model(args.model_path).to(device)
    check_vocab_size(model.config.vocab_size, tokenizer, args.model_path)
    bot = Chatbot(model, tokenizer)
    bot.check_options(options)
    logger.info("model=%s device=%s options=%s", args.model_path, device, options)
    chat(Repl(bot, options, Transcript(args.save_samples_dir), is_terminal=sys.stdin.isatty()))
    return 0


if __name__ == "__main__":
    run_cli(main)
