"""训练：从零开始或从已有权重训练 GPT-2，用 CPU、一块或多块 GPU，或用 torchrun 启动多个进程。

读法：main 依次做好准备；train 是训练循环，train_epoch 是其中的一轮。选项在 training/options.py。
"""

from __future__ import annotations

if __name__ == "__main__":  # 在其余的导入之前：它们要好几秒
    from chitchat.interrupts import guard_startup

    guard_startup()

import argparse
import contextlib
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
from chitchat.checkpoint import check_same_vocab, load_model
from chitchat.cli import (
    CliParser,
    configure_logging,
    quiet_transformers,
    run_cli,
    stop_signals,
)
from chitchat.devices import seed_everything
from chitchat.errors import EXIT_INTERRUPTED, UserError
from chitchat.files import find_shipped
from chitchat.tokens.token_table import TokenTable, is_encoded_with, load_token_table
from chitchat.tokens.tokenizer import load_tokenizer, special_ids, vocab_fingerprint
from chitchat.training.dataset import reverse_dialogues
from chitchat.training.failures import explain_failures
from chitchat.training.loaders import build_loaders
from chitchat.training.meters import Meter, evaluate
from chitchat.training.options import add_options, check_options
from chitchat.training.plan import Plan
from chitchat.training.processes import Processes, choose_devices
from chitchat.training.reporting import TrainingLog, save_loss_curve
from chitchat.training.run import Run, overview
from chitchat.training.run_folder import make_room, occupy, remove_old_checkpoints
from chitchat.training.splitting import MAX_PADDING
from chitchat.training.state import Progress, find_state, fingerprint

logger = logging.getLogger("chitchat.train")

NUM_SAMPLES = 3  # 每轮展示几句示例回复
UNCHANGEABLE = (  # 续训时不能变的选项；语料、词表和结构另有指纹
    "train_mmi",
    "max_len",
    "loss_on",
    "val_num",
    "batch_size",
    "batch_tokens",
    "gradient_accumulation_steps",
    "seed",
)
CHOSEN_BY_AUTO = ("precision", "optimizer")  # auto 由机器定下来的，续训时用上次的
COMPILED_WIDTH = 32  # --compile 时批次的宽度补齐到它的倍数，形状少，编译的次数就少


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    parser = CliParser(description="训练 GPT-2 闲聊模型")
    add_options(parser)
    return parser


def prepare_model(args: argparse.Namespace, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """建立或读入模型，检查它与词表、max_len 相配。"""
    if args.pretrained_model:
        model = load_model(args.pretrained_model)
        check_same_vocab(
            args.pretrained_model,
            tokenizer,
            args.vocab_path,
            f"请给 preprocess.py 和 train.py 都加上 --vocab_path {args.pretrained_model}",
        )
        check_vocab_size(model.config.vocab_size, tokenizer, args.pretrained_model)
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
    return model.train()


def prepare_data(
    args: argparse.Namespace, model: GPT2LMHeadModel, tokenizer: Tokenizer, processes: Processes
) -> tuple[TokenTable, tuple[DataLoader, DataLoader]]:
    """读训练数据，划分，给出整张表和训练、验证的 DataLoader。"""
    ids = special_ids(tokenizer)
    table = load_token_table(args.train_path, model.config.vocab_size, vocab_fingerprint(tokenizer))
    return table, build_loaders(
        reverse_dialogues(table, ids.sep) if args.train_mmi else table,
        val_num=args.val_num,
        train_window=args.batch_size * args.gradient_accumulation_steps,
        val_window=args.batch_size,
        train_tokens=args.batch_tokens,
        num_workers=args.num_workers,
        seed=args.seed,
        processes=processes,
        pin_memory=model.device.type == "cuda",
        max_len=args.max_len,
        pad_id=ids.pad,
        sep_id=ids.sep,
        is_only_replies=args.loss_on == "replies",
        width_multiple=COMPILED_WIDTH if args.compile else 1,
    )


def make_plan(
    args: argparse.Namespace,
    model: GPT2LMHeadModel,
    loader: DataLoader,
    processes: Processes,
    saved: dict | None,
) -> Plan:
    """把没有指定的定下来；续训时，没有指定的优化器和精度与上次的相同。"""
    earlier = saved["identity"] if saved is not None else {}
    wanted = Plan(
        total_steps=len(loader) * args.epochs,
        optimizer=earlier.get("optimizer", args.optimizer),
        lr=args.lr,
        lr_schedule=args.lr_schedule,
        warmup_steps=args.warmup_steps,
        eps=args.eps,
        max_grad_norm=args.max_grad_norm,
        max_padding=1.0 if args.compile else MAX_PADDING,  # 编译时形状越少越好
        precision=earlier.get("precision", args.precision),
    )
    return wanted.settle(model, loader, processes, is_fine_tuning=bool(args.pretrained_model))


def prepare_run(
    args: argparse.Namespace, devices: list[torch.device], processes: Processes
) -> tuple[Run, tuple[DataLoader, DataLoader]]:
    """读词表、模型和数据，定下安排；有 --resume 时接上训练状态。"""
    seed_everything(args.seed)
    tokenizer = load_tokenizer(args.vocab_path)
    model = prepare_model(args, tokenizer).to(devices[0])
    table, loaders = prepare_data(args, model, tokenizer, processes)
    identity = {
        **{name: getattr(args, name) for name in (*CHOSEN_BY_AUTO, *UNCHANGEABLE)},
        **fingerprint(table, tokenizer, model),
    }
    saved = find_state(args.save_model_dir, identity, processes) if args.resume else None
    plan = make_plan(args, model, loaders[0], processes, saved)
    identity |= {name: getattr(plan, name) for name in CHOSEN_BY_AUTO}
    if args.compile:
        model.transformer.compile()  # 在 auto 量完速度之后：每种形状都要编译几分钟
    updater = plan.build_updater(model, devices, processes)
    seed_everything(args.seed + processes.rank)  # 各进程的 dropout 互不相同
    run = Run(args.save_model_dir, model, tokenizer, plan, updater, identity)
    if saved is not None:
        run.restore(saved, peak_lr=args.lr)
    elif processes.is_main and not args.resume:
        make_room(args.save_model_dir, args.pretrained_model)
    return run, loaders


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
            speed = train_epoch(run, loaders, args, log, should_stop)
            if speed is None:
                return False
            run.save_state()  # 验证可能很久；被中断的话，续训时只从它重来
            validation = evaluate(run.updater, loaders[1], should_stop)
            if validation is None:
                return False
            average = progress.average
            is_best = progress.finish_epoch(validation.loss)
            result = (progress.step, progress.epoch, average, validation)
            log.write_epoch(*result, lr=run.updater.lr, speed=speed)
            run.save_checkpoint(f"epoch{progress.epoch}")
            if is_best:
                run.save_checkpoint("min_ppl_model")
            run.save_state()
            if processes.is_main:
                remove_old_checkpoints(run.folder, args.save_total_limit, progress.epoch)
                log.write_samples(progress.step, answer_openings(run, loaders[1]))
            if not is_finished() and processes.any(should_stop()):
                return False
    if progress.should_stop(args.patience):
        logger.info("early stop: epoch=%d best_val_loss=%.4f", progress.epoch, progress.best_loss)
    return True


def train_epoch(
    run: Run,
    loaders: tuple[DataLoader, DataLoader],
    args: argparse.Namespace,
    log: TrainingLog,
    should_stop: Callable[[], bool],
) -> float | None:
    """做完一轮里余下的更新，返回每秒的 token 数；被中断时存下状态，返回 None。"""
    updater, progress, loader = run.updater, run.progress, loaders[0]
    loader.sampler.epoch, loader.sampler.start = progress.epoch, progress.window
    meter = Meter(updater.device, updater.processes, progress.average)

    def is_stopped_by_validation() -> bool:
        is_last = progress.window in (0, len(loader))  # 轮末总要验证
        if is_last or not progress.is_validation_due(args.eval_steps):
            return False
        with meter.paused():
            return not validate_mid_epoch(run, loaders[1], log, should_stop)

    is_stopped = is_stopped_by_validation()  # 上次正是在验证时被中断的
    for batch in () if is_stopped else loader:
        sums, grad_norm = updater.step(batch)
        num_cells = updater.splitter.count_cells(batch)
        meter.add(sums, num_cells=num_cells, num_padding=num_cells - sum(batch.lengths))
        progress.advance()
        log.advance()
        should_log = progress.step % args.log_step == 0
        if should_log or updater.device.type == "cpu":
            updater.check_finite()
        if should_log:
            position = (progress.step, progress.epoch + 1)
            log.write_step(*position, meter.read(), lr=updater.lr, grad_norm=float(grad_norm))
        is_stopped = is_stopped_by_validation() or updater.processes.any(should_stop())
        if is_stopped or (args.save_steps and progress.step % args.save_steps == 0):
            meter.flush()
            run.save_state()
        if is_stopped:
            return None
    updater.check_finite()
    return None if is_stopped else meter.read_epoch_speed()


def validate_mid_epoch(
    run: Run, loader: DataLoader, log: TrainingLog, should_stop: Callable[[], bool]
) -> bool:
    """在一轮中间验证，变好了就存下来，随时可以拿它聊天；返回是否做完了，没有被中断。"""
    run.updater.check_finite()
    validation = evaluate(run.updater, loader, should_stop)
    if validation is None:
        return False
    log.write_mid_epoch(run.progress.step, run.progress.epoch + 1, validation)
    if run.progress.record_validation(validation.loss):
        run.save_checkpoint("min_ppl_model")
    return True


def answer_openings(run: Run, loader: DataLoader) -> str:
    """回答验证集的头几段对话，几句示例回复，Markdown。"""
    dataset = loader.dataset
    samples = [dataset.table[i].tolist() for i in dataset.indices[:NUM_SAMPLES]]
    try:
        return sample_replies(run.model, run.tokenizer, samples)
    except (RuntimeError, MemoryError) as error:  # 示例要另存一份权重；放不下也不能停下训练
        logger.warning("samples skipped: %s", str(error).split("\n")[0])
        return ""


def run_training(
    args: argparse.Namespace, devices: list[torch.device], processes: Processes
) -> tuple[Path, Progress | None]:
    """准备、训练，返回文件夹和进度；被中断时进度是 None。

    返回时模型和 DDP 都已释放：进程组要在它们之后才能拆掉。
    """
    run, loaders = prepare_run(args, devices, processes)
    run.overview = overview(run, loaders, devices)
    for name, value in run.overview.items():
        logger.info("%s=%s", name, value)
    if train(run, loaders, args):
        return run.folder, run.progress
    logger.warning("interrupted: step=%d, continue with --resume", run.progress.step)
    return run.folder, None


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.vocab_path, args.model_config = map(find_shipped, (args.vocab_path, args.model_config))
    processes = Processes.from_environment()
    configure_logging(
        args.log_path if processes.is_main else None,
        console=processes.is_main,
        is_default=args.log_path is parser.get_default("log_path"),
    )
    quiet_transformers()
    devices = choose_devices(args.device, processes, no_cuda=args.no_cuda)
    check_options(args, len(devices))
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_failures())
        stack.enter_context(processes.join(devices[0]))
        processes.share(lambda: stack.enter_context(occupy(args.save_model_dir)))
        run_folder, progress = run_training(args, devices, processes)
    if progress is None:
        return EXIT_INTERRUPTED
    curve_path = run_folder / "loss.png"
    losses = progress.train_losses, progress.val_losses
    if processes.is_main and save_loss_curve(curve_path, *losses):
        logger.info("curve=%s", curve_path)
    return 0


if __name__ == "__main__":
    run_cli(main)
