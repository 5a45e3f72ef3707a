"""运行环境：退出码、参数检查、日志、设备、种子、原子写文件。"""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from chitchat.cli import CliParser, bounded, configure_logging, run_cli, stop_signals
from chitchat.devices import seed_everything, select_devices
from chitchat.errors import UserError
from chitchat.files import atomic_directory, atomic_file


@pytest.fixture
def _project_logger() -> Iterator[None]:
    """测试后把 chitchat 的 logger 恢复原样。"""
    logger = logging.getLogger("chitchat")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    configure_logging(None, console=False)
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers


def returning(outcome: int | BaseException) -> Callable[[], int]:
    def main() -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return main


@pytest.mark.parametrize(
    ("outcome", "code", "on_stderr"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (UserError("词表里没有 [SEP]"), 2, "词表里没有 [SEP]"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x/y.txt"), 2, "x/y.txt"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "读写失败：No space left on device"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(2), 2, ""),
    ],
)
def test_exit_code_and_one_sentence(outcome, code, on_stderr, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(returning(outcome))
    out, err = capsys.readouterr()
    assert stop.value.code == code
    assert out == ""
    assert on_stderr in err
    assert err.count("\n") == bool(on_stderr)


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(returning(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--nope"], ["--nope"]),
        (["--topk"], ["--topk"]),
        (["--topk", "-1"], ["--topk", "-1", "整数，不小于 0"]),
        (["--topk", "2.5"], ["--topk", "2.5", "整数"]),
        (["--optimizer", "sgd"], ["--optimizer", "sgd", "adamw", "muon"]),
        (["--no_cuda=1"], ["--no_cuda", "1"]),
        (["--top", "1"], ["--top"]),
    ],
)
def test_wrong_usage_is_one_chinese_sentence_with_exit_code_2(argv, named, capsys):
    parser = CliParser(prog="train.py")
    parser.add_argument("--topk", type=bounded(int, minimum=0))
    parser.add_argument("--topp", type=float)
    parser.add_argument("--optimizer", choices=["adamw", "muon"])
    parser.add_argument("--no_cuda", action="store_true")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("错误：")
    for name in [*named, "python train.py --help"]:
        assert name in err
    for english in ("expected", "argument", "choice", "choose", "explicit", "could match"):
        assert english not in err


AT_LEAST_1 = bounded(int, minimum=1)
ABOVE_0 = bounded(float, above=0)
FROM_0_TO_1 = bounded(float, minimum=0, maximum=1)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (AT_LEAST_1, "1", 1),
        (AT_LEAST_1, "150", 150),
        (ABOVE_0, "1e-9", 1e-9),
        (FROM_0_TO_1, "0", 0.0),
        (FROM_0_TO_1, "1", 1.0),
        (bounded(int), "-5", -5),
    ],
)
def test_value_inside_the_bounds_is_parsed(parse, text, value):
    assert parse(text) == value
    assert isinstance(parse(text), type(value))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "abc", "", "1,5", "-0.1", "1.0001"])
@pytest.mark.parametrize("kind", [int, float])
def test_value_outside_the_bounds_is_refused_and_quoted(kind, text):
    parse = bounded(kind, minimum=0, maximum=1)
    with pytest.raises(ArgumentTypeError, match=repr(text)) as error:
        parse(text)
    assert "不小于 0且不大于 1" in str(error.value)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1"])
def test_open_bound_is_not_allowed_itself(text):
    with pytest.raises(ArgumentTypeError, match="数值，大于 0"):
        ABOVE_0(text)


@pytest.mark.parametrize("text", ["nan", "inf", "abc"])
def test_number_without_bounds_must_still_be_finite(text):
    with pytest.raises(ArgumentTypeError, match=f"应为数值，得到 '{text}'"):
        bounded(float)(text)


@pytest.mark.usefixtures("_project_logger")
def test_log_file_gets_each_record_once_and_the_root_logger_is_untouched(tmp_path, capsys):
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    path = tmp_path / "new" / "train.log"
    configure_logging(path)
    configure_logging(path)
    logging.getLogger("chitchat.train").info("epoch=%d", 3)
    logging.getLogger("transformers").info("not ours")
    configure_logging(None, console=False)
    logging.getLogger("chitchat.train").info("too late")
    written = path.read_text(encoding="utf-8")
    assert written.endswith(" INFO epoch=3\n")
    assert written.count("\n") == 1
    assert capsys.readouterr().err.count("epoch=3") == 1
    assert (root.level, list(root.handlers)) == before


@pytest.mark.usefixtures("_project_logger")
@pytest.mark.parametrize("name", ["occupied/x.log", "folder"])
def test_default_log_that_cannot_be_opened_is_one_warning(name, tmp_path, capsys):
    (tmp_path / "occupied").write_text("x")
    (tmp_path / "folder").mkdir()
    configure_logging(tmp_path / name, is_default=True)
    logging.getLogger("chitchat.train").info("epoch=%d", 3)
    err = capsys.readouterr().err
    assert err.startswith("警告：")
    assert err.count("警告") == 1
    for word in (name, "--log_path", "epoch=3"):
        assert word in err
    configure_logging(tmp_path / name, console=False, is_default=True)
    with pytest.raises(OSError, match=r"directory|exists"):
        configure_logging(tmp_path / name)


@pytest.mark.usefixtures("_project_logger")
def test_full_disk_under_the_log_is_one_warning(monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    configure_logging(Path("/dev/full"))
    for epoch in range(3):
        logging.getLogger("chitchat.train").info("epoch=%d", epoch)
    configure_logging(None, console=False)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("警告") == 1
    assert "/dev/full" in err
    assert all(f"epoch={epoch}" in err for epoch in range(3))


@pytest.mark.parametrize(
    ("device", "no_cuda", "num_gpus", "expected"),
    [
        ("0", False, 0, ["cpu"]),
        ("0,1,7", False, 0, ["cpu"]),
        ("0,1", True, 2, ["cpu"]),
        ("0", False, 1, ["cuda:0"]),
        ("1,0", False, 2, ["cuda:1", "cuda:0"]),
        (" 0 , 2 ", False, 3, ["cuda:0", "cuda:2"]),
    ],
)
def test_device_numbers_become_devices(device, no_cuda, num_gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert select_devices(device, no_cuda=no_cuda) == [torch.device(name) for name in expected]


@pytest.mark.parametrize(
    ("device", "named"),
    [
        *((text, repr(text)) for text in ("", "a", "-1", "0,", "0;1", "cuda:0", "0,0", "0,00")),
        ("2", "GPU 2 "),
        ("0,3,5", "GPU 3,5 "),
    ],
)
def test_wrong_device_is_named_with_the_way_out(device, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device") as error:
        select_devices(device, no_cuda=False)
    assert named in str(error.value)
    assert "--no_cuda" in str(error.value)


@pytest.mark.parametrize(
    ("device", "advice"),
    [
        ("cuda:1", "是不是想写 --device 1；"),
        ("0，1", "是不是想写 --device 0,1；"),
        ("0 1", "是不是想写 --device 0,1；"),
        ("gpu0,gpu1", "是不是想写 --device 0,1；"),
        ("cpu", "例如 --device 0"),
        ("-1", "例如 --device 0"),
        ("1,0,01", "GPU 1 写了不止一次"),
        ("7", "请改用 --device 1，"),
    ],
)
def test_wrong_device_says_how_to_write_it(device, advice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as error:
        select_devices(device, no_cuda=False)
    assert advice in str(error.value)
    assert "只用 CPU 请加 --no_cuda" in str(error.value)


def test_devices_hidden_by_the_environment_are_mentioned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        select_devices("3", no_cuda=False)


def test_first_ctrl_c_after_sigterm_still_waits_for_the_state():
    with stop_signals() as should_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_seed_fixes_python_numpy_and_torch():
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw(7)
    assert draw(7) == first
    assert all(a != b for a, b in zip(draw(2**32 + 8), first, strict=True))


@pytest.mark.parametrize("old", [None, "old"])
def test_file_is_replaced_whole(tmp_path, old):
    path = tmp_path / "new" / "train.pkl"
    if old is not None:
        path.parent.mkdir()
        path.write_text(old)
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.exists() == (old is not None)
    assert path.read_text() == "new"
    assert [item.name for item in path.parent.iterdir()] == ["train.pkl"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_file_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "train.pkl"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_folder(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)


def read_folder(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.mark.parametrize("has_old", [False, True])
def test_folder_is_replaced_whole(tmp_path, has_old):
    path = tmp_path / "model" / "epoch1"
    if has_old:
        write_folder(path, config="old", stale="old")
    with atomic_directory(path) as partial:
        write_folder(partial, config="new")
        assert path.exists() == has_old
    assert read_folder(path) == {"config": "new"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "epoch1"
    write_folder(path, config="old", weights="old")
    with pytest.raises(error), atomic_directory(path) as partial:  # noqa: PT012
        write_folder(partial, config="half")
        raise error
    assert read_folder(path) == {"config": "old", "weights": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    """Windows 上杀毒软件常常占住新文件夹：换名失败时，旧的已经移开，必须移回来。"""
    path = tmp_path / "epoch1"
    write_folder(path, config="old")
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise PermissionError(errno.EACCES, "Access is denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(PermissionError), atomic_directory(path) as partial:
        write_folder(partial, config="new")
    assert read_folder(path) == {"config": "old"}


@pytest.mark.parametrize("name", [".epoch1.part", ".epoch1.old"])
def test_leftovers_of_a_killed_run_do_not_stop_the_next(tmp_path, name):
    (tmp_path / "epoch1").mkdir()
    leftover = tmp_path / name
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with atomic_directory(tmp_path / "epoch1") as partial:
        (partial / "new").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch1"]
    assert [path.name for path in (tmp_path / "epoch1").iterdir()] == ["new"]


def test_folder_set_aside_by_a_killed_run_comes_back_when_the_next_one_fails(tmp_path):
    set_aside = tmp_path / ".epoch1.old"
    set_aside.mkdir()
    (set_aside / "old").write_text("x")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "epoch1"):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "epoch1").iterdir()] == ["old"]


def test_file_is_written_through_a_link_and_the_link_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "real.pkl").write_text("old")
    link = tmp_path / "train.pkl"
    link.symlink_to("disk/real.pkl")
    with atomic_file(link) as partial:
        partial.write_text("new")
        assert partial.parent == disk
    assert link.is_symlink()
    assert (disk / "real.pkl").read_text() == "new"
    assert [path.name for path in disk.iterdir()] == ["real.pkl"]


def test_folder_is_written_through_a_link_and_the_link_stays(tmp_path):
    disk = tmp_path / "disk"
    write_folder(disk, config="old", stale="old")
    link = tmp_path / "model" / "epoch1"
    link.parent.mkdir()
    link.symlink_to(disk)
    for text in ("new", "newer"):
        with atomic_directory(link) as partial:
            write_folder(partial, config=text)
        assert link.is_symlink()
        assert read_folder(disk) == {"config": text}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "model"}


WRITE_SLOWLY = """
import sys
from pathlib import Path
from chitchat.files import atomic_directory, atomic_file
kind, path = sys.argv[1], Path(sys.argv[2])
with (atomic_directory if kind == "folder" else atomic_file)(path) as partial:
    (partial / "a" if kind == "folder" else partial).write_text("other")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("is_killed", [False, True])
def test_two_processes_never_destroy_each_others_temporary_files(tmp_path, kind, is_killed):
    path = tmp_path / "out" / "epoch1"
    command = [sys.executable, "-c", WRITE_SLOWLY, kind, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, cwd=ROOT, text=True) as other:
        assert other.stdout.readline() == "writing\n"
        if is_killed:
            other.kill()
            other.wait()
        with (atomic_directory if kind == "folder" else atomic_file)(path) as partial:
            (partial / "a" if kind == "folder" else partial).write_text("mine")
        if not is_killed:
            _, err = other.communicate()
            assert err == ""
    written = (path / "a" if kind == "folder" else path).read_text()
    assert written == ("mine" if is_killed else "other")
    assert [item.name for item in path.parent.iterdir()] == ["epoch1"]
