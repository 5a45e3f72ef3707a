"""训练：从零开始或从已有权重训练 GPT-2，用 CPU、一块或多块 GPU，或用 torchrun 启动多个进程。

读法：build_parser 是全部选项；main 依次做好准备；train 是训练循环。
"""

from __future__ import annotations

if __name__ == "__main__":  # 在其余的导入之前：它们要好几秒
    from chitchat.interrupts import guard_startup

    guard_startup()

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from chitchat.architecture import build_model, check_vocab_size
from chitchat.chat.layers import build_activation
from chitchat.chat.samples import sample_replies
from chitchat.checkpoint import check_same_vocab, load_model, remove_old_checkpoints
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
from chitchat.training.dataset import IGNORE_INDEX, build_loaders, reverse_dialogues
from chitchat.training.failures import explain_failures
from chitchat.training.loss import PRECISIONS
from chitchat.training.meters import Meter, evaluate
from chitchat.training.optimizers import DEFAULT_LR
from chitchat.training.plan import FINE_TUNING_LR, MAX_WARMUP_STEPS, Plan, choose_precision
from chitchat.training.processes import DEFAULT_DEVICE, Processes, choose_devices
from chitchat.training.reporting import TrainingLog, save_loss_curve
from chitchat.training.run import Run
from chitchat.training.splitting import MAX_PADDING
from chitchat.training.state import STATE_NAME, find_state, fingerprint, set_aside

logger = logging.getLogger("chitchat.train")

NUM_SAMPLES = 3  # 每轮展示几句示例回复
UNCHANGEABLE = (  # 续训时不能变的选项；语料、词表和结构另有指纹
    "train_mmi",
    "max_len",
    "val_num",
    "batch_size",
    "gradient_accumulation_steps",
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
    if args.compile:
        model.transformer.compile()
    return model.train()


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


def make_plan(
    args: argparse.Namespace, model: GPT2LMHeadModel, loader: DataLoader, processes: Processes
) -> Plan:
    """把没有指定的定下来；精度除外，它可能取自上次的训练状态。"""
    wanted = Plan(
        total_steps=len(loader) * args.epochs,
        optimizer=args.optimizer,
        lr=args.lr,
        lr_schedule=args.lr_schedule,
        warmup_steps=args.warmup_steps,
        eps=args.eps,
        max_grad_norm=args.max_grad_norm,
        max_padding=1.0 if args.compile else MAX_PADDING,  # 编译时形状越少越好
        precision=args.precision,
    )
    # 前向和反向由各进程分摊，正交化却每个进程都做一遍。
    tokens_per_update = loader.dataset.lengths.sum() / len(loader) / processes.world_size
    return wanted.settle(
        model, tokens_per_update=tokens_per_update, is_fine_tuning=bool(args.pretrained_model)
    )


def prepare_run(
    args: argparse.Namespace, devices: list[torch.device], processes: Processes
) -> tuple[Run, tuple[DataLoader, DataLoader]]:
    """读词表、模型和数据，定下安排；有 --resume 时接上训练状态。"""
    seed_everything(args.seed)
    tokenizer = load_tokenizer(args.vocab_path)
    model = prepare_model(args, tokenizer)
    table, loaders = prepare_data(args, model, tokenizer, processes)
    model.to(devices[0])
    plan = make_plan(args, model, loaders[0], processes)
    identity = {
        "precision": plan.precision,
        "optimizer": plan.optimizer,
        **{name: getattr(args, name) for name in UNCHANGEABLE},
        **fingerprint(table, tokenizer, model),
    }
    state_path = args.save_model_dir / STATE_NAME
    saved = find_state(state_path, identity, processes) if args.resume else None
    if saved is not None:
        precision = saved["identity"]["precision"]
    else:
        precision = processes.share(lambda: choose_precision(plan.precision, devices[0]))
    plan = dataclasses.replace(plan, precision=precision)
    updater = plan.build_updater(model, devices, processes)
    seed_everything(args.seed + processes.rank)  # 各进程的 dropout 互不相同
    identity["precision"] = precision
    run = Run(args.save_model_dir, model, tokenizer, plan, updater, identity)
    if saved is not None:
        run.restore(saved, peak_lr=args.lr)
    elif processes.is_main and not args.resume:
        set_aside(state_path)
    return run, loaders


def log_overview(
    run: Run,
    loaders: tuple[DataLoader, DataLoader],
    args: argparse.Namespace,
    devices: Sequence[torch.device],
) -> None:
    """开始时的一张表：每行一项。"""
    train_loader, val_loader = loaders
    rows = {
        "num_params": run.model.num_parameters(),
        "train_dialogues": len(train_loader.dataset),
        "val_dialogues": len(val_loader.dataset),
        "train_tokens_per_epoch": int(train_loader.dataset.lengths.sum()),
        "dialogues_per_update": args.batch_size * args.gradient_accumulation_steps,
        "updates": run.plan.total_steps,
        "optimizer": run.plan.optimizer,
        "peak_learning_rate": f"{run.updater.peak_lr:g}",
        "warmup_steps": run.plan.warmup_steps,
        "precision": run.plan.precision,
        "devices": ",".join(map(str, devices)),
        "processes": run.processes.world_size,
    }
    for name, value in rows.items():
        logger.info("%s=%s", name, value)


def train(run: Run, loaders: tuple[DataLoader, DataLoader], args: argparse.Namespace) -> bool:
    """训练循环：每轮更新参数、验证、存检查点，直到轮数用完、早停或被中断。

    Returns:
        True 表示训练完成，False 表示被中断（状态已存下）。
    """
    progress, processes = run.progress, run.processes

    def is_finished() -> bool:
        return progress.epoch >= args.epochs or progress.should_stop(args.patience)

    if is_finished():
        option = "--epochs" if progress.epoch >= args.epochs else "--patience"
        logger.info("nothing left to do: epoch=%d is done, raise %s", progress.epoch, option)
    log_dir = args.save_model_dir / "runs" if processes.is_main else None
    log = TrainingLog(log_dir, total_steps=run.plan.total_steps, first_step=progress.step)
    with stop_signals() as should_stop, contextlib.closing(log):
        while not is_finished():
            speed = train_epoch(run, loaders[0], args, log, should_stop)
            if speed is None:
                return False
            run.save_state()  # 验证可能很久；被中断的话，续训时只从它重来
            validation = evaluate(run.updater, loaders[1], should_stop)
            if validation is None:
                return False
            average = progress.average
            is_best = progress.finish_epoch(validation.loss)
            log.write_epoch(
                *(progress.step, progress.epoch, average, validation),
                lr=run.updater.lr,
                speed=speed,
            )
            run.save_checkpoint(f"epoch{progress.epoch}")
            if is_best:
                run.save_checkpoint("min_ppl_model")
            run.save_state()
            if processes.is_main:
                remove_old_checkpoints(run.folder, args.save_total_limit, progress.epoch)
                log.write_samples(progress.step, describe(run, loaders[1]))
            if not is_finished() and processes.any(should_stop()):
                return False
    if progress.should_stop(args.patience):
        logger.info("early stop: epoch=%d best_val_loss=%.4f", progress.epoch, progress.best_loss)
    return True


def train_epoch(
    run: Run,
    loader: DataLoader,
    args: argparse.Namespace,
    log: TrainingLog,
    should_stop: Callable[[], bool],
) -> float | None:
    """做完一轮里余下的更新，返回每秒的 token 数；被中断时存下状态，返回 None。"""
    updater, progress = run.updater, run.progress
    loader.sampler.epoch, loader.sampler.start = progress.epoch, progress.window
    meter = Meter(updater.device, updater.processes, progress.average)
    for batch in loader:
        sums, grad_norm = updater.step(batch)
        meter.add(sums)
        progress.advance()
        log.advance()
        should_log = progress.step % args.log_step == 0
        if should_log or updater.device.type == "cpu":
            updater.check_finite()
        if should_log:
            recent, speed = meter.read()
            log.write_step(
                *(progress.step, progress.epoch + 1, recent),
                lr=updater.lr,
                speed=speed,
                grad_norm=float(grad_norm),
            )
        is_interrupted = updater.processes.any(should_stop())
        if is_interrupted or (args.save_steps and progress.step % args.save_steps == 0):
            meter.read()
            run.save_state()
        if is_interrupted:
            return None
    updater.check_finite()
    return meter.read_epoch_speed()


def describe(run: Run, loader: DataLoader) -> str:
    """几句示例回复，Markdown；回答的是验证集的头几段对话。"""
    dataset = loader.dataset
    samples = [dataset.table[i].tolist() for i in dataset.indices[:NUM_SAMPLES]]
    try:
        return sample_replies(run.model, run.tokenizer, samples)
    except (RuntimeError, MemoryError) as error:  # 示例要另存一份权重；放不下也不能停下训练
        logger.warning("samples skipped: %s", str(error).split("\n")[0])
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    parser = build_parser()
    args = parser.parse_args(argv)
    processes = Processes.from_environment()
    configure_logging(
        args.log_path if processes.is_main else None,
        console=processes.is_main,
        is_default=args.log_path is parser.get_default("log_path"),
    )
    quiet_transformers()
    for name, silent in (("log", None), ("gpu0_bsz", None), ("ignore_index", IGNORE_INDEX)):
        if getattr(args, name) != silent:
            logger.warning("--%s has no effect any more", name)
    devices = choose_devices(args.device, processes, no_cuda=args.no_cuda)
    if args.compile and len(devices) > 1:
        raise UserError(
            "--compile 不能与 --device 的多块卡同用：请改用 torchrun 启动，每块卡一个进程"
        )
    with explain_failures(), processes.join(devices[0]):
        if processes.is_main:
            check_writable(args.save_model_dir)
        run, loaders = prepare_run(args, devices, processes)
        log_overview(run, loaders, args, devices)
        if not train(run, loaders, args):
            logger.warning("interrupted: step=%d, continue with --resume", run.progress.step)
            return EXIT_INTERRUPTED
    curve_path = args.save_model_dir / "loss.png"
    if processes.is_main and save_loss_curve(
        curve_path, run.progress.train_losses, run.progress.val_losses
    ):
        logger.info("curve=%s", curve_path)
    return 0


if __name__ == "__main__":
    run_cli(main)
