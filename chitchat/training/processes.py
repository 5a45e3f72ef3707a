"""多进程训练的分工：torchrun 启动的一组进程里，本进程是哪一个，怎样相加、商量和收集。"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chitchat.devices import select_devices
from chitchat.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_DEVICE = "0"
RELAYED = (UserError, OSError)  # 主进程里的这些错，别的进程也要知道，否则一直等它
JOIN_SECONDS = 300  # 等别的进程最多多久
ADVICE = "多个进程请用 torchrun 启动；只用一个进程请先 unset RANK WORLD_SIZE LOCAL_RANK"


def _read_number(name: str) -> int | None:
    """环境变量里的非负整数；没有设时是 None。"""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"环境变量 {name} 应为非负整数，得到 {text!r}：{ADVICE}")
    return int(text)


def _wait_for_port(host: str, port: int, seconds: float) -> None:
    """等到能连上；主进程可能晚些才启动。到时候还连不上就抛出 OSError。"""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@dataclass(frozen=True)
class Processes:
    """本进程的位置；不用 torchrun 时是唯一的一个，所有方法都原样返回。"""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """读 torchrun 设置的环境变量；RANK 和 WORLD_SIZE 都没有时是唯一的一个。

        Raises:
            UserError: 只有其中几个，或不是合适的数；多半是以前留下的。
        """
        rank, world_size, local_rank, _ = map(
            _read_number, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        if rank is None and world_size in (None, 1):
            return cls()
        needed = ["RANK", "WORLD_SIZE"]
        if (world_size or 0) > 1:
            needed += ["MASTER_ADDR", "MASTER_PORT"]
        missing = [name for name in needed if not os.environ.get(name)]
        if missing:
            raise UserError(f"像是多进程训练，却没有环境变量 {'、'.join(missing)}：{ADVICE}")
        if world_size < 1 or rank >= world_size:
            raise UserError(f"环境变量 RANK={rank} 应小于 WORLD_SIZE={world_size}：{ADVICE}")
        return cls(rank, world_size, local_rank or 0)

    @property
    def is_main(self) -> bool:
        """写日志和文件的那一个。"""
        return self.rank == 0

    @contextlib.contextmanager
    def join(self, device: torch.device) -> Iterator[None]:
        """加入进程组，结束时离开：GPU 上的张量走 NCCL，CPU 上的走 Gloo。

        Raises:
            UserError: 等了 JOIN_SECONDS 秒，别的进程还没有来。
        """
        if self.world_size == 1:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = self._meet()
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
        try:
            yield
        finally:
            gc.collect()  # DDP 要先于进程组释放，否则退出时偶尔两边都卡住
            dist.destroy_process_group()

    def _meet(self) -> dist.Store:
        """等所有进程都到主进程那里报到。"""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        logger.info(
            "waiting for %d other processes at %s:%d, at most %d seconds",
            *(self.world_size - 1, host, port, JOIN_SECONDS),
        )
        try:
            if not self.is_main:
                _wait_for_port(host, port, JOIN_SECONDS)
            timeout = datetime.timedelta(seconds=JOIN_SECONDS)
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        except (OSError, dist.DistError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"等了 {JOIN_SECONDS} 秒，{self.world_size} 个进程没有在 {host}:{port} 到齐"
                f"（{reason}）：{ADVICE}"
            ) from error
        return store

    def sum(self, values: Tensor) -> Tensor:
        """各进程的同名张量相加；原地修改并返回 values。"""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """任何一个进程的 flag 为真，所有进程都得到真。"""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: object) -> list[object]:
        """收集各进程的一个小对象，按 rank 排列，每个进程都得到整个列表。"""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, compute: Callable[[], object]) -> object:
        """由主进程算出一个对象，每个进程都得到它；例如只在第一台机器的磁盘上的训练状态。

        Args:
            compute: 只在主进程里调用，没有参数。

        Raises:
            UserError, OSError: compute 在主进程里抛出的，每个进程都抛出。
        """
        if self.world_size == 1:
            return compute()
        answer: list[object] = [None]
        if self.is_main:
            try:
                answer = [compute()]
            except RELAYED as error:
                answer = [error]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], RELAYED):
            raise answer[0]
        return answer[0]


def choose_devices(names: str, processes: Processes, *, no_cuda: bool) -> list[torch.device]:
    """用 torchrun 时每个进程一块卡，否则是 names 里的全部；第一块成为当前的卡。

    Args:
        names: ``--device`` 的取值；用 torchrun 时，默认的 ``0`` 表示由 local_rank 决定。
        processes: 进程分工。
        no_cuda: True 时总是用 CPU。

    Raises:
        UserError: 写法不对，没有这块卡，或列出的卡比这台机器的进程少。
    """
    is_listed = processes.world_size > 1 and names != DEFAULT_DEVICE
    if processes.world_size > 1 and not is_listed:
        names = str(processes.local_rank)
    devices = select_devices(names, no_cuda=no_cuda)
    if is_listed and devices[0].type == "cuda":
        if processes.local_rank >= len(devices):
            raise UserError(
                f"--device {names} 只有 {len(devices)} 块卡，这台机器的进程更多："
                "请给每个进程一块，或不写 --device"
            )
        devices = [devices[processes.local_rank]]
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])
    return devices


def parallelize(
    loss_module: nn.Module, devices: list[torch.device], processes: Processes
) -> nn.Module:
    """按设备和进程数套上 DataParallel 或 DistributedDataParallel。"""
    if processes.world_size > 1:
        return nn.parallel.DistributedDataParallel(
            loss_module, device_ids=devices if devices[0].type == "cuda" else None
        )
    if len(devices) > 1:
        return nn.DataParallel(loss_module, device_ids=devices)
    return loss_module
