"""两个真的进程（Gloo，CPU）与一个进程得到同样的结果；各项只启动这一次，共用其结果。"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

import train
from chitchat.errors import UserError
from chitchat.training import processes as processes_module
from chitchat.training.dataset import collate
from chitchat.training.loss import LossModule
from chitchat.training.processes import Processes, choose_devices, parallelize
from chitchat.training.updater import Updater

# 一段验证，七段训练；批次 3 分成 3、3、1 三个窗口，最后一个里第二个进程没有对话
DIALOGUES = [[101, *range(110, 112 + i), 102, 150 + i, 102] for i in range(8)]
# 直接更新两次：第二次的窗口更大，第二个进程头一次放不下
WINDOWS = [[DIALOGUES[i] for i in (0, 1)], [DIALOGUES[i] for i in (6, 5, 4, 7, 3)]]
NUM_PORTS = 4
METHOD = "forkserver"  # 慢的导入只做一次，再分出两个进程
SLOW_IMPORTS = ["transformers.models.gpt2.modeling_gpt2", "torch.utils.tensorboard", "pytest"]
multiprocessing.set_forkserver_preload([*SLOW_IMPORTS, "sklearn.model_selection"])


def train_options(folder: Path, name: str, **options: object) -> list[str]:
    values = {
        "train_path": folder / "train.pkl",
        "vocab_path": folder / "tiny_vocab.txt",
        "model_config": folder / "tiny_config.json",
        "save_model_path": folder / name,
        "log_path": folder / name / "train.log",
        "max_len": 64,
        "batch_size": 3,
        "gradient_accumulation_steps": 1,
        "epochs": 1,
        "lr": 0.01,
        "eps": 1e-3,
        "warmup_steps": 0,
        "optimizer": "muon",  # auto 会随进程数而变
        "lr_schedule": "constant",
        "precision": "fp32",
        **options,
    }
    return [
        "--no_cuda",
        *(text for key, value in values.items() for text in (f"--{key}", f"{value}")),
    ]


def tiny_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TINY_CONFIG))


class Scarce(LossModule):
    """对话数超过 limit 的前向放不下。"""

    limit = 99

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if len(input_ids) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(input_ids, labels)


def update_twice(processes: Processes) -> tuple[dict[str, Tensor], list[float], int | None]:
    """学习率为 1 的 SGD 走两步；返回权重、三个和的总和、max_rows。"""
    model = tiny_model()
    module = Scarce(model)
    updater = Updater(
        parallelize(module, [torch.device("cpu")], processes),
        [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)],
        [],
        max_grad_norm=1e9,
        processes=processes,
        device=torch.device("cpu"),
    )
    total = torch.zeros(3)
    for window in WINDOWS:
        num_targets = sum(len(row) - 1 for row in window)
        rows = [np.array(row) for row in window[processes.rank :: processes.world_size]]
        batch = collate(rows, num_targets, pad_id=0)
        total += updater.step(batch)[0]
        module.limit = 1 if processes.rank == 1 else 99
    updater.splitter.max_rows = None  # 验证也一样：第二个进程要拆开，第一个不用
    total += updater.forward(batch)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return weights, processes.sum(total).tolist(), updater.splitter.max_rows


def interrupt_rank_1(rank: int) -> None:
    """第二个进程在第一次更新之后收到 Ctrl+C。"""
    update = Updater.step

    def step(self: Updater, batch: object) -> object:
        result = update(self, batch)
        if rank == 1:
            signal.raise_signal(signal.SIGINT)
        return result

    Updater.step = step


def fail_to_read(rank: int) -> None:
    raise PermissionError(13, "Permission denied", f"state of {rank}")


def complain(rank: int) -> None:
    raise UserError(f"from {rank}")


def work(rank: int, folder: Path, ports: list[int]) -> None:
    """一个进程要做的全部；结果写进 rank{N}.pt。"""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    ports = iter(ports)
    train.save_loss_curve = lambda *_: False  # 画图费时，与这里无关

    def run_train(name: str, *flags: str) -> int:
        os.environ["MASTER_PORT"] = str(next(ports))
        disk = name if rank == 0 else f"{name}_elsewhere"  # 两台机器不共用磁盘
        return train.main([*train_options(folder, disk), *flags])

    result = {"codes": [run_train("two")]}
    update = Updater.step
    interrupt_rank_1(rank)
    result["codes"].append(run_train("interrupted"))
    Updater.step = update
    result["codes"].append(run_train("interrupted", "--resume"))

    os.environ["MASTER_PORT"] = str(next(ports))
    processes = Processes.from_environment()
    with processes.join(torch.device("cpu")):
        result["any"] = [processes.any(flag) for flag in (False, True, rank == 0, rank == 1)]
        result["gather"] = processes.gather({"rank": rank})
        result["share"] = processes.share(lambda: {"from": rank})
        with pytest.raises(UserError, match="from 0"):
            processes.share(lambda: complain(rank))
        with pytest.raises(PermissionError, match="state of 0"):
            processes.share(lambda: fail_to_read(rank))
        values = torch.tensor([1.0, 10.0 * rank])
        result["is_same_tensor"] = processes.sum(values) is values
        result["sum"] = values.tolist()
        result["updates"] = update_twice(processes)
    torch.save(result, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture
def results(folder: Path, vocab_path: Path, config_path: Path) -> list[dict]:
    """两个进程各自的结果，按 rank 排列。"""
    if not (folder / "rank1.pt").exists():
        for path in (vocab_path, config_path):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "train.pkl").write_bytes(pickle.dumps(DIALOGUES))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(NUM_PORTS)]
        ports = [opened.getsockname()[1] for opened in sockets]
        for opened in sockets:
            opened.close()
        both = start_processes(work, (folder, ports), nprocs=2, join=False, start_method=METHOD)
        assert train.main(train_options(folder, "one")) == 0
        while not both.join():
            pass
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def epoch_values(folder: Path, name: str) -> list[float]:
    log = (folder / name / "train.log").read_text(encoding="utf-8")
    return [float(value) for value in re.findall(r"(?:loss|acc|ppl|lr)=([\d.e-]+)", log)]


@pytest.mark.parametrize("name", ["two", "interrupted"])
def test_two_processes_train_like_one(results, folder, name):
    one, two = (load_file(folder / n / "epoch1" / "model.safetensors") for n in ("one", name))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert len(epoch_values(folder, name)) == 5  # 只有一个进程写日志
    assert epoch_values(folder, name) == pytest.approx(epoch_values(folder, "one"), rel=1e-4)
    start = tiny_model().state_dict()
    assert not any(one[key].equal(start[key]) for key in one)


def test_interrupting_one_process_stops_both(results):
    assert [result["codes"] for result in results] == [[0, 130, 0]] * 2


def test_any_sum_gather_and_share(results):
    for result in results:
        assert result["any"] == [False, True, True, True]
        assert result["sum"] == [2.0, 10.0]
        assert result["is_same_tensor"]
        assert result["gather"] == [{"rank": 0}, {"rank": 1}]
        assert result["share"] == {"from": 0}


def test_one_process_may_run_out_of_memory_while_the_other_does_not(results):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def plain_loss_sum(window: list[list[int]]) -> Tensor:
        return sum(
            F.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum")
            for row in map(torch.tensor, window)
        )

    loss_sum = 0.0
    for window in WINDOWS:
        loss = plain_loss_sum(window)
        optimizer.zero_grad()
        (loss / sum(len(row) - 1 for row in window)).backward()
        optimizer.step()
        loss_sum += loss.item()
    loss_sum += plain_loss_sum(WINDOWS[-1]).item()
    num_tokens = sum(len(row) - 1 for window in [*WINDOWS, WINDOWS[-1]] for row in window)
    expected = {name: param.detach() for name, param in model.named_parameters()}
    for result in results:
        weights, sums, _ = result["updates"]
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
        assert sums[:2] == pytest.approx([loss_sum, num_tokens])
    assert [result["updates"][2] for result in results] == [None, 1]


LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def set_launch(monkeypatch):
    """把启动多进程的环境变量换成这些，别的都没有。"""

    def set_launch(**values: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *LAUNCHED):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_launch


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"LOCAL_RANK": "3"}, (0, 1, 0)),  # 以前的残留，一个进程用不着
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **LAUNCHED}, (3, 4, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", **LAUNCHED}, (3, 4, 0)),
    ],
)
def test_place_is_read_from_the_environment(values, expected, set_launch):
    set_launch(**values)
    processes = Processes.from_environment()
    assert processes == Processes(*expected)
    assert processes.is_main == (expected[0] == 0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2", **LAUNCHED}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "", **LAUNCHED}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", **LAUNCHED, "MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_half_set_environment_is_refused_in_one_sentence(values, named, set_launch):
    set_launch(**values)
    with pytest.raises(UserError, match=rf"{named}.*torchrun.*unset RANK WORLD_SIZE") as refused:
        Processes.from_environment()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_the_others_says_so_and_gives_up(rank, set_launch, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
    set_launch(WORLD_SIZE="2", RANK=f"{rank}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    monkeypatch.setattr(processes_module, "JOIN_SECONDS", 1)
    logger = logging.getLogger("chitchat.training.processes")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    started = time.perf_counter()
    with (
        pytest.raises(UserError, match=rf"1 秒.*127\.0\.0\.1:{port}.*unset RANK") as refused,
        Processes.from_environment().join(torch.device("cpu")),
    ):
        pass
    assert time.perf_counter() - started < 20
    assert "\n" not in str(refused.value)
    assert f"waiting for 1 other processes at 127.0.0.1:{port}" in caplog.text


def test_alone_nothing_is_exchanged():
    alone = Processes()
    values = torch.tensor([1.0, 2.0])
    assert alone.is_main
    assert alone.sum(values) is values
    assert [alone.any(False), alone.any(True)] == [False, True]
    assert alone.gather("x") == ["x"]
    assert alone.share(lambda: "x") == "x"


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [("0", 0, 0), ("0", 3, 3), ("2,3", 0, 2), ("2,3", 1, 3)],
)
def test_each_process_takes_its_own_card(device, local_rank, expected, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    devices = choose_devices(device, Processes(local_rank, 4, local_rank), no_cuda=False)
    assert devices == chosen == [torch.device("cuda", expected)]


@pytest.mark.parametrize(("names", "rank"), [("2,3", 2), ("1", 1), ("1", 2)])
def test_more_processes_than_listed_cards_is_refused(names, rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UserError, match=rf"--device {names} 只有 \d 块"):
        choose_devices(names, Processes(rank, 4, rank), no_cuda=False)


def test_compile_with_several_cards_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with pytest.raises(UserError, match=r"--compile.*torchrun"):
        train.main(["--device", "0,1", "--compile"])
