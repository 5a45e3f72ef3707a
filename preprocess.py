"""预处理：把语料（默认 data/train.txt）编码成训练数据（默认 data/train.pkl）。

每段对话编码为 [CLS] u1 [SEP] u2 [SEP] …。语料边读边编码边写，从不整个放进内存。
"""

from __future__ import annotations

if __name__ == "__main__":  # 在其余的导入之前：它们要好几秒
    from chitchat.interrupts import guard_startup

    guard_startup()

import argparse
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from chitchat.cli import CliParser, bounded, configure_logging, run_cli, show
from chitchat.corpus.check import CorpusCheck, save_length_histogram
from chitchat.corpus.formats.base import Dialogue, ReadOptions
from chitchat.corpus.reader import FORMAT_NAMES, filter_dialogues, read_source, total_size
from chitchat.corpus.sources import Source, find_sources
from chitchat.corpus.statistics import Statistics
from chitchat.corpus.tally import (
    Tally,
    collect_warnings,
    describe_filters,
    describe_source,
    explain_nothing,
    speaker_lines,
)
from chitchat.errors import UserError
from chitchat.files import find_shipped
from chitchat.tokens.batch_encoder import DialogueEncoder, EncodedBatch
from chitchat.tokens.token_writer import check_folder, open_writer
from chitchat.tokens.tokenizer import (
    load_tokenizer,
    read_vocab_lines,
    special_ids,
    vocab_fingerprint,
)
from chitchat.tokens.vocabulary import derive_reference_vocab
from chitchat.tokens.vocabulary_learning import (
    KEPT_TOKENS,
    check_new_vocab,
    learn_vocab,
    save_vocab,
)

logger = logging.getLogger("chitchat.preprocess")

DIALOGUES_PER_BATCH = 1000
MAX_SUMMARY_LINES = 40


def build_parser() -> argparse.ArgumentParser:
    """命令行参数。"""
    parser = CliParser(description="把语料编码成训练数据")
    add_path_options(parser.add_argument_group("文件").add_argument)
    add_format_options(parser.add_argument_group("格式").add_argument)
    add_log_options(parser.add_argument_group("聊天记录").add_argument)
    add_filter_options(parser.add_argument_group("检查与筛选").add_argument)
    add_vocab_options(parser.add_argument_group("词表").add_argument)
    return parser


# fmt: off
def add_path_options(add: Callable) -> None:
    """读什么，写到哪里。"""
    path = {"type": Path, "metavar": "FILE"}
    add("--vocab_path", **path, default=Path("vocab/vocab.txt"),
        help="词表文件（默认 %(default)s）")
    add("--log_path", **path, default=Path("data/preprocess.log"),
        help="日志文件，追加写入（默认 %(default)s）")
    add("--train_path", type=Path, metavar="FILE", nargs="+", default=[Path("data/train.txt")],
        help="语料：一个或多个文件、文件夹或带 * 的写法，可以是压缩包或 .xlsx，- 是标准输入"
        "（默认 %(default)s）")
    add("--save_path", type=Path, metavar="PATH", default=Path("data/train.pkl"),
        help="训练数据：以 .pkl 结尾是一个文件，否则是可映射进内存的文件夹，语料再大也只占"
        "少量内存（默认 %(default)s）")


def add_format_options(add: Callable) -> None:
    """怎样读懂语料；名字与 ReadOptions 的字段相同。"""
    column = {"metavar": "NAME"}
    add("--format", choices=["auto", *FORMAT_NAMES], default="auto",
        help="语料的格式，auto 由文件名和内容认出；text 一行一句、空行分隔（默认 %(default)s）")
    add("--encoding", default="auto", metavar="NAME",
        help="语料的编码，auto 在 UTF-8、UTF-16、GB 18030、Big5 等里认出（默认 %(default)s）")
    add("--split", default="train", metavar="NAME",
        help="JSON 里有几份时用哪一份（默认 %(default)s）")
    add("--text_column", **column, help="CSV 里文字的列名（默认由列名认出）")
    add("--dialogue_column", **column, help="CSV 里对话编号的列名，同号的是一段（默认由列名认出）")
    add("--speaker_column", **column, help="CSV 聊天记录里说话人的列名（默认由列名认出）")
    add("--time_column", **column, help="CSV 聊天记录里时间的列名（默认由列名认出）")


def add_log_options(add: Callable) -> None:
    """怎样把聊天记录变成对话；名字与 LogOptions 的字段相同。"""
    add("--gap_minutes", type=bounded(float, above=0), default=30, metavar="MINUTES",
        help="沉默超过这么多分钟就另起一段对话（默认 %(default)s）")
    add("--join_seconds", type=bounded(float, minimum=0), default=0, metavar="SECONDS",
        help="同一人接连的消息相隔不超过这么多秒才接成一句，更久就另起一段，0 表示都接"
        "（默认 %(default)s）")
    add("--reply_speaker", metavar="NAME",
        help="机器人要学的人：昵称、账号，或 me（导出记录的人）；对话都由别人开头、以他结尾"
        "（默认谁都学）")
    add("--list_speakers", action="store_true", help="只列出谁说了多少句话，不写训练数据")
    add("--no_mask_private", dest="mask_private", action="store_false",
        help="不要隐去电话、证件号、银行卡号、邮箱和网址（默认隐去）")


def add_filter_options(add: Callable) -> None:
    """检查语料，或只要其中一部分。"""
    optional_count = bounded(int, minimum=0)
    add("--check", action="store_true", help="只读不写：报告读懂了什么、有哪些可疑之处")
    add("--plot", type=Path, metavar="PNG", help="把每段对话的 token 数画成直方图，存到这里")
    add("--max_len", type=bounded(int, minimum=2), default=150, metavar="TOKENS",
        help="报告有多少对话超过它，与 train.py 的 --max_len 同义；不截断（默认 %(default)s）")
    add("--clean", action="store_true",
        help="清洗：去掉 @名字、话题、网址等，在没有汉字、与上句相同等的句子处切断（默认不洗）")
    add("--min_turns", type=bounded(int, minimum=1), default=1, metavar="N",
        help="不要少于 N 句的对话（默认 %(default)s）")
    add("--max_turns", type=optional_count, default=0, metavar="N",
        help="不要多于 N 句的对话，0 表示不限（默认 %(default)s）")
    add("--drop_duplicates", action="store_true", help="不要与前面完全相同的对话")
    add("--max_dialogues", type=optional_count, default=0, metavar="N",
        help="筛选之后只要前 N 段对话，0 表示不限（默认 %(default)s）")


def add_vocab_options(add: Callable) -> None:
    """先造出词表，写到 --vocab_path，再用它编码。"""
    add("--build_vocab", type=bounded(int, minimum=len(KEPT_TOKENS) + 1), metavar="SIZE",
        help="由语料学一份 SIZE 项的词表（默认不学）")
    add("--bert_vocab", type=Path, metavar="FILE",
        help="由 bert-base-chinese 的 vocab.txt 得到原项目公开权重所用的词表（默认不用）")
# fmt: on


class Corpus:
    """命令行所指的语料，可以从头读好几遍。

    Attributes:
        sources: 要读的各个文件。
        tallies: 最近一遍读到的各个文件的数目，次序与 sources 相同。
        num_kept: 最近一遍筛选之后留下的段数。
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.sources = find_sources(args.train_path, args.encoding)
        names = [field.name for field in fields(ReadOptions)]
        self.options = ReadOptions(**{name: getattr(args, name) for name in names})
        names = ("min_turns", "max_turns", "max_dialogues", "drop_duplicates")
        self.filters = {name: getattr(args, name) for name in names}
        self.tallies: list[Tally] = []
        self.num_kept = 0

    def __iter__(self) -> Iterator[tuple[Source, Dialogue]]:
        """逐段读出、筛选，显示进度。"""
        self.tallies, self.num_kept = [], 0
        size = total_size(self.sources)
        with tqdm(total=size, unit="B", unit_scale=True, desc="read", disable=None) as bar:
            dialogues = filter_dialogues(self._read_all(bar, size), **self.filters)
            for dialogue in dialogues:
                self.num_kept += 1
                yield self.sources[len(self.tallies) - 1], dialogue

    def _read_all(self, bar: tqdm, size: int) -> Iterator[Dialogue]:
        finished = 0
        for source in self.sources:
            self.tallies.append(Tally())
            position = 0

            def report(new: int, finished: int = finished) -> None:
                nonlocal position
                position = max(position, new)
                bar.update(min(size, finished + position) - bar.n)

            yield from self._read_one(source, self.tallies[-1], report)
            finished += position

    def _read_one(self, source: Source, tally: Tally, report: Callable) -> Iterator[Dialogue]:
        """文件夹里的一个文件一段对话也读不出、又不是指名要读的，就跳过，记下为什么。"""
        try:
            yield from read_source(source, self.options, tally, report)
        except UserError as error:
            if source.is_listed or tally.num_dialogues or len(self.sources) == 1:
                raise
            tally.skipped = str(error).removeprefix(f"{source.name}：")
            tally.warnings.append(f"{source.name} 没有读：{tally.skipped}")

    def summary(self) -> list[str]:
        """每个来源当作了什么、凭什么，聊天记录里留下和没有留下的各有多少。"""
        found = zip(self.sources, self.tallies, strict=False)
        lines = [line for source, tally in found for line in describe_source(source, tally)]
        if len(lines) > MAX_SUMMARY_LINES:
            more = len(lines) - MAX_SUMMARY_LINES
            lines = [*lines[:MAX_SUMMARY_LINES], f"……还有 {more:,} 行，用 --check 逐个文件看"]
        num_read = sum(tally.num_dialogues for tally in self.tallies)
        if num_read != self.num_kept:
            lines.append(
                f"读到 {num_read:,} 段，{describe_filters(self.filters)} 留下 {self.num_kept:,} 段"
            )
        return lines


Batch = list[tuple[Source, Dialogue]]


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[Batch, EncodedBatch]]:
    """成批编码；批的大小固定，内存因此与语料大小无关。"""
    encoder = DialogueEncoder(tokenizer)
    dialogues = iter(corpus)
    while batch := list(itertools.islice(dialogues, DIALOGUES_PER_BATCH)):
        yield batch, encoder.encode([dialogue.utterances for _, dialogue in batch])


def make_vocab(args: argparse.Namespace, corpus: Corpus) -> None:
    """按 --build_vocab 或 --bert_vocab 造出词表，写到 --vocab_path。"""
    if args.build_vocab and args.bert_vocab:
        raise UserError("--build_vocab 与 --bert_vocab 只能用一个：请去掉其中之一")
    if args.check:
        raise UserError(
            "--check 只读不写，不能同时造词表：请去掉 --check 造出词表，"
            "再去掉 --build_vocab、--bert_vocab，用 --vocab_path 指定它来检查"
        )
    check_new_vocab(args.vocab_path)
    if args.bert_vocab:
        vocab = derive_reference_vocab(read_vocab_lines(args.bert_vocab))
    else:
        utterances = (u for _, dialogue in corpus for u in dialogue.utterances)
        vocab = learn_vocab(utterances, args.build_vocab)
    save_vocab(args.vocab_path, vocab)
    logger.info("vocab=%s vocab_size=%d", args.vocab_path, len(vocab))


def check(corpus: Corpus, tokenizer: Tokenizer, max_len: int) -> Statistics:
    """读完语料，把读懂了什么打印到标准输出。"""
    result = Statistics(special_ids(tokenizer).unk)
    findings = CorpusCheck(tokenizer, max_len, result)
    for batch, encoded in encode_corpus(corpus, tokenizer):
        result.add([dialogue for _, dialogue in batch], encoded)
        for (source, dialogue), token_ids in zip(batch, encoded.rows(), strict=True):
            findings.add(dialogue, token_ids, source.name)
    show("\n".join(corpus.summary()))
    check_not_empty(corpus, result)
    show("\n".join(findings.report(corpus.tallies)))
    return result


def save(args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer) -> Statistics:
    """编码并写出训练数据。"""
    vocab_size = tokenizer.get_vocab_size()
    meta = {
        "vocab_path": str(args.vocab_path),
        "vocab_size": vocab_size,
        "vocab_fingerprint": vocab_fingerprint(tokenizer),
        "train_path": [str(path) for path in args.train_path],
        "options": {**vars(corpus.options), **corpus.filters},
    }
    result = Statistics(special_ids(tokenizer).unk)
    with open_writer(args.save_path, vocab_size, meta) as writer:
        for batch, encoded in encode_corpus(corpus, tokenizer):
            writer.write(encoded)
            result.add([dialogue for _, dialogue in batch], encoded)
        check_not_empty(corpus, result)
        meta["dialogues"] = result.num_dialogues
        meta["utterances"], meta["tokens"] = result.num_utterances, result.num_tokens
    show("\n".join(corpus.summary()))
    for warning in collect_warnings(corpus.tallies):
        logger.warning("%s", warning)
    return result


def list_speakers(corpus: Corpus) -> None:
    """把各个来源里谁说了多少打印到标准输出。"""
    for _ in corpus:
        pass
    for source, tally in zip(corpus.sources, corpus.tallies, strict=False):
        show("\n".join([*describe_source(source, tally), *speaker_lines(tally)]))


def check_not_empty(corpus: Corpus, result: Statistics) -> None:
    """一段对话也没有时报错，说明丢在了哪一步。"""
    if not result.num_dialogues:
        raise UserError(explain_nothing(corpus.sources, corpus.tallies, corpus.filters))


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口；返回进程退出码。"""
    parser = build_parser()
    args = parser.parse_args(argv)
    is_default_log = args.log_path is parser.get_default("log_path")
    is_read_only = args.check or args.list_speakers
    configure_logging(None if is_read_only else args.log_path, is_default=is_default_log)
    corpus = Corpus(args)
    if args.save_path.suffix != ".pkl" and not is_read_only:
        check_folder(args.save_path)
    if args.list_speakers:
        list_speakers(corpus)
        return 0
    if args.build_vocab or args.bert_vocab:
        make_vocab(args, corpus)
    args.vocab_path = find_shipped(args.vocab_path)
    tokenizer = load_tokenizer(args.vocab_path)
    if args.check:
        result = check(corpus, tokenizer, args.max_len)
    else:
        result = save(args, corpus, tokenizer)
        for line in result.log_lines(args.max_len):
            logger.info("%s", line)
        logger.info("saved=%s", args.save_path)
    if args.plot:
        save_length_histogram(args.plot, result.lengths, args.max_len)
        logger.info("plot=%s", args.plot)
    return 0


if __name__ == "__main__":
    run_cli(main)
