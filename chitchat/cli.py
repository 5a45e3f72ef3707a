"""三个脚本共用的命令行：参数类型、日志、信号，把异常变成退出码。

导入时不加载 torch，``--help`` 因此立刻显示。
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from chitchat.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from chitchat.files import naming_file
from chitchat.interrupts import exit_at_once
from chitchat.visible import one_visible_line, visible

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


MAX_INT = 2**53  # 再大的整数，乘除时就不准了，也没有用处


class CliParser(argparse.ArgumentParser):
    """出错时只在标准错误输出一句中文，并以 2 退出；参数名不能缩写。"""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """报告命令行写错之处，例如未知的参数或不合法的取值。"""
        for english, chinese in (
            ("unrecognized arguments:", "没有这样的参数："),
            ("the following arguments are required:", "缺少参数："),
            ("expected one argument", "后面缺少取值"),
            ("ignored explicit argument", "不需要取值，得到"),
            ("invalid choice:", "没有这个选项："),
            ("choose from", "可选"),
            ("invalid int value:", "应为整数，得到"),
            ("argument ", "参数 "),
        ):
            message = message.replace(english, chinese)
        message = visible(message)
        self.exit(EXIT_BAD_INPUT, f"错误：{message}。用 python {self.prog} --help 查看全部参数\n")


def bounded(
    kind: Callable[[str], float],
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Callable[[str], float]:
    """构造 argparse 的 ``type=``：``int`` 或 ``float``，并检查取值范围。

    Args:
        kind: ``int`` 或 ``float``。
        minimum: 允许的最小值（含）；None 表示不限。
        above: 必须大于的值（不含）；None 表示不限。
        maximum: 允许的最大值（含）；None 表示不限，整数不超过 MAX_INT。

    Returns:
        把字符串变成数值的函数；不合法时抛出 ``argparse.ArgumentTypeError``。
    """
    if kind is int and maximum is None:
        maximum = MAX_INT
    limits = [
        f"{text} {limit:g}"
        for text, limit in (("不小于", minimum), ("大于", above), ("不大于", maximum))
        if limit is not None and limit != MAX_INT
    ]
    wanted = ("整数" if kind is int else "数值") + ("，" if limits else "") + "且".join(limits)

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        # NaN 与任何数比较都为假，所以条件写成“全部成立”而不是“有一条不成立”。
        is_valid = (
            (minimum is None or value >= minimum)
            and (above is None or value > above)
            and (maximum is None or value <= maximum)
            and value == value
            and abs(value) != float("inf")
        )
        if kind is int and value == value and abs(value) > MAX_INT >= maximum:
            raise argparse.ArgumentTypeError(
                f"应为绝对值不超过 {MAX_INT} 的整数，得到 {text[:80]!r}"
            )
        if not is_valid:
            raise argparse.ArgumentTypeError(f"应为{wanted}，得到 {text[:80]!r}")
        return value

    return parse


def run_cli(main: Callable[[], int]) -> NoReturn:
    """运行脚本的 ``main``，把异常变成退出码：0 完成，2 用法或输入有误，130 被中断。"""
    _reopen_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # 旧的 Windows 控制台不是 UTF-8：宁可显示一个问号，也不要因为一个 emoji 退出。
        if hasattr(stream, "reconfigure"):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"  # 没有设语言，终端多是 UTF-8
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="replace")
    is_guarded = signal.getsignal(signal.SIGINT) is exit_at_once
    try:
        if is_guarded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
    except UserError as error:
        code = _complain(str(error))
    except BrokenPipeError:
        code = 0  # 例如接在 | head 前面：读的人走了，不算出错
    except OSError as error:
        name = error.filename or _nameless_file()
        reason = f"读写{name and f' {name} '}失败：{error.strerror or error}"
        code = _complain(f"{reason}，请检查路径、权限和磁盘空间")
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if is_guarded:  # 退出时还要等后台的线程，又按 Ctrl+C 就不等了
        signal.signal(signal.SIGINT, exit_at_once)
    _drop_unwritable_output()
    sys.exit(code)


def _drop_unwritable_output() -> None:
    """标准输出写不出去时，缓冲里剩下的不要了：不然退出时 Python 再写一次，把退出码改成 120。"""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nameless_file() -> str:
    """没有文件名的 OSError 说的是什么：自己读写的都由 naming_file 补上了名字，别的多半看不出来。"""
    try:
        Path.cwd()
    except FileNotFoundError:
        return "当前文件夹（已经被删去）"
    return ""


def _reopen_closed_streams() -> None:
    """启动时就关着的标准输入、输出、错误（``2>&-``，有些服务管理器）接到空设备上。

    不然进度条和日志写不出去；第一个打开的数据文件还会得到它们的描述符，混进别人写的东西。
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # 得到最小的空着的，就是它
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def show(text: str, *, end: str = "\n") -> None:
    """在标准输出显示，立刻写出去；写不出去时，异常里有它的名字。"""
    with naming_file("标准输出"):
        print(visible(text), end=end, flush=True)  # noqa: T201


def _complain(sentence: str) -> int:
    """在标准错误输出一句话，返回表示输入有误的退出码。"""
    sys.stderr.write(f"错误：{visible(sentence)}\n")
    return EXIT_BAD_INPUT


def _warn(sentence: str) -> None:
    """在标准错误提醒一句，程序照常运行。"""
    tqdm.write(f"警告：{visible(sentence)}", file=sys.stderr)


def notify(sentence: str) -> None:
    """在标准错误告诉用户一件他没有要求、但应当知道的事。"""
    tqdm.write(f"提示：{visible(sentence)}", file=sys.stderr)


class _LineFormatter(logging.Formatter):
    """一条日志一行，不管里面的文字是什么；程序自己的 traceback 仍分行。"""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return one_visible_line(super().formatMessage(record))

    def formatException(self, ei: tuple) -> str:  # noqa: N802
        return visible(super().formatException(ei))


class _TqdmHandler(logging.StreamHandler):
    """写日志时先让开进度条，日志行不会与进度条混在一行；终端上有进度条，就不写进度的行。"""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_progress", False) and sys.stderr.isatty():
            return
        with contextlib.suppress(OSError):  # 终端已经没了（ssh 断开）；日志文件里都有
            tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """日志文件；写不进去时只提醒一次，程序照常运行。"""

    is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.is_failing:
            self.is_failing = True
            _warn(f"日志 {self.baseFilename} 写不进去（{sys.exc_info()[1]}）：程序照常运行")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # 磁盘满时，关闭也会再写一次
            super().close()


def configure_logging(
    log_path: Path | None, *, console: bool = True, is_default: bool = False
) -> None:
    """让 ``chitchat`` 及其子 logger 的 INFO 日志进入控制台和文件。

    只设置本项目的 logger，不动根 logger；重复调用会先去掉上一次的输出。

    Args:
        log_path: 日志文件，追加写入，父目录会自动创建；None 表示不写文件。
        console: 是否同时输出到标准错误。
        is_default: log_path 不是用户指定的：打不开时只提醒，不写日志文件。

    Raises:
        OSError: 用户指定的日志打不开。
    """
    logger = logging.getLogger("chitchat")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_TqdmHandler()] if console else []
    if log_path is not None:
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(log_path, encoding="utf-8"))
        except OSError as error:
            if not is_default:
                raise
            reason = error.strerror or error
            _warn(f"日志 {log_path} 打不开（{reason}），这次不写日志；可用 --log_path 换个地方")
    for handler in handlers or [logging.NullHandler()]:
        handler.setFormatter(_LineFormatter(LOG_FORMAT))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def quiet_transformers() -> None:
    """不显示 transformers 的进度条和 WARNING：它们说的是它自己的默认值，与用户无关。"""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def stop_signal_numbers() -> list[int]:
    """要求程序停下的信号：Ctrl+C、SIGTERM，以及 ssh 断开时的 SIGHUP（Windows 没有）。"""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """收到停下的信号时先记下，训练循环存好状态再停；第二次 Ctrl+C 立刻停。

    用 nohup 启动时 SIGHUP 是不理会的，那就仍不理会。
    """
    received = []

    def remember(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and signum in received:
            raise KeyboardInterrupt
        received.append(signum)
        with contextlib.suppress(RuntimeError):  # 正好打断了另一行日志
            logging.getLogger("chitchat").warning(
                "saving and stopping; press Ctrl+C again to stop at once"
            )

    previous = {}
    for signum in stop_signal_numbers():
        is_hang_up = signum not in (signal.SIGINT, signal.SIGTERM)
        if not (is_hang_up and signal.getsignal(signum) == signal.SIG_IGN):
            previous[signum] = signal.signal(signum, remember)
    try:
        yield lambda: bool(received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
