"""给整个文件里的每段对话接上一句回复：成批生成，中断后接着做。

做到一半的回复在输出文件旁边的 ``.part`` 里，每批写一次；全部做完才一次写出输出文件。
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from chitchat.chat.candidates import Candidate
from chitchat.chat.chatbot import Chatbot
from chitchat.chat.generation import MAX_ROWS, Row
from chitchat.chat.options import KNOBS, SamplingOptions
from chitchat.chat.scoring import score_continuations
from chitchat.chat.whole_files.metrics import build_report, require_sacrebleu
from chitchat.chat.whole_files.partial_replies import PartialReplies
from chitchat.errors import UserError
from chitchat.files import atomic_file, check_writable
from chitchat.tokens.tokenizer import decode_response, encode_dialogues, encode_utterances


def answer_file(
    loading: Future[Chatbot],
    read_input: Callable[[], Iterable[list[str]]],
    output_path: Path,
    options: SamplingOptions,
    *,
    seed: int | None,
    with_report: bool,
    settings: Mapping[str, object],
) -> str:
    """给每段对话接上回复，写进 output_path，布局与语料相同。

    一段对话的回复只取决于 seed、它的序号和它自己，与怎样分批、从哪里接着做无关。

    Args:
        loading: 正在读入的模型；输入有误时不必等它。
        read_input: 给出各段对话；输出能写时才调用。
        output_path: 结果，不能已经存在。
        options: 采样的旋钮。
        seed: 随机种子，None 表示每次不同，接着做时仍用上次的。
        with_report: True 时每段的最后一句当参考答案，不作为上文；只有一句的对话略去。
        settings: 影响回复的其他选项（模型、精度等），接着做时不能变。

    Returns:
        评价表；with_report 为 False 时是空的。

    Raises:
        UserError: 输入有误，output_path 已经存在，或 .part 不是同样的输入和选项做出来的。
    """
    _check_output(output_path)
    if with_report:
        require_sacrebleu()
    dialogues = _keep_answerable(read_input(), min_utterances=2 if with_report else 1)
    contexts = [dialogue[:-1] if with_report else dialogue for dialogue in dialogues]
    identity = {**_identify(contexts, options), "report": with_report, **settings}
    partial = PartialReplies(output_path.with_name(output_path.name + ".part"), identity, seed)
    bot = loading.result()
    replies = _complete(partial, bot, contexts, options)
    # 在 .part 删去之前：算到一半被中断，再运行时不必重新生成
    report = _evaluate(bot, dialogues, replies, options) if with_report else ""
    _write_output(output_path, contexts, replies)
    partial.path.unlink()
    return report


def _complete(
    partial: PartialReplies,
    bot: Chatbot,
    contexts: Sequence[Sequence[str]],
    options: SamplingOptions,
) -> list[str]:
    """把还没有的回复做完，每批记下；给出全部，次序与 contexts 相同。"""
    num_done = len(partial.replies)
    with (
        contextlib.closing(partial),
        tqdm(total=len(contexts), initial=num_done, unit="reply", disable=None) as bar,
    ):
        for batch in answer_batches(bot, contexts, options, partial.seed, done=partial.replies):
            partial.add(batch)
            bar.update(len(batch))
    return [partial.replies[i] for i in range(len(contexts))]


def _evaluate(
    bot: Chatbot,
    dialogues: Sequence[Sequence[str]],
    replies: Sequence[str],
    options: SamplingOptions,
) -> str:
    """评价表：每段的最后一句是参考答案。"""
    contexts = [dialogue[:-1] for dialogue in dialogues]
    references = [dialogue[-1] for dialogue in dialogues]
    return build_report(replies, references, reference_ppl(bot, contexts, references, options))


def _identify(contexts: Sequence[Sequence[str]], options: SamplingOptions) -> dict[str, object]:
    """由什么做出来的：输入的内容和全部旋钮。"""
    return {
        "input_path": hashlib.sha256(json.dumps(contexts).encode()).hexdigest(),
        "greedy": options.greedy,
        **{name: getattr(options, knob.field) for name, knob in KNOBS.items()},
    }


def _check_output(output_path: Path) -> None:
    """在等模型之前就看出输出文件不能写；已有的文件从不覆盖。"""
    if output_path.is_dir() or not output_path.name:
        raise UserError(f"--output_path {output_path} 是文件夹：请写明文件名")
    _refuse_existing(output_path)
    check_writable(output_path.parent)


def _refuse_existing(output_path: Path) -> None:
    if output_path.exists():
        raise UserError(f"--output_path {output_path} 已经存在：请换一个名字，或先移走它")


def _write_output(
    output_path: Path, contexts: Sequence[Sequence[str]], replies: Sequence[str]
) -> None:
    """按语料的布局写出全部对话；做的时候别的程序写了同名的文件，也不覆盖。"""
    _refuse_existing(output_path)
    with (
        atomic_file(output_path) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for context, reply in zip(contexts, replies, strict=True):
            file.write("\n".join([*context, reply]) + "\n\n")


def _keep_answerable(dialogues: Iterable[list[str]], min_utterances: int) -> list[list[str]]:
    """至少 min_utterances 句的对话；一段也没有时报错。"""
    kept = [dialogue for dialogue in dialogues if len(dialogue) >= min_utterances]
    if not kept:
        need = "至少两句的对话" if min_utterances > 1 else "对话"
        raise UserError(f"--input_path 里没有{need}：请写入一行一句、空行分隔的对话")
    return kept


def answer_batches(
    bot: Chatbot,
    dialogues: Sequence[Sequence[str]],
    options: SamplingOptions,
    seed: int,
    *,
    done: Mapping[int, str],
) -> Iterator[list[tuple[int, str]]]:
    """成批回答，逐批给出（序号, 回复）；按上文的长度排序后分批，补齐因此很少。

    Args:
        bot: 模型。
        dialogues: 每段的各句，最后一句等待回答。
        options: 采样的旋钮。
        seed: 随机种子。
        done: 已有回复的序号，不再回答。
    """
    histories = encode_dialogues(bot.tokenizer, dialogues)
    contexts = [bot.build_context(history, options)[0] for history in histories]
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    order = [i for i in order if i not in done]
    for start in range(0, len(order), MAX_ROWS):
        batch = order[start : start + MAX_ROWS]
        rngs = [random.Random(f"{seed}/{i}") for i in batch]
        replies: list[Row] | list[Candidate]
        if bot.num_candidates > 1:
            replies = [
                bot.rank_candidates(contexts[i], options, rng)[0]
                for i, rng in zip(batch, rngs, strict=True)
            ]
        else:
            replies = [Row(contexts[i], options, rng) for i, rng in zip(batch, rngs, strict=True)]
            bot.generator.generate(replies)
        yield [
            (i, decode_response(bot.tokenizer, reply.token_ids))
            for i, reply in zip(batch, replies, strict=True)
        ]


def reference_ppl(
    bot: Chatbot,
    dialogues: Sequence[Sequence[str]],
    references: Sequence[str],
    options: SamplingOptions,
) -> float:
    """模型对参考答案（含 [SEP]）的困惑度，按 token 平均。"""
    pairs = []
    histories = encode_dialogues(bot.tokenizer, dialogues)
    targets = encode_utterances(bot.tokenizer, references)
    for history, reference in zip(histories, targets, strict=True):
        context, _ = bot.build_context(history, options)
        room = bot.max_positions - len(context)
        pairs.append((context, [*reference, bot.ids.sep][:room]))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    log_prob_sum = sum(score_continuations(bot.engine, pairs, bot.ids.pad))
    num_tokens = sum(len(continuation) for _, continuation in pairs)
    return math.exp(-log_prob_sum / num_tokens)
