"""评价一批回复：BLEU、Distinct、长度、空与重复的比例，排成一张表。"""

from __future__ import annotations

from collections.abc import Sequence

from chitchat.errors import UserError


def require_sacrebleu() -> None:
    """确认装了 sacrebleu；它只有 --report 用得到。"""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise UserError("--report 要用 sacrebleu 算 BLEU：请先运行 pip install sacrebleu") from None


def bleu(replies: Sequence[str], references: Sequence[str], order: int) -> float:
    """语料级 BLEU，0 到 100，按字切分，最多看 order 元组。"""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="char", max_ngram_order=order, lowercase=True)
    return metric.corpus_score(list(replies), [list(references)]).score


def distinct(replies: Sequence[str], order: int) -> float:
    """不同的 order 元组占全部的比例，0 到 1，按字切分；一个也没有时是 0。

    来源: Li et al. 2016, arXiv:1510.03055 §5.2 的 Distinct-1、Distinct-2。
    """
    ngrams = [
        reply[start : start + order]
        for reply in ("".join(reply.split()) for reply in replies)
        for start in range(len(reply) - order + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def build_report(replies: Sequence[str], references: Sequence[str], ppl: float) -> str:
    """排成 Markdown 表，每行一项。

    Args:
        replies: 模型的回复，至少一句。
        references: 参考答案，与 replies 一一对应。
        ppl: 模型对参考答案的困惑度。
    """
    num_replies = len(replies)
    num_empty = sum(not reply.strip() for reply in replies)
    num_repeated = num_replies - len(set(replies))
    rows = [
        ("回复数", f"{num_replies}"),
        ("参考答案的困惑度", f"{ppl:.2f}"),
        ("BLEU-2", f"{bleu(replies, references, 2):.2f}"),
        ("BLEU-4", f"{bleu(replies, references, 4):.2f}"),
        ("Distinct-1", f"{distinct(replies, 1):.4f}"),
        ("Distinct-2", f"{distinct(replies, 2):.4f}"),
        ("平均长度（字）", f"{sum(map(len, replies)) / num_replies:.2f}"),
        ("空回复", f"{num_empty / num_replies:.2%}"),
        ("与前面某句相同的回复", f"{num_repeated / num_replies:.2%}"),
    ]
    return "".join(
        f"| {name} | {value} |\n" for name, value in [("项目", "值"), ("---", "--:"), *rows]
    )
