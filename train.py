"""训练：从零开始或从已有权重训练 GPT-2，用 CPU、一块或多块 GPU，或用 torchrun 启动多个进程。

读法：build_parser 是全部选项；main 依次做好准备；train 是训练循环。
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from chitchat.checkpoint import build_model, check_vocab_size, load_model, save_checkpoint
from chitchat.dataset import (
    IGNORE_INDEX,
    DialogueDataset,
    LengthBucketSampler,
    reverse_dialogues,
    split_indices,
)
from chitchat.loss import LossModule
from chitchat.optim import build_optimizers, build_schedulers
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
from chitchat.token_table import load_token_table
from chitchat.tokenizer import SpecialIds, load_tokenizer, special_ids
from chitchat.training import (
    EarlyStopping,
    Meter,
    MetricWriter,
    Processes,
    evaluate,
    train_step,
)

logger = logging.getLogger("chitchat.train")

MAX_WARMUP_STEPS = 4000  # 参考实现的固定值，这里作上限


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    count = bounded(int, minimum=1)
    optional_count = bounded(int, minimum=0)
    positive = bounded(float, above=0)
    parser = CliParser(description="训练 GPT-2 闲聊模型")
    add = parser.add_argument
    add("--device", default="0", help="GPU 编号，多块用逗号分隔，如 0,1（默认 %(default)s）")
    add("--no_cuda", action="store_true", help="只用 CPU")
    add("--vocab_path", type=Path, default=Path("vocab/vocab.txt"), help="词表（默认 %(default)s）")
    add(
        "--model_config",
        type=Path,
        default=Path("model/config.json"),
        help="从零训练时的模型结构（默认 %(default)s；小模型用 model/config_small.json）",
    )
    add(
        "--train_path",
        type=Path,
        default=Path("data/train.pkl"),
        help="preprocess.py 生成的训练数据（默认 %(default)s）",
    )
    add("--max_len", type=bounded(int, minimum=2), default=150, metavar="TOKENS",
        help="每段对话最多用多少 token，多余的截去（默认 %(default)s）")  # fmt: skip
    add("--log_path", type=Path, default=Path("data/train.log"), help="日志（默认 %(default)s）")
    add("--log", nargs="?", help="已不起作用：总是写日志")
    add("--ignore_index", type=int, default=IGNORE_INDEX,
        help="labels 里不计入 loss 的值（默认 %(default)s）")  # fmt: skip
    add("--epochs", type=count, default=100, help="训练轮数（默认 %(default)s）")
    add("--batch_size", type=count, default=4, metavar="DIALOGUES",
        help="每个批次的对话数，所有显卡和进程合计（默认 %(default)s）")  # fmt: skip
    add("--gpu0_bsz", help="已不起作用：各卡负载本来就均衡")
    add("--lr", type=positive, default=1e-3, help="学习率的峰值（默认 %(default)s）")
    add("--eps", type=positive, default=1e-9, help="AdamW 的 eps（默认 %(default)s）")
    add("--optimizer", choices=["adamw", "muon"], default="adamw",
        help="优化器；muon 只用于各层的二维权重，其余用 adamw（默认 %(default)s）")  # fmt: skip
    add("--log_step", type=count, default=50, metavar="STEPS",
        help="每多少次参数更新写一次日志和 TensorBoard（默认 %(default)s）")  # fmt: skip
    add("--gradient_accumulation_steps", type=count, default=4, metavar="BATCHES",
        help="每多少个批次更新一次参数（默认 %(default)s）")  # fmt: skip
    add("--max_grad_norm", type=positive, default=2.0,
        help="梯度 L2 范数的上限（默认 %(default)s）")  # fmt: skip
    add("--save_model_path", dest="save_model_dir", type=Path, default=Path("model"),
        help="检查点放在哪个文件夹下（默认 %(default)s）")  # fmt: skip
    add("--pretrained_model", default="",
        help="从这个模型文件夹或 hub 上的名字继续训练，空表示从零开始（默认为空）")  # fmt: skip
    add("--seed", type=optional_count, default=0, help="随机种子（默认 %(default)s）")
    add("--num_workers", type=optional_count, default=0, metavar="N",
        help="读数据的子进程数，0 表示在主进程里读（默认 %(default)s）")  # fmt: skip
    add("--patience", type=optional_count, default=0, metavar="EPOCHS",
        help="验证 loss 连续多少轮没有变好就停，0 表示不早停（默认 %(default)s）")  # fmt: skip
    add("--warmup_steps", type=optional_count, metavar="STEPS",
        help="学习率预热的更新次数，0 表示不预热"
        f"（默认为全部更新次数的十分之一，最多 {MAX_WARMUP_STEPS}）")  # fmt: skip
    add("--val_num", type=count, default=8000, metavar="DIALOGUES",
        help="留作验证的对话数；语料不足它的 10 倍时改留十分之一（默认 %(default)s）")  # fmt: skip
    add("--train_mmi", action="store_true",
        help="各句倒过来训练，得到 interact.py --mmi_model_path 所用的反向模型")  # fmt: skip
    return parser


def check_max_len(max_len: int, n_positions: int) -> None:
    """确认对话放得进模型的位置数。"""
    if max_len > n_positions:
        raise UserError(
            f"--max_len {max_len} 超过模型的 n_positions {n_positions}："
            f"请把 --max_len 减到 {n_positions} 以内，或换一个位置更多的模型"
        )


@contextlib.contextmanager
def join_processes(processes: Processes, device: torch.device) -> Iterator[None]:
    """torchrun 启动时加入进程组，结束时离开；只有一个进程时什么也不做。"""
    if processes.world_size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def choose_devices(args: argparse.Namespace, processes: Processes) -> list[torch.device]:
    """torchrun 时每个进程一块卡，否则是 --device 指定的全部。"""
    if processes.world_size == 1:
        return select_devices(args.device, no_cuda=args.no_cuda)
    return select_devices(str(processes.local_rank), no_cuda=args.no_cuda)


def parallelize(
    loss_module: LossModule, devices: list[torch.device], processes: Processes
) -> nn.Module:
    """按设备和进程数套上 DataParallel 或 DistributedDataParallel。"""
    if processes.world_size > 1:
        return nn.parallel.DistributedDataParallel(
            loss_module, device_ids=devices if devices[0].type == "cuda" else None
        )
    if len(devices) > 1:
        return nn.DataParallel(loss_module, device_ids=devices)
    return loss_module


def build_loaders(
    args: argparse.Namespace, vocab_size: int, ids: SpecialIds, processes: Processes
) -> tuple[DataLoader, DataLoader]:
    """读数据、划分，给出训练集和验证集的 DataLoader。"""
    table = load_token_table(args.train_path, vocab_size)
    if args.train_mmi:
        table = reverse_dialogues(table, ids.sep)
    train_indices, val_indices, is_reduced = split_indices(len(table), args.val_num, args.seed)
    if is_reduced:
        logger.info("corpus is small: val_num=%d instead of %d", len(val_indices), args.val_num)
    logger.info("train_dialogues=%d val_dialogues=%d", len(train_indices), len(val_indices))
    loaders = []
    for indices, is_train in ((train_indices, True), (val_indices, False)):
        dataset = DialogueDataset(
            table,
            indices,
            max_len=args.max_len,
            pad_id=ids.pad,
            ignore_index=args.ignore_index,
        )
        accumulation = args.gradient_accumulation_steps if is_train else 1
        sampler = LengthBucketSampler(
            dataset.lengths,
            window_size=args.batch_size * accumulation,
            seed=args.seed,
            shuffle=is_train,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        loaders.append(
            DataLoader(
                dataset,
                batch_size=None,
                sampler=sampler,
                num_workers=args.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
        )
    return loaders[0], loaders[1]


def train(
    loss_module: nn.Module,
    loaders: tuple[DataLoader, DataLoader],
    args: argparse.Namespace,
    *,
    save: Callable[[str], None],
    device: torch.device,
    processes: Processes,
) -> None:
    """训练循环：每轮更新参数、验证、存检查点，直到轮数用完或早停。

    Args:
        loss_module: LossModule，可能已套上 DataParallel 或 DistributedDataParallel。
        loaders: 训练集和验证集的 DataLoader。
        args: 命令行参数。
        save: 以文件夹名存下当前模型。
        device: 输入所在的设备。
        processes: 进程分工。
    """
    train_loader, val_loader = loaders
    total_steps = len(train_loader) * args.epochs
    warmup_steps = args.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(MAX_WARMUP_STEPS, total_steps // 10)
    optimizers = build_optimizers(loss_module, args.optimizer, lr=args.lr, eps=args.eps)
    schedulers = build_schedulers(optimizers, warmup_steps=warmup_steps, total_steps=total_steps)
    stopping = EarlyStopping(args.patience)
    writer = MetricWriter(args.save_model_dir / "runs" if processes.is_main else None)
    bar = tqdm(total=total_steps, unit="step", disable=None if processes.is_main else True)
    step = 0
    with contextlib.closing(writer), bar:
        for epoch in range(args.epochs):
            train_loader.sampler.epoch = epoch
            meter = Meter(device, processes)
            for batch in train_loader:
                sums, grad_norm = train_step(
                    loss_module,
                    batch,
                    optimizers,
                    schedulers,
                    max_grad_norm=args.max_grad_norm,
                    processes=processes,
                    device=device,
                )
                meter.add(sums)
                step += 1
                bar.update()
                if step % args.log_step == 0:
                    recent, speed = meter.read_recent()
                    lr = schedulers[0].get_last_lr()[0]
                    bar.set_postfix(loss=f"{recent.loss:.3f}", tokens_per_second=f"{speed:.0f}")
                    writer.write(
                        step,
                        train_loss=recent.loss,
                        train_accuracy=recent.accuracy,
                        train_lr=lr,
                        train_grad_norm=grad_norm,
                        train_tokens_per_second=speed,
                    )
            average, speed = meter.read_epoch()
            validation = evaluate(loss_module, val_loader, processes=processes, device=device)
            writer.write(
                step,
                val_loss=validation.loss,
                val_ppl=validation.ppl,
                val_accuracy=validation.accuracy,
            )
            logger.info(
                "epoch=%d train_loss=%.4f train_acc=%.4f val_loss=%.4f val_ppl=%.2f lr=%.1e "
                "tokens_per_second=%.0f",
                epoch + 1,
                average.loss,
                average.accuracy,
                validation.loss,
                validation.ppl,
                schedulers[0].get_last_lr()[0],
                speed,
            )
            save(f"epoch{epoch + 1}")
            if stopping.update(validation.loss):
                save("min_ppl_model")
            if stopping.should_stop:
                logger.info(
                    "early stop: epoch=%d best_val_loss=%.4f", epoch + 1, stopping.best_loss
                )
                break


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    args = build_parser().parse_args(argv)
    processes = Processes.from_environment()
    configure_logging(args.log_path if processes.is_main else None, console=processes.is_main)
    quiet_transformers()
    devices = choose_devices(args, processes)
    logger.info("devices=%s world_size=%d", ",".join(map(str, devices)), processes.world_size)
    for name in ("log", "gpu0_bsz"):
        if getattr(args, name) is not None:
            logger.warning("--%s has no effect any more", name)

    seed_everything(args.seed)
    tokenizer = load_tokenizer(args.vocab_path)
    if args.pretrained_model:
        model = load_model(args.pretrained_model)
        check_vocab_size(model.config.vocab_size, tokenizer, args.pretrained_model)
    else:
        model = build_model(args.model_config, tokenizer)
    check_max_len(args.max_len, model.config.n_positions)
    logger.info("num_params=%d", model.num_parameters())
    loaders = build_loaders(args, model.config.vocab_size, special_ids(tokenizer), processes)
    model.to(devices[0]).train()
    seed_everything(args.seed + processes.rank)  # 各进程的 dropout 互不相同

    def save(name: str) -> None:
        if processes.is_main:
            save_checkpoint(args.save_model_dir / name, model, tokenizer)

    with join_processes(processes, devices[0]):
        loss_module = parallelize(LossModule(model, args.ignore_index), devices, processes)
        train(loss_module, loaders, args, save=save, device=devices[0], processes=processes)
    return 0


if __name__ == "__main__":
    run_cli(main)
