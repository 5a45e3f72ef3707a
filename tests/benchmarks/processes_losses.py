"""同一条训练命令，用一个进程、两个进程、两台“机器”（都在本机）各跑一次，loss 应当相同；
再在 torchrun --max_restarts 之下杀死一个进程，看它从哪一步接上，loss 是否仍然相同。

用法: python tests/benchmarks/processes_losses.py --train_path data/train.pkl

关掉 dropout，用 fp32 和 CPU，所以差别只来自浮点加法的次序。只用于 Linux。
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from training_process import TRAIN, TrainingProcess, write_config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT = 1e-3  # nat 每 token
SAVE_STEPS = 10
TIMEOUT = 120  # 秒，一种做法最多跑多久
# 重来时每次新建会合用的 store；torchrun 缺省的共用 store 里还有死去的进程的地址。
# 来源: https://github.com/pytorch/pytorch/issues/135712
FRESH_STORE = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]


def free_port():
    """本机一个空着的端口。"""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


def node_options(port):
    """一台机器一个进程，共两台：每台的 torchrun 选项。"""
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    return [
        ["--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1, *address] for rank in range(2)
    ]


def elastic_options(port, max_restarts):
    """同上，由 c10d 会合：每台的命令相同，一台上的进程被杀，两台一起重来。"""
    options = ["--nnodes", 2, "--nproc_per_node", 1, "--max_restarts", max_restarts]
    options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    return [[*options, "--rdzv_id", "chitchat"]] * 2


def kill_worker(launched, rank):
    """SIGKILL 第 rank 个训练进程，它是某个 torchrun 的子进程。"""
    for launcher in launched:
        pid = launcher.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                os.kill(int(child), signal.SIGKILL)
                return
    raise LookupError(rank)


def wait_for_all(launched):
    """等所有的命令成功结束；有一个失败或超时，就结束其余的，并显示输出。"""
    deadline = time.monotonic() + TIMEOUT
    while any(process.is_running for process in launched) and time.monotonic() < deadline:
        time.sleep(0.05)
    is_late = any(process.is_running for process in launched)
    for process in launched:
        process.process.terminate()  # torchrun 会带走它的子进程；已经结束的不受影响
    codes = [process.wait() for process in launched]
    if is_late or any(codes):
        text = "\n".join(process.text[-3000:] for process in launched)
        raise SystemExit(f"{text}\nexit codes {codes}, timed out: {is_late}")


def read_losses(directory):
    """每轮的训练和验证 loss，取自训练状态：日志里只有四位小数。"""
    progress = torch.load(directory / "training_state.pt", weights_only=True)["progress"]
    return [*progress["train_losses"], *progress["val_losses"]]


def print_table(losses, lost):
    """各种做法的 loss 并排，以及被杀时丢了几步；返回最大的差。"""
    base = losses["1 process"]
    names = [f"{kind} {i + 1}" for kind in ("train", "val") for i in range(len(base) // 2)]
    print(f"{'loss (nat per token)':22}", *(f"{name:>10}" for name in names), "  difference")
    largest = 0.0
    for name, values in losses.items():
        difference = max(abs(a - b) for a, b in zip(values, base, strict=True))
        largest = max(largest, difference)
        print(f"{name:22}", *(f"{value:10.6f}" for value in values), f"{difference:12.1e}")
    print(f"largest difference: {largest:.1e} (limit {LIMIT:.0e})")
    for name, step, resumed_from in lost:
        print(
            f"{name}: rank 1 got SIGKILL at step {step}, resumed from step {resumed_from}, "
            f"{step - resumed_from} steps trained again"
        )
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_path", type=Path, default=Path("data/train.pkl"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--seed", type=int, default=0, help="在哪一步杀死进程")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    losses, lost = {}, []
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(folder, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        options = ["--train_path", args.train_path.resolve(), "--model_config", config]
        options += ["--precision", "fp32", "--epochs", args.epochs, "--optimizer", args.optimizer]
        options += ["--batch_size", 16, "--gradient_accumulation_steps", 1]

        def run(name, launches, *extra, should_kill=False):
            """每份 launches 启动一个命令，共用一个 --save_model_path。"""
            directory = Path(folder, name.replace(" ", "_"))
            paths = ["--save_model_path", directory, "--log_path", directory / "log"]
            rest = [*TRAIN[1:], *options, *extra, *paths]
            launched = [TrainingProcess([*launch, *rest]) for launch in launches]
            if should_kill:
                target = generator.randint(SAVE_STEPS, 3 * SAVE_STEPS)
                first = launched[0]
                first.wait_until(lambda: max(p.step or 0 for p in launched) >= target)
                kill_worker(launched, rank=1)
                step = max(p.step or 0 for p in launched)
            wait_for_all(launched)
            losses[name] = read_losses(directory)
            if should_kill:  # c10d 重新会合之后，主进程可能换了一台机器
                resumed_from = max(p.resumed_from or 0 for p in launched)
                lost.append((name, step, resumed_from))

        resume = ["--resume", "--save_steps", SAVE_STEPS]
        alone = [*TORCHRUN, "--standalone", "--nproc_per_node", 2]
        run("1 process", [[sys.executable]])
        run("2 processes", [alone])
        run("2 nodes", [[*TORCHRUN, *node] for node in node_options(free_port())])
        restarting = [[*FRESH_STORE, *alone, "--max_restarts", 3]]
        run("2 processes, killed", restarting, *resume, should_kill=True)
        elastic = elastic_options(free_port(), max_restarts=3)
        restarting = [[*FRESH_STORE, *TORCHRUN, *node] for node in elastic]
        run("2 nodes, killed", restarting, *resume, should_kill=True)

    return 0 if print_table(losses, lost) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
