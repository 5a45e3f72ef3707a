"""train.py 的全部选项，分成四组：数据、模型与设备、优化、记录与续训。"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from chitchat.cli import bounded
from chitchat.errors import UserError
from chitchat.training.dataset import IGNORE_INDEX
from chitchat.training.loss import PRECISIONS
from chitchat.training.optimizers import DEFAULT_LR
from chitchat.training.plan import FINE_TUNING_LR, MAX_WARMUP_STEPS
from chitchat.training.processes import DEFAULT_DEVICE

logger = logging.getLogger("chitchat.training.options")


def add_options(parser: argparse.ArgumentParser) -> None:
    """把全部选项加到 parser 上。"""
    add_data_options(parser.add_argument_group("数据").add_argument)
    add_model_options(parser.add_argument_group("模型与设备").add_argument)
    add_optimization_options(parser.add_argument_group("优化").add_argument)
    add_output_options(parser.add_argument_group("记录与续训").add_argument)


def check_options(args: argparse.Namespace, num_devices: int) -> None:
    """不能同用的选项报错，不再起作用的提醒一声。

    Raises:
        UserError: 选项互相矛盾。
    """
    for name, silent in (("log", None), ("gpu0_bsz", None), ("ignore_index", IGNORE_INDEX)):
        if getattr(args, name) != silent:
            logger.warning("--%s has no effect any more", name)
    if args.compile and num_devices > 1:
        raise UserError(
            "--compile 不能与 --device 的多块卡同用：请改用 torchrun 启动，每块卡一个进程"
        )
    if args.train_mmi and args.loss_on == "replies":
        raise UserError("--train_mmi 学的是由回复猜上文，不能与 --loss_on replies 同用：请去掉一个")


# fmt: off
def add_data_options(add: Callable) -> None:
    """数据从哪里来，怎样组成批次。"""
    count, optional_count = bounded(int, minimum=1), bounded(int, minimum=0)
    path = {"type": Path, "metavar": "FILE"}
    add("--train_path", **path, default=Path("data/train.pkl"),
        help="preprocess.py 生成的训练数据（默认 %(default)s）")
    add("--vocab_path", **path, default=Path("vocab/vocab.txt"),
        help="词表，要与预处理时相同（默认 %(default)s）")
    add("--max_len", type=bounded(int, minimum=2), default=150, metavar="TOKENS",
        help="一次最多看多少 token；更长的对话在句子之间切成几块，每块带上前一句作上文"
        "（默认 %(default)s）")
    add("--loss_on", choices=["all", "replies"], default="all",
        help="预测哪些句子；replies：只有每段的第 2、4、… 句，偶数句是机器人说的语料用它"
        "（默认 %(default)s）")
    add("--val_num", type=count, default=8000, metavar="DIALOGUES",
        help="留作验证的对话数；语料不足它的 10 倍时改留十分之一（默认 %(default)s）")
    add("--batch_size", type=count, default=4, metavar="DIALOGUES",
        help="每个批次的对话数，所有显卡和进程合计（默认 %(default)s）")
    add("--gradient_accumulation_steps", type=count, default=4, metavar="BATCHES",
        help="每多少个批次更新一次参数；放得下时合成一次前向，数值不变（默认 %(default)s）")
    add("--batch_tokens", type=optional_count, default=0, metavar="TOKENS",
        help="每次更新大约多少 token，代替前两项，长短对话的窗口因此一样大；0 表示不用"
        "（默认 %(default)s）")
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
        help="前向的精度；auto：bf16 快就用它，老 GPU 用 fp16，否则 fp32；续训时与上次相同"
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
        help="优化器；muon 只用于各层的二维权重，其余用 adamw；auto：开始时量一两秒，muon 的"
        "正交化相对前向和反向不太久就用它，从已有的权重继续时用 adamw（默认 %(default)s）")
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
    add("--eval_steps", type=optional_count, default=0, metavar="STEPS",
        help="一轮中间每多少次参数更新验证一次，变好就存进 min_ppl_model，可以拿它聊天；"
        "0 表示只在每轮结束时（默认 %(default)s）")
    add("--save_total_limit", type=optional_count, default=0, metavar="K",
        help="只保留最新的 K 个 epoch 文件夹，0 表示全部保留（默认 %(default)s）")
# fmt: on
