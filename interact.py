"""对话：在终端里与训练好的模型聊天，聊天记录写进 sample/sample.txt。"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from chitchat.checkpoint import (
    check_vocab_size,
    load_engine,
    load_model_tokenizer,
    read_config,
)
from chitchat.knobs import KNOBS, SamplingOptions, check_max_len
from chitchat.runtime import (
    CliParser,
    UserError,
    atomic_file,
    bounded,
    configure_logging,
    run_cli,
    select_devices,
)
from chitchat.tokenizer import decode_response, encode_utterances

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chitchat.decoding import Chatbot

logger = logging.getLogger("chitchat.interact")

GREETING = "开始和 chatbot 聊天，按 Ctrl+D、Ctrl+C 或 Ctrl+Z 结束，输入 /help 查看命令"
HELP = """\
/help           显示这份说明
/reset          忘掉前面的对话，重新开始
/undo           撤回上一轮（你的一句和它的回复）
/retry          对你上一句重新回答
/show           显示模型现在看得到的历史
/save 文件      把这次聊天按语料的格式写进文件
/set            显示各旋钮现在的值
/set 名字 值    改一个旋钮，例如 /set temperature 0.8
/quit           结束聊天"""
MAX_KEPT_UTTERANCES = 1000  # 历史只为 /undo 多留一些，聊多久内存都不涨


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
    add("--greedy", action="store_true", help="总取最可能的 token，不采样")
    add("--precision", choices=["auto", "fp32", "bf16", "int8"], default="auto",
        help="权重的精度；auto 在 CPU 上是 int8，在 GPU 上是 bf16（默认 %(default)s）")  # fmt: skip
    add("--num_candidates", type=bounded(int, minimum=1), default=1, metavar="N",
        help="每次生成 N 个候选再挑一个（默认 %(default)s）")  # fmt: skip
    add("--mmi_model_path", metavar="DIR",
        help="反向模型（train.py --train_mmi），用来挑选候选；默认按候选自身的概率挑选")  # fmt: skip
    add("--debug", action="store_true", help="列出每个候选和它的分数")
    add("--input_path", type=Path, metavar="FILE",
        help="不聊天，给文件里的每段对话接上一句回复；格式与语料相同")  # fmt: skip
    add("--output_path", type=Path, metavar="FILE",
        help="与 --input_path 同用：结果写到哪里；中断后再运行会接着做")  # fmt: skip
    add("--report", action="store_true",
        help="与 --input_path 同用：每段的最后一句当参考答案，完成后给出评价")  # fmt: skip
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
        self,
        tokenizer: Tokenizer,
        loading: Future[Chatbot],
        options: SamplingOptions,
        transcript: Transcript,
        *,
        is_terminal: bool,
        is_debug: bool = False,
    ) -> None:
        """loading 是正在后台读入的模型，第一次要回答时才等它。"""
        self.tokenizer = tokenizer
        self.loading = loading
        self.options = options
        self.transcript = transcript
        self.is_terminal = is_terminal
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
        if text.startswith("/"):
            return self._run_command(text)
        if text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        """回答一句，边生成边显示。"""
        self.transcript.add("user", text)
        self._remember(text, encode_utterances(self.tokenizer, [text])[0])
        print("chatbot:", end="", flush=True)
        response, is_truncated = self.bot.reply(
            self.history, self.options, lambda piece: print(piece, end="", flush=True)
        )
        print(flush=True)
        reply = decode_response(self.tokenizer, response)
        self.transcript.add("chatbot", reply)
        self._remember(reply, response)
        if self.is_debug:
            self._show_candidates()
        if is_truncated:
            self._tell(
                f"（对话太长，模型只有 {self.bot.max_positions} 个位置，这次没有用上最早的部分）"
            )

    def _remember(self, text: str, token_ids: list[int]) -> None:
        self.history.append(token_ids)
        self.texts.append(text)
        self._forget(slice(None, -MAX_KEPT_UTTERANCES))

    def _forget(self, part: slice) -> None:
        del self.history[part], self.texts[part]

    def _show_candidates(self) -> None:
        """列出上一次的全部候选，选中的在最前。"""
        for candidate in self.bot.last_candidates:
            backward = "" if candidate.backward is None else f" 反向 {candidate.backward:7.3f}"
            text = decode_response(self.tokenizer, candidate.token_ids)
            self._tell(f"  正向 {candidate.likelihood:7.3f}{backward}  {text}")

    def _run_command(self, text: str) -> bool:
        """执行一条斜线命令。"""
        name, *arguments = text.split()
        if name == "/quit":
            return False
        if name == "/help":
            self._tell(HELP)
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
            self._save(arguments)
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

    def _save(self, arguments: list[str]) -> None:
        """把这次聊天写成一段语料。"""
        if len(arguments) != 1 or not self.texts:
            self._tell("用法：/save 文件" if self.texts else "还没有可以保存的对话")
            return
        path = Path(arguments[0])
        try:
            with atomic_file(path) as partial:
                partial.write_text("\n".join(self.texts) + "\n", encoding="utf-8")
        except OSError as error:
            self._tell(f"没有写成 {path}：{error.strerror or error}")
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


def start_loading(args: argparse.Namespace, tokenizer: Tokenizer) -> Future[Chatbot]:
    """在后台读模型；读的时候用户已经可以打字。"""

    def load() -> Chatbot:
        import torch

        from chitchat.decoding import Chatbot
        from chitchat.engine import MAX_THREADS, choose_precision

        device = select_devices(args.device, no_cuda=args.no_cuda)[0]
        precision = choose_precision(args.precision, device)
        if args.input_path is None:
            torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
        engine, backward = (
            load_engine(path, precision=precision, device=device) if path else None
            for path in (args.model_path, args.mmi_model_path)
        )
        check_vocab_size(engine.vocab_size, tokenizer, args.model_path)
        logger.info("model=%s device=%s precision=%s", args.model_path, device, precision)
        return Chatbot(
            engine,
            tokenizer,
            backward_engine=backward,
            num_candidates=args.num_candidates,
            seed=args.seed,
        )

    executor = ThreadPoolExecutor(max_workers=1)
    loading = executor.submit(load)
    executor.shutdown(wait=False)
    return loading


def check_arguments(args: argparse.Namespace) -> None:
    """不必等模型就能看出的矛盾，在问候之前说清楚。"""
    if (args.input_path is None) != (args.output_path is None):
        raise UserError("--input_path 与 --output_path 要一起给：前者是对话，后者是写结果的文件")
    if args.report and args.input_path is None:
        raise UserError("--report 要与 --input_path、--output_path 同用")
    if args.mmi_model_path is not None and args.num_candidates == 1:
        raise UserError("--mmi_model_path 用来挑选候选：请同时给出 --num_candidates，例如 5")


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    args = build_parser().parse_args(argv)
    configure_logging(args.log_path, console=False)
    check_arguments(args)
    options = SamplingOptions(
        greedy=args.greedy, **{k.field: getattr(args, k.field) for k in KNOBS.values()}
    )
    tokenizer = load_model_tokenizer(args.model_path, args.vocab_path)
    for path in filter(None, (args.model_path, args.mmi_model_path)):
        config = read_config(path)
        if "vocab_size" in config:
            check_vocab_size(config["vocab_size"], tokenizer, path)
        if "n_positions" in config:
            check_max_len(args.max_len, config["n_positions"])
    logger.info("options=%s", options)
    loading = start_loading(args, tokenizer)
    if args.input_path is not None:
        from chitchat.replies import answer_file  # 会导入 torch，聊天时不必等

        print(
            answer_file(
                loading,
                args.input_path,
                args.output_path,
                options,
                seed=args.seed,
                with_report=args.report,
            ),
            end="",
        )
        return 0
    repl = Repl(
        tokenizer,
        loading,
        options,
        Transcript(args.save_samples_dir),
        is_terminal=sys.stdin.isatty(),
        is_debug=args.debug,
    )
    chat(repl)
    return 0


if __name__ == "__main__":
    run_cli(main)
