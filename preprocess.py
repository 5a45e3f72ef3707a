"""预处理：把 data/train.txt 编码成 data/train.pkl。

每段对话编码为 [CLS] u1 [SEP] u2 [SEP] …，全部对话是一个 list[list[int]]。
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from chitchat.corpus import read_dialogues
from chitchat.runtime import CliParser, UserError, configure_logging, run_cli
from chitchat.token_table import save_token_lists
from chitchat.tokenizer import encode_utterances, load_tokenizer, special_ids

logger = logging.getLogger("chitchat.preprocess")

DIALOGUES_PER_BATCH = 1000
DEFAULT_MAX_LEN = 150  # train.py 的 --max_len 默认值


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    parser = CliParser(description="把文本语料编码成训练数据")
    parser.add_argument(
        "--vocab_path",
        type=Path,
        default=Path("vocab/vocab.txt"),
        help="词表文件（默认 %(default)s）",
    )
    parser.add_argument(
        "--log_path",
        type=Path,
        default=Path("data/preprocess.log"),
        help="日志文件，追加写入（默认 %(default)s）",
    )
    parser.add_argument(
        "--train_path",
        type=Path,
        default=Path("data/train.txt"),
        help="语料：UTF-8 文本，一行一句，空行分隔对话（默认 %(default)s）",
    )
    parser.add_argument(
        "--save_path",
        type=Path,
        default=Path("data/train.pkl"),
        help="输出文件，供 train.py 使用（默认 %(default)s）",
    )
    return parser


def encode_corpus(train_path: Path, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """逐段读语料，成批编码；每段给出各句的 token id。"""
    size = train_path.stat().st_size if train_path.is_file() else 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="encode", disable=None) as bar:

        def report(position: int) -> None:
            bar.update(position - bar.n)

        dialogues = read_dialogues(train_path, report)
        while batch := list(itertools.islice(dialogues, DIALOGUES_PER_BATCH)):
            encoded = iter(encode_utterances(tokenizer, [u for d in batch for u in d]))
            for dialogue in batch:
                yield list(itertools.islice(encoded, len(dialogue)))


def log_statistics(
    dialogues: Sequence[Sequence[int]], *, num_utterances: int, num_unk: int
) -> None:
    """写出语料的概况，每项一行。"""
    lengths = [len(token_ids) for token_ids in dialogues]
    num_tokens = sum(lengths)
    logger.info("dialogues=%d", len(dialogues))
    logger.info("utterances=%d", num_utterances)
    logger.info("tokens=%d", num_tokens)
    logger.info(
        "length_mean=%.1f length_median=%g length_max=%d",
        num_tokens / len(lengths),
        statistics.median(lengths),
        max(lengths),
    )
    logger.info("unk_tokens=%d unk_share=%.4f%%", num_unk, 100 * num_unk / num_tokens)
    too_long = sum(length > DEFAULT_MAX_LEN for length in lengths)
    logger.info("dialogues_longer_than_%d=%d", DEFAULT_MAX_LEN, too_long)


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    args = build_parser().parse_args(argv)
    configure_logging(args.log_path)
    tokenizer = load_tokenizer(args.vocab_path)
    ids = special_ids(tokenizer)

    dialogues: list[list[int]] = []
    num_utterances = num_unk = 0
    for utterances in encode_corpus(args.train_path, tokenizer):
        token_ids = [ids.cls]
        for utterance in utterances:
            token_ids += [*utterance, ids.sep]
        dialogues.append(token_ids)
        num_utterances += len(utterances)
        num_unk += token_ids.count(ids.unk)
    if not dialogues:
        raise UserError(
            f"{args.train_path} 里没有对话：文件是空的或只有空白；请写入一行一句、空行分隔的对话"
        )
    save_token_lists(args.save_path, dialogues)
    log_statistics(dialogues, num_utterances=num_utterances, num_unk=num_unk)
    logger.info("saved=%s", args.save_path)
    return 0


if __name__ == "__main__":
    run_cli(main)
