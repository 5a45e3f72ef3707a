"""给整个文件里的每段对话接上一句回复：成批生成，中断后接着做。

做到一半的结果在输出文件旁边的 ``.part`` 里，每批写一次；全部做完才换名成输出文件。
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from chitchat.corpus import read_dialogues
from chitchat.decoding import Chatbot
from chitchat.generation import MAX_ROWS, score_continuations
from chitchat.knobs import SamplingOptions
from chitchat.metrics import build_report, require_sacrebleu
from chitchat.runtime import UserError
from chitchat.tokenizer import decode_response, encode_dialogues, encode_utterances

DIALOGUES_PER_CHUNK = 32 * MAX_ROWS  # 在这么多段里按长度排序，写一次结果


def answer_file(
    loading: Future[Chatbot],
    input_path: Path,
    output_path: Path,
    options: SamplingOptions,
    *,
    seed: int | None,
    with_report: bool,
) -> str:
    """给每段对话接上回复，写进 output_path，布局与语料相同。

    一段对话的回复只取决于 seed、它的序号和它自己，与怎样分批、从哪里接着做无关。

    Args:
        loading: 正在读入的模型；输入有误时不必等它。
        input_path: 对话，一行一句，空行分隔。
        output_path: 结果。
        options: 采样的旋钮。
        seed: 随机种子，None 表示每次不同。
        with_report: True 时每段的最后一句当参考答案，不作为上文；只有一句的对话略去。

    Returns:
        评价表；with_report 为 False 时是空的。

    Raises:
        UserError: 输入有误，或 .part 不是由这份输入做出来的。
    """
    if with_report:
        require_sacrebleu()
    dialogues = _read_input(input_path, min_utterances=2 if with_report else 1)
    contexts = [dialogue[:-1] if with_report else dialogue for dialogue in dialogues]
    partial = output_path.with_name(output_path.name + ".part")
    num_done = _count_done(partial, contexts)
    bot = loading.result()
    bot.check_options(options)
    seed = secrets.randbits(32) if seed is None else seed
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        partial.open("a", encoding="utf-8", newline="\n") as file,
        tqdm(total=len(contexts), initial=num_done, unit="reply", disable=None) as bar,
    ):
        for start in range(num_done, len(contexts), DIALOGUES_PER_CHUNK):
            chunk = contexts[start : start + DIALOGUES_PER_CHUNK]
            rngs = [random.Random(f"{seed}/{start + i}") for i in range(len(chunk))]
            replies = answer_batch(bot, chunk, options, rngs, bar)
            for context, reply in zip(chunk, replies, strict=True):
                file.write("\n".join([*context, reply]) + "\n\n")
            file.flush()
    partial.replace(output_path)
    if not with_report:
        return ""
    references = [dialogue[-1] for dialogue in dialogues]
    replies = [dialogue[-1] for dialogue in read_dialogues(output_path)]
    return build_report(replies, references, reference_ppl(bot, contexts, references, options))


def _read_input(path: Path, min_utterances: int) -> list[list[str]]:
    """至少 min_utterances 句的对话；一段也没有时报错。"""
    dialogues = [d for d in read_dialogues(path) if len(d) >= min_utterances]
    if not dialogues:
        need = "至少两句的对话" if min_utterances > 1 else "对话"
        raise UserError(f"{path} 里没有{need}：请写入一行一句、空行分隔的对话")
    return dialogues


def _count_done(partial: Path, contexts: Sequence[Sequence[str]]) -> int:
    """.part 里已有几段；末尾没写完的一段被截去。"""
    if not partial.exists():
        return 0
    written = partial.read_bytes()
    complete = written[: written.rfind(b"\n\n") + 2] if b"\n\n" in written else b""
    partial.write_bytes(complete)
    if not complete:
        return 0
    done = list(read_dialogues(partial))
    if [dialogue[:-1] for dialogue in done] != [list(c) for c in contexts[: len(done)]]:
        raise UserError(
            f"{partial} 是另一份输入做到一半的结果：要接着做，请用原来的 --input_path；"
            "要重新做，请先删去它"
        )
    return len(done)


def answer_batch(
    bot: Chatbot,
    dialogues: Sequence[Sequence[str]],
    options: SamplingOptions,
    rngs: Sequence[random.Random],
    bar: tqdm | None = None,
) -> list[str]:
    """成批回答，按上文的长度排序后分批，补齐因此很少；结果的次序与输入相同。

    Args:
        bot: 模型。
        dialogues: 每段的各句，最后一句等待回答。
        options: 采样的旋钮。
        rngs: 每段一个随机数源。
        bar: 每答完一批就前进的进度条。
    """
    histories = encode_dialogues(bot.tokenizer, dialogues)
    contexts = [bot.build_context(history, options)[0] for history in histories]
    replies = [""] * len(contexts)
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    for start in range(0, len(order), MAX_ROWS):
        rows = order[start : start + MAX_ROWS]
        if bot.num_candidates > 1:
            responses = [bot.rank_candidates(contexts[i], options, rngs[i])[0] for i in rows]
        else:
            responses = bot.generator.generate(
                [contexts[i] for i in rows], options, [rngs[i] for i in rows]
            )
        for i, response in zip(rows, responses, strict=True):
            replies[i] = decode_response(bot.tokenizer, response.token_ids)
        if bar is not None:
            bar.update(len(rows))
    return replies


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
