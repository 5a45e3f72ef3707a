"""对话：在终端里与训练好的模型聊天，聊天记录写进 sample/sample.txt。"""

from __future__ import annotations

if __name__ == "__main__":  # 在其余的导入之前：它们要好几秒
    from chitchat.interrupts import guard_startup

    guard_startup()

import argparse
import contextlib
import functools
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from chitchat.architecture import check_vocab_size
from chitchat.chat.options import KNOBS, SamplingOptions, check_max_len
from chitchat.chat.terminal.keyboard import (
    keep_keys,
    no_stop_key,
    stop_key,
    suspend_key_ends_chat,
)
from chitchat.chat.terminal.lines import read_lines
from chitchat.chat.terminal.repl import Repl
from chitchat.chat.transcript import Transcript
from chitchat.checkpoint import (
    check_same_vocab,
    has_tokenizer,
    load_model_tokenizer,
    read_config,
    weights_stamp,
)
from chitchat.cli import CliParser, bounded, configure_logging, run_cli, show
from chitchat.devices import select_devices
from chitchat.errors import UserError
from chitchat.interrupts import exits_on_signal
from chitchat.tokens.tokenizer import vocab_fingerprint
from chitchat.visible import visible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chitchat.chat.chatbot import Chatbot

logger = logging.getLogger("chitchat.interact")

GREETING = "开始和 chatbot 聊天，按 Ctrl+D、Ctrl+C 或 Ctrl+Z 结束，输入 /help 查看命令"

MAX_WEB_CANDIDATES = 32  # 服务器一批最多几行

# 除了采样的旋钮，还有哪些选项影响回复
SETTINGS = (
    "model_path",
    "vocab_path",
    "mmi_model_path",
    "num_candidates",
    "precision",
    "no_cuda",
)


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    parser = CliParser(description="与训练好的模型聊天")
    add = parser.add_argument
    add("--device", default="0", help="GPU 编号（默认 %(default)s）；没有 GPU 时用 CPU")
    add("--no_cuda", action="store_true", help="只用 CPU")
    for name, knob in KNOBS.items():
        add(f"--{name}", dest=knob.field, type=knob.parse, default=knob.default, metavar="N",
            help=f"{knob.description}（默认 %(default)s）")  # fmt: skip
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
    add("--seed", type=bounded(int, minimum=0, maximum=2**64 - 1), help="随机种子（默认每次不同）")
    add("--greedy", action="store_true", help="总取最可能的 token，不采样")
    add("--precision", choices=["auto", "fp32", "bf16", "int8"], default="auto",
        help="权重的精度；auto 在 x86 的 CPU 上是 int8，在 GPU 上是 bf16，没有它们就用 fp32"
        "（默认 %(default)s）")  # fmt: skip
    add("--num_candidates", type=bounded(int, minimum=1, maximum=1000), default=1,
        metavar="N", help="每次生成 N 个候选再挑一个，最多 1000（默认 %(default)s）")  # fmt: skip
    add("--mmi_model_path", metavar="DIR",
        help="train.py --train_mmi 的反向模型，用来挑选候选；默认按候选自身的概率")  # fmt: skip
    add(
        "--no_input_history",
        action="store_true",
        help="不把在终端里打过的话记进 --save_samples_path 下的 .history（按 ↑ 找得到它们）",
    )
    add("--debug", action="store_true", help="与 --num_candidates 同用：列出每个候选和它的分数")
    add("--input_path", type=Path, metavar="FILE",
        help="不聊天，给文件里的每段对话接上一句回复；格式与语料相同")  # fmt: skip
    add("--output_path", type=Path, metavar="FILE",
        help="与 --input_path 同用：结果写到哪里，不能已经存在；"
        "中断后用同样的选项再运行会接着做")  # fmt: skip
    add("--report", action="store_true",
        help="与 --input_path 同用：每段的最后一句当参考答案，完成后给出评价")  # fmt: skip
    add_web_arguments(parser)
    return parser


def add_web_arguments(parser: argparse.ArgumentParser) -> None:
    """服务器的参数。"""
    add = parser.add_argument
    add("--web", action="store_true", help="不在终端里聊，开一个服务器：网页和 OpenAI 格式的接口")
    add("--host", default="127.0.0.1", help="与 --web 同用：在哪个地址听，默认只有本机连得上"
        "（默认 %(default)s）")  # fmt: skip
    add("--port", type=bounded(int, minimum=0, maximum=65535), default=8000, metavar="N",
        help="与 --web 同用：端口，0 表示随便一个空的（默认 %(default)s）")  # fmt: skip
    add("--api_key", metavar="KEY", help="与 --web 同用：接口要这把钥匙才能用；"
        "别的机器也连得上时必须有（默认不要）")  # fmt: skip
    add("--cors", metavar="ORIGIN", help="与 --web 同用：许可哪个网站的网页使用接口，"
        "例如 http://localhost:3000，* 表示全部（默认都不许）")  # fmt: skip
    add("--no_chat_log", action="store_true", help="与 --web 同用：不写聊天记录"
        "（默认写在 --save_samples_path 下的 web/ 里，每天一个文件）")  # fmt: skip


def model_paths(args: argparse.Namespace) -> list[str]:
    """要读的模型：对话的，有反向模型时再加上它。"""
    return [args.model_path, *([] if args.mmi_model_path is None else [args.mmi_model_path])]


def start_loading(
    args: argparse.Namespace, tokenizer: Tokenizer, options: SamplingOptions
) -> Future[Chatbot]:
    """在后台读模型，确认旋钮与它相配；读的时候用户已经可以打字。"""

    def load() -> Chatbot:
        import torch

        from chitchat.chat.chatbot import Chatbot
        from chitchat.chat.engine import MAX_THREADS, choose_precision
        from chitchat.chat.loading import load_engine

        device = select_devices(args.device, no_cuda=args.no_cuda)[0]
        precision = choose_precision(args.precision, device)
        if args.input_path is None:
            torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
        engines = []
        for path in model_paths(args):
            engines.append(load_engine(path, precision=precision, device=device))
            check_vocab_size(engines[-1].vocab_size, tokenizer, path)
        logger.info("model=%s device=%s precision=%s", args.model_path, device, precision)
        bot = Chatbot(
            engines[0],
            tokenizer,
            backward_engine=engines[1] if args.mmi_model_path is not None else None,
            num_candidates=args.num_candidates,
        )
        bot.check_options(options)
        return bot

    executor = ThreadPoolExecutor(max_workers=1)
    loading = executor.submit(load)
    executor.shutdown(wait=False)
    return loading


def check_arguments(args: argparse.Namespace) -> None:
    """不必等模型就能看出的矛盾，在问候之前说清楚。"""
    if (args.input_path is None) != (args.output_path is None):
        raise UserError("--input_path 与 --output_path 要一起给：前者是对话，后者是写结果的文件")
    if args.input_path is not None and not args.input_path.exists():
        raise UserError(
            f"找不到 --input_path {args.input_path}：请写入一行一句、空行分隔的对话，或改正路径"
        )
    if args.report and args.input_path is None:
        raise UserError("--report 要与 --input_path、--output_path 同用")
    check_web_arguments(args)
    if args.mmi_model_path is not None and args.num_candidates == 1:
        raise UserError("--mmi_model_path 用来挑选候选：请同时给出 --num_candidates，例如 5")
    if args.debug and args.num_candidates == 1:
        raise UserError("--debug 列出各个候选：请同时给出 --num_candidates，例如 5")
    if args.greedy and args.num_candidates > 1:
        raise UserError("--greedy 的各个候选都相同：请去掉它，或去掉 --num_candidates")


def check_web_arguments(args: argparse.Namespace) -> None:
    """服务器的参数之间的矛盾，和缺的包。"""
    if not args.web:
        given = [name for name in ("api_key", "cors") if getattr(args, name) is not None]
        if given:
            raise UserError(f"--{given[0]} 要与 --web 同用")
        return
    if args.input_path is not None:
        raise UserError("--web 与 --input_path 是两件事：请去掉其中一个")
    if args.num_candidates > MAX_WEB_CANDIDATES:
        raise UserError(f"--web 时 --num_candidates 最多 {MAX_WEB_CANDIDATES}，请改小")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(
            "--web 要用 starlette 和 uvicorn：请先运行 pip install starlette uvicorn"
        ) from None


def check_models(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """不必读权重就能看出的毛病：位置不够，词表不同。"""
    for path in model_paths(args):
        config = read_config(path)
        if "vocab_size" in config:
            check_vocab_size(config["vocab_size"], tokenizer, path)
        if isinstance(config.get("n_positions"), int):
            check_max_len(args.max_len, config["n_positions"])
    if args.vocab_path is not None:
        remedy = "请去掉 --vocab_path，用模型自带的"
        check_same_vocab(args.model_path, tokenizer, args.vocab_path, remedy)
    if args.mmi_model_path is None or not has_tokenizer(args.mmi_model_path):
        return
    backward = load_model_tokenizer(args.mmi_model_path, None)
    if vocab_fingerprint(backward) != vocab_fingerprint(tokenizer):
        raise UserError(
            f"--mmi_model_path {args.mmi_model_path} 的词表与对话模型所用的不同："
            "两个模型要用同一份词表训练"
        )


def read_input(path: Path) -> Iterator[list[str]]:
    """--input_path 里的对话。"""
    from chitchat.corpus.reader import read_dialogues  # 只有 --input_path 用得到

    try:
        yield from read_dialogues(path)
    except UserError as error:
        raise UserError(
            f"读不懂 --input_path：{error}（这里只能自动认格式和编码，"
            "认错时请另存为 UTF-8、一行一句、空行分隔的文本）"
        ) from error


@exits_on_signal()
def serve(args: argparse.Namespace, tokenizer: Tokenizer, options: SamplingOptions) -> None:
    """开服务器，直到 Ctrl+C 或 SIGTERM。"""
    from chitchat.chat.web.api import Service
    from chitchat.chat.web.chat_log import ChatLog
    from chitchat.chat.web.scheduler import Scheduler
    from chitchat.chat.web.server import Access, open_socket
    from chitchat.chat.web.server import serve as serve_until_stopped

    access = Access(args.api_key, args.cors)
    access.check(args.host)
    chat_log = None if args.no_chat_log else ChatLog(args.save_samples_dir / "web")
    listener = open_socket(args.host, args.port)  # 占住端口，再花时间读模型
    bot = start_loading(args, tokenizer, options).result()
    service = Service(
        bot,
        Scheduler(bot),
        options,
        model_id=Path(args.model_path).resolve().name,
        rng=random.Random(args.seed),
        chat_log=chat_log,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    show(f"网页 {url} ，接口 {url}/v1 ，按 Ctrl+C 停下")
    serve_until_stopped(service, listener, host=args.host, access=access)


def answer_whole_file(
    args: argparse.Namespace, tokenizer: Tokenizer, options: SamplingOptions
) -> None:
    """给 --input_path 里的每段对话接上一句回复。"""
    loading = start_loading(args, tokenizer, options)
    from chitchat.chat.whole_files.answers import answer_file  # 会导入 torch，别的用法不必等

    report = answer_file(
        loading,
        lambda: read_input(args.input_path),
        args.output_path,
        options,
        seed=args.seed,
        with_report=args.report,
        settings={
            **{name: getattr(args, name) for name in SETTINGS},
            "weights": [weights_stamp(path) for path in model_paths(args)],
        },
    )
    show(report, end="")


def chat(args: argparse.Namespace, tokenizer: Tokenizer, options: SamplingOptions) -> None:
    """一句接一句地聊，直到输入结束、/quit、Ctrl+D、Ctrl+C 或 Ctrl+Z。"""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    transcript = Transcript(args.save_samples_dir)
    show(GREETING)
    history_path = None if args.no_input_history else args.save_samples_dir / ".history"
    # 先备好提示符，再在后台读模型：两边同时导入会互相等。
    lines = read_lines(is_terminal=is_terminal, history_path=history_path)
    loading = start_loading(args, tokenizer, options)
    repl = Repl(
        tokenizer,
        loading,
        options,
        transcript,
        random.Random(args.seed),
        show=functools.partial(show, end=""),
        # 不在终端里时，标准输出除了问候只有回复。
        tell=show if is_terminal else lambda text: print(visible(text), file=sys.stderr),
        stop_key=stop_key if is_terminal else no_stop_key,
        is_debug=args.debug,
    )
    keys = keep_keys() if is_terminal else contextlib.nullcontext()
    with (
        contextlib.closing(transcript),
        suspend_key_ends_chat(),
        contextlib.suppress(EOFError, KeyboardInterrupt),
        keys,
    ):
        for line in lines:
            if not repl.handle(line):
                break
    loading.result()  # 一句话也没说时，读模型的毛病在这里报告


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    parser = build_parser()
    args = parser.parse_args(argv)
    is_default_log = args.log_path is parser.get_default("log_path")
    configure_logging(args.log_path, console=False, is_default=is_default_log)
    check_arguments(args)
    options = SamplingOptions(
        greedy=args.greedy, **{k.field: getattr(args, k.field) for k in KNOBS.values()}
    )
    tokenizer = load_model_tokenizer(args.model_path, args.vocab_path)
    check_models(args, tokenizer)
    logger.info("options=%s", options)
    if args.web:
        serve(args, tokenizer, options)
    elif args.input_path is not None:
        answer_whole_file(args, tokenizer, options)
    else:
        chat(args, tokenizer, options)
    return 0


if __name__ == "__main__":
    run_cli(main)
