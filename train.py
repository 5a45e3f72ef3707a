"""训练：从零开始或从已有权重训练 GPT-2，用 CPU、一块或多块 GPU，或用 torchrun 启动多个进程。

读法：build_parser 是全部选项；main 依次做好准备；train 是训练循环。
"""

from __future__ import annotations

if __name__ == "__main__":  # 在其余的导入之前：它们要好几秒
    from chitchat.interrupts import guard_startup

    guard_startup()

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from chitchat.architecture import build_model, check_vocab_size
from chitchat.chat.layers import build_activation
from chitchat.chat.samples import sample_replies
from chitchat.checkpoint import (
    check_same_vocab,
    load_model,
    remove_old_checkpoints,
    save_checkpoint,
)
from chitchat.cli import (
    CliParser,
    bounded,
    configure_logging,
    quiet_transformers,
    run_cli,
    stop_signals,
)
from chitchat.devices import seed_everything
from chitchat.errors import EXIT_INTERRUPTED, UserError
from chitchat.files import check_writable
from chitchat.tokens.token_table import TokenTable, is_encoded_with, load_token_table
from chitchat.tokens.tokenizer import load_tokenizer, special_ids, vocab_fingerprint
from chitchat.training.batching import MAX_PADDING
from chitchat.training.dataset import IGNORE_INDEX, build_loaders, reverse_dialogues
from chitchat.training.loss import PRECISIONS, LossModule
from chitchat.training.meters import Meter, evaluate
from chitchat.training.optimizers import (
    DEFAULT_LR,
    build_optimizers,
    build_schedulers,
    choose_optimizer,
)
from chitchat.training.processes import DEFAULT_DEVICE, Processes, choose_devices, parallelize
from chitchat.training.reporting import TrainingLog, save_loss_curve
from chitchat.training.state import (
    STATE_NAME,
    Progress,
    find_state,
    fingerprint,
    restore_state,
    save_state,
    set_aside,
)
from chitchat.training.updater import Updater, choose_precision

logger = logging.getLogger("chitchat.train")

MAX_WARMUP_STEPS = 4000  # 参考实现的固定值，这里作上限
FINE_TUNING_LR = 1e-4  # 有 --pretrained_model 时的学习率：再大就会忘掉已经学会的
NUM_SAMPLES = 3  # 每轮展示几句示例回复
UNCHANGEABLE = (  # 续训时不能变的选项；语料、词表和结构另有指纹
    "train_mmi",
    "max_len",
    "val_num",
    "batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "seed",
)
COMPILED_WIDTH = 32  # --compile 时批次的宽度补齐到它的倍数，形状少，编译的次数就少


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    parser = CliParser(description="训练 GPT-2 闲聊模型")
    add_data_options(parser.add_argument_group("数据").add_argument)
    add_model_options(parser.add_argument_group("模型与设备").add_argument)
    add_optimization_options(parser.add_argument_group("优化").add_argument)
    add_output_options(parser.add_argument_group("记录与续训").add_argument)
    return parser


# fmt: off
def add_data_options(add: Callable) -> None:
    """数据从哪里来，怎样组成批次。"""
    count = bounded(int, minimum=1)
    path = {"type": Path, "metavar": "FILE"}
    add("--train_path", **path, default=Path("data/train.pkl"),
        help="preprocess.py 生成的训练数据（默认 %(default)s）")
    add("--vocab_path", **path, default=Path("vocab/vocab.txt"),
        help="词表，要与预处理时相同（默认 %(default)s）")
    add("--max_len", type=bounded(int, minimum=2), default=150, metavar="TOKENS",
        help="每段对话最多用多少 token，多余的截去（默认 %(default)s）")
    add("--val_num", type=count, default=8000, metavar="DIALOGUES",
        help="留作验证的对话数；语料不足它的 10 倍时改留十分之一（默认 %(default)s）")
    add("--batch_size", type=count, default=4, metavar="DIALOGUES",
        help="每个批次的对话数，所有显卡和进程合计（默认 %(default)s）")
    add("--gradient_accumulation_steps", type=count, default=4, metavar="BATCHES",
        help="每多少个批次更新一次参数；放得下时合成一次前向，数值不变（默认 %(default)s）")
    add("--num_workers", type=bounded(int, minimum=0), default=0, metavar="N",
        help="读数据的子进程数，0 表示在主进程里读（默认 %(default)s）")
    add("--ignore_index", type=bounded(int, maximum=-1), default=IGNORE_INDEX, metavar="ID",
        help="已不起作用：补齐处总是不计入 loss（默认 %(default)s）")
    add("--gpu0_bsz", help="已不起作用：各卡负载本来就均衡")


def add_model_options(add: Callable) -> None:
    """模型、设备与精度。"""
    add("--model_config", type=Path, default=Path("model/config.json"), metavar="FILE",
        help="从零训练时的模型结构（默认 %(default)s；小模型用 model/config_small.json）")
    add("--pretrained_model", default="", metavar="DIR",
        help="从这个模型文件夹或 hub 上的名字继续训练，空表示从零开始（默认为空）")
    add("--device", default=DEFAULT_DEVICE,
        help="GPU 编号，多块用逗号分隔，如 0,1；torchrun 时依次分给这台机器的各个进程"
        "（默认 %(default)s）")
    add("--no_cuda", action="store_true", help="只用 CPU")
    add("--precision", choices=["auto", *PRECISIONS], default="auto",
        help="前向的精度；auto：硬件有 bf16 就用，老 GPU 用 fp16，否则 fp32；续训时与上次相同"
        "（默认 %(default)s）")
    add("--train_mmi", action="store_true",
        help="各句倒过来训练，得到 interact.py --mmi_model_path 所用的反向模型")
    add("--compile", action="store_true",
        help="用 torch.compile 编译模型；开头要等几分钟，之后更快；多块卡时要用 torchrun")
    add("--gradient_checkpointing", action="store_true",
        help="反向时重算中间结果，省显存但慢约三分之一；对话很长时用")


def add_optimization_options(add: Callable) -> None:
    """优化器、学习率和何时停。"""
    count, positive = bounded(int, minimum=1), bounded(float, above=0)
    optional_count = bounded(int, minimum=0)
    add("--epochs", type=count, default=100, help="训练轮数（默认 %(default)s）")
    add("--optimizer", choices=["auto", "adamw", "muon"], default="auto",
        help="优化器；muon 只用于各层的二维权重，其余用 adamw；auto：muon 的额外运算相对每次更新"
        "不太多时用它，从已有的权重继续时用 adamw（默认 %(default)s）")
    add("--lr", type=positive,
        help=f"学习率的峰值（默认 muon {DEFAULT_LR['muon']}，adamw {DEFAULT_LR['adamw']}，"
        f"从已有的权重继续时 {FINE_TUNING_LR}）")
    add("--lr_schedule", choices=["linear", "cosine", "constant"], default="linear",
        help="预热之后学习率怎样变（默认 %(default)s，线性降到 0）")
    add("--warmup_steps", type=optional_count, metavar="STEPS",
        help="学习率预热的更新次数，0 表示不预热"
        f"（默认为全部更新次数的十分之一，最多 {MAX_WARMUP_STEPS}）")
    add("--eps", type=positive, default=1e-9, help="AdamW 的 eps（默认 %(default)s）")
    add("--max_grad_norm", type=positive, default=2.0,
        help="梯度 L2 范数的上限（默认 %(default)s）")
    add("--patience", type=optional_count, default=0, metavar="EPOCHS",
        help="验证 loss 连续多少轮没有变好就停，0 表示不早停（默认 %(default)s）")
    add("--seed", type=bounded(int, minimum=0, maximum=2**32 - 1), default=0,
        help="随机种子（默认 %(default)s）")


def add_output_options(add: Callable) -> None:
    """日志、检查点与续训。"""
    count, optional_count = bounded(int, minimum=1), bounded(int, minimum=0)
    add("--save_model_path", dest="save_model_dir", type=Path, default=Path("model"), metavar="DIR",
        help="检查点放在哪个文件夹下（默认 %(default)s）")
    add("--log_path", type=Path, default=Path("data/train.log"), metavar="FILE",
        help="日志，追加写入（默认 %(default)s）")
    add("--log_step", type=count, default=10, metavar="STEPS",
        help="每多少次参数更新更新进度条、写一次 TensorBoard 和进度的日志，后者至多十秒一行"
        "（默认 %(default)s）")
    add("--log", nargs="?", const="True", help="已不起作用：总是写日志")
    add("--resume", action="store_true",
        help="从 --save_model_path 下的训练状态接着训练；没有就从头开始")
    add("--save_steps", type=optional_count, default=0, metavar="STEPS",
        help="每多少次参数更新存一次训练状态，0 表示只在每轮结束时存（默认 %(default)s）")
    add("--save_total_limit", type=optional_count, default=0, metavar="K",
        help="只保留最新的 K 个 epoch 文件夹，0 表示全部保留（默认 %(default)s）")
# fmt: on


def prepare_model(args: argparse.Namespace, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """建立或读入模型，检查它与词表、max_len 相配。"""
    if args.pretrained_model:
        model = load_model(args.pretrained_model)
        check_vocab_size(model.config.vocab_size, tokenizer, args.pretrained_model)
        check_same_vocab(
            args.pretrained_model,
            tokenizer,
            args.vocab_path,
            f"请给 preprocess.py 和 train.py 都加上 --vocab_path {args.pretrained_model}",
        )
    else:
        is_own_vocab = is_encoded_with(args.train_path, vocab_fingerprint(tokenizer))
        model = build_model(args.model_config, tokenizer, follow_vocab=is_own_vocab)
    n_positions = model.config.n_positions
    if args.max_len > n_positions:
        raise UserError(
            f"--max_len {args.max_len} 超过模型的 n_positions {n_positions}："
            f"请把 --max_len 减到 {n_positions} 以内，或换一个位置更多的模型"
        )
    build_activation(model.config.to_dict())  # 不能用来聊天的结构，训练之前就拒绝
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def prepare_data(
    args: argparse.Namespace, model: GPT2LMHeadModel, tokenizer: Tokenizer, processes: Processes
) -> tuple[TokenTable, tuple[DataLoader, DataLoader]]:
    """读训练数据，划分，给出整张表和训练、验证的 DataLoader。"""
    ids = special_ids(tokenizer)
    table = load_token_table(args.train_path, model.config.vocab_size, vocab_fingerprint(tokenizer))
    if args.train_mmi:
        table = reverse_dialogues(table, ids.sep)
    return table, build_loaders(
        table,
        val_num=args.val_num,
        train_window=args.batch_size * args.gradient_accumulation_steps,
        val_window=args.batch_size,
        num_workers=args.num_workers,
        seed=args.seed,
        processes=processes,
        max_len=args.max_len,
        pad_id=ids.pad,
        width_multiple=COMPILED_WIDTH if args.compile else 1,
    )


def choose_optimization(
    args: argparse.Namespace, model: GPT2LMHeadModel, loader: DataLoader, processes: Processes
) -> None:
    """把没有指定的优化器、学习率和预热步数定下来，写回 args。"""
    # 前向和反向由各进程分摊，正交化却每个进程都做一遍。
    tokens_per_update = loader.dataset.lengths.sum() / len(loader) / processes.world_size
    if args.optimizer == "auto" and args.pretrained_model:
        args.optimizer = "adamw"
    args.optimizer = choose_optimizer(args.optimizer, model, tokens_per_update)
    if args.lr is None:
        args.lr = FINE_TUNING_LR if args.pretrained_model else DEFAULT_LR[args.optimizer]
    if args.warmup_steps is None:
        args.warmup_steps = min(MAX_WARMUP_STEPS, len(loader) * args.epochs // 10)


def build_updater(
    args: argparse.Namespace,
    model: GPT2LMHeadModel,
    loader: DataLoader,
    *,
    precision: str,
    devices: list[torch.device],
    processes: Processes,
) -> Updater:
    """模型套上损失和并行，配好优化器与学习率曲线。"""
    optimizers = build_optimizers(model, args.optimizer, lr=args.lr, eps=args.eps)
    return Updater(
        parallelize(LossModule(model, precision=precision), devices, processes),
        optimizers,
        build_schedulers(
            optimizers,
            args.lr_schedule,
            warmup_steps=args.warmup_steps,
            total_steps=len(loader) * args.epochs,
        ),
        max_grad_norm=args.max_grad_norm,
        processes=processes,
        device=devices[0],
        max_padding=1.0 if args.compile else MAX_PADDING,  # 编译时形状越少越好
    )


def train(
    updater: Updater,
    loaders: tuple[DataLoader, DataLoader],
    args: argparse.Namespace,
    progress: Progress,
    *,
    save: Callable[[str], None],
    save_progress: Callable[[], None],
    describe: Callable[[], str],
) -> bool:
    """训练循环：每轮更新参数、验证、存检查点，直到轮数用完、早停或被中断。

    Args:
        updater: 做一次参数更新。
        loaders: 训练集和验证集的 DataLoader。
        args: 命令行参数。
        progress: 从哪里开始；随训练更新。
        save: 以文件夹名存下当前模型。
        save_progress: 存下训练状态。
        describe: 给出几句示例回复，每轮写进 TensorBoard。

    Returns:
        True 表示训练完成，False 表示被中断（状态已存下）。
    """
    train_loader, val_loader = loaders
    processes = updater.processes
    stopping = progress.early_stopping(args.patience)
    if progress.epoch >= args.epochs or stopping.should_stop:
        option = "--epochs" if progress.epoch >= args.epochs else "--patience"
        logger.info("nothing left to do: epoch=%d is done, raise %s", progress.epoch, option)
    log = TrainingLog(
        args.save_model_dir / "runs" if processes.is_main else None,
        total_steps=len(train_loader) * args.epochs,
        first_step=progress.step,
    )
    with stop_signals() as should_stop, contextlib.closing(log):
        while progress.epoch < args.epochs and not stopping.should_stop:
            meter = Meter(updater.device, processes, progress.average)
            for _ in train_epoch(updater, train_loader, meter, args.log_step, progress, log):
                is_interrupted = processes.any(should_stop())
                if is_interrupted or (args.save_steps and progress.step % args.save_steps == 0):
                    meter.read_recent()
                    progress.average = meter.epoch
                    save_progress()
                if is_interrupted:
                    return False
            average, speed = meter.read_epoch()
            progress.average = average
            save_progress()  # 验证可能很久；被中断的话，续训时只从它重来
            validation = evaluate(updater, val_loader, should_stop)
            if validation is None:
                return False
            epoch = progress.epoch + 1
            log.write_epoch(progress.step, epoch, average, validation, lr=updater.lr, speed=speed)
            save(f"epoch{epoch}")
            if stopping.update(validation.loss):
                save("min_ppl_model")
            progress.finish_epoch(average, validation, stopping)
            save_progress()
            if processes.is_main:
                remove_old_checkpoints(args.save_model_dir, args.save_total_limit, epoch)
                log.write_samples(progress.step, describe())
            is_last = progress.epoch == args.epochs or stopping.should_stop
            if not is_last and processes.any(should_stop()):
                return False
    if stopping.should_stop:
        logger.info("early stop: epoch=%d best_val_loss=%.4f", progress.epoch, stopping.best_loss)
    return True


def train_epoch(
    updater: Updater,
    loader: DataLoader,
    meter: Meter,
    log_step: int,
    progress: Progress,
    log: TrainingLog,
) -> Iterator[None]:
    """一轮里余下的更新；每做完一次、记下它之后交还一次。"""
    loader.sampler.epoch = progress.epoch
    loader.sampler.start = progress.window
    for batch in loader:
        sums, grad_norm = updater.step(batch)
        meter.add(sums)
        progress.window += 1
        progress.step += 1
        log.advance()
        should_log = progress.step % log_step == 0
        if should_log or updater.device.type == "cpu":
            updater.check_finite()
        if should_log:
            recent, speed = meter.read_recent()
            log.write_step(
                progress.step,
                progress.epoch + 1,
                recent,
                lr=updater.lr,
                speed=speed,
                grad_norm=float(grad_norm),
            )
        yield
    updater.check_finite()


def log_overview(
    updater: Updater,
    model: nn.Module,
    loaders: tuple[DataLoader, DataLoader],
    args: argparse.Namespace,
    *,
    precision: str,
    devices: Sequence[torch.device],
    processes: Processes,
) -> None:
    """开始时的一张表：每行一项。"""
    train_loader, val_loader = loaders
    rows = {
        "num_params": model.num_parameters(),
        "train_dialogues": len(train_loader.dataset),
        "val_dialogues": len(val_loader.dataset),
        "train_tokens_per_epoch": int(train_loader.dataset.lengths.sum()),
        "dialogues_per_update": args.batch_size * args.gradient_accumulation_steps,
        "updates": len(train_loader) * args.epochs,
        "optimizer": args.optimizer,
        "peak_learning_rate": f"{updater.peak_lr:g}",
        "warmup_steps": args.warmup_steps,
        "precision": precision,
        "devices": ",".join(map(str, devices)),
        "processes": processes.world_size,
    }
    for name, value in rows.items():
        logger.info("%s=%s", name, value)


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    parser = build_parser()
    args = parser.parse_args(argv)
    is_default_log = args.log_path is parser.get_default("log_path")
    processes = Processes.from_environment()
    configure_logging(
        args.log_path if processes.is_main else None,
        console=processes.is_main,
        is_default=is_default_log,
    )
    quiet_transformers()
    for name in ("log", "gpu0_bsz"):
        if getattr(args, name) is not None:
            logger.warning("--%s has no effect any more", name)
    if args.ignore_index != IGNORE_INDEX:
        logger.warning("--ignore_index has no effect any more")
    devices = choose_devices(args.device, processes, no_cuda=args.no_cuda)
    if args.compile and len(devices) > 1:
        raise UserError(
            "--compile 不能与 --device 的多块卡同用：请改用 torchrun 启动，每块卡一个进程"
        )
    try:
        with processes.join(devices[0]):
            return run(args, devices, processes)
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"放不下模型和优化器（{reason}）：请换小一些的模型，或关掉占用显存的别的程序"
        ) from error
    except RuntimeError as error:
        is_compiling = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
        if not is_compiling:
            raise
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--compile 编译不了模型（{reason}）：它要用 C++ 编译器，请装上 g++，或去掉 --compile"
        ) from error


def run(args: argparse.Namespace, devices: list[torch.device], processes: Processes) -> int:
    """做好准备，训练，画出曲线；返回进程退出码。"""
    device = devices[0]
    if processes.is_main:
        check_writable(args.save_model_dir)
    seed_everything(args.seed)
    tokenizer = load_tokenizer(args.vocab_path)
    model = prepare_model(args, tokenizer)
    table, loaders = prepare_data(args, model, tokenizer, processes)
    model.to(device).train()
    if args.compile:
        model.transformer.compile()
    wanted_lr = args.lr
    choose_optimization(args, model, loaders[0], processes)
    state_path = args.save_model_dir / STATE_NAME
    identity = {
        "precision": args.precision,
        **{name: getattr(args, name) for name in UNCHANGEABLE},
        **fingerprint(table, tokenizer, model),
    }
    saved = find_state(state_path, identity, processes) if args.resume else None
    if saved is not None:
        precision = saved["identity"]["precision"]
    else:
        precision = processes.share(lambda: choose_precision(args.precision, device))
    identity["precision"] = precision
    updater = build_updater(
        args, model, loaders[0], precision=precision, devices=devices, processes=processes
    )
    seed_everything(args.seed + processes.rank)  # 各进程的 dropout 互不相同
    parts = {"model": model, "updater": updater, "processes": processes, "device": device}
    progress = Progress()
    if saved is not None:
        progress = restore_state(saved, peak_lr=wanted_lr, **parts)
        saved = None  # 与模型一样大
    elif processes.is_main and not args.resume:
        set_aside(state_path)
    log_overview(
        updater, model, loaders, args, precision=precision, devices=devices, processes=processes
    )

    def save(name: str) -> None:
        if processes.is_main:
            save_checkpoint(args.save_model_dir / name, model, tokenizer)

    def save_progress() -> None:
        save_state(state_path, progress=progress, identity=identity, **parts)

    def describe() -> str:
        samples = [table[i].tolist() for i in loaders[1].dataset.indices[:NUM_SAMPLES]]
        try:
            return sample_replies(model, tokenizer, samples)
        except (RuntimeError, MemoryError) as error:  # 示例要另存一份权重；放不下也不能停下训练
            logger.warning("samples skipped: %s", str(error).split("\n")[0])
            return ""

    is_done = train(
        updater,
        loaders,
        args,
        progress,
        save=save,
        save_progress=save_progress,
        describe=describe,
    )
    if not is_done:
        logger.warning("interrupted: step=%d, continue with --resume", progress.step)
    if processes.is_main and is_done:
        curve_path = args.save_model_dir / "loss.png"
        if save_loss_curve(curve_path, progress.train_losses, progress.val_losses):
            logger.info("curve=%s", curve_path)
    return 0 if is_done else EXIT_INTERRUPTED


if __name__ == "__main__":
    run_cli(main)
