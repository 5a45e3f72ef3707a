"""采样：把下一个 token 的分数变成候选的概率，再抽一个。都是不改入参的纯函数。

次序固定：禁用 → 重复惩罚 → 禁止重复的 n 元组 → temperature → top-k → top-p → min-p。

形状记号: B 批大小   V 词表大小   K 候选数   T 本轮回复已生成的 token 数
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chitchat.chat.options import SamplingOptions

FLOAT32_RANGE = (1e-30, 1e30)  # 更小或更大的除数在 float32 里会变成 0 或无穷，算出 NaN


def apply_repetition_penalty(logits: Tensor, generated: Tensor, penalty: float) -> Tensor:
    """降低本轮已生成 token 再次出现的概率。

    正分数除以 penalty，负分数乘以 penalty；若一律相除，负分数反而变大、更容易重复。

    Args:
        logits: 形状 (B, V)；不会被修改。
        generated: 本轮已生成的 token，形状 (B, T)，可重复，T 可为 0。
        penalty: 大于 0；1 表示不惩罚。

    来源: CTRL, arXiv:1909.05858 §4.1；与 transformers 的同名 processor 一致。
    """
    penalty = _within_float32(penalty)
    scores = logits.gather(1, generated)
    return logits.scatter(1, generated, torch.where(scores < 0, scores * penalty, scores / penalty))


def ban_repeated_ngrams(logits: Tensor, generated: Sequence[Sequence[int]], size: int) -> Tensor:
    """本轮回复里出现过的 size 元组不再出现：会补成它的 token 得 -inf。

    Args:
        logits: 形状 (B, V)；不会被修改。
        generated: 每行本轮已生成的 token。
        size: 至少 1。
    """
    rows, columns = [], []
    for row, tokens in enumerate(generated):
        tail = list(tokens[len(tokens) - size + 1 :])
        for start in range(len(tokens) - size + 1):
            if list(tokens[start : start + size - 1]) == tail:
                rows.append(row)
                columns.append(tokens[start + size - 1])
    if not rows:
        return logits
    banned = logits.clone()
    banned[rows, columns] = -torch.inf
    return banned


def candidate_probs(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """按 temperature、top-k、top-p、min-p 筛选。

    Args:
        logits: 形状 (B, V)；不会被修改。
        options: 采样的旋钮。

    Returns:
        各候选未归一的概率 (B, K)，被筛掉的是 0；以及它们的 token id (B, K)。
    """
    vocab_size = logits.size(-1)
    top_k = 1 if options.greedy else options.top_k
    has_top_p = 0 < options.top_p < 1
    if 0 < top_k < vocab_size:
        scores, token_ids = logits.topk(top_k)  # 已按分数从大到小
    elif has_top_p:
        scores, token_ids = logits.sort(descending=True)
    else:
        scores, token_ids = logits, torch.arange(vocab_size, device=logits.device).expand_as(logits)
    # 先减去最大值：除以很小的 temperature 只会得到 0 或 -inf。
    scores = scores - scores.amax(dim=-1, keepdim=True)
    probs = (scores / _within_float32(options.temperature)).softmax(dim=-1)
    if has_top_p:
        before = probs.cumsum(dim=-1) - probs
        is_kept = before < options.top_p
        is_kept[:, 0] = True
        probs = probs * is_kept
    if options.min_p > 0:
        probs = probs * (probs >= options.min_p * probs.amax(dim=-1, keepdim=True))
    return probs, token_ids


def _within_float32(value: float) -> float:
    return min(max(value, FLOAT32_RANGE[0]), FLOAT32_RANGE[1])


def draw(probs: Tensor, token_ids: Tensor, uniforms: Sequence[float]) -> list[int]:
    """每行按概率抽一个 token；概率为 0 的永远抽不到。

    Args:
        probs: 未归一的概率，形状 (B, K)，每行至少一个大于 0。
        token_ids: 对应的 token，形状 (B, K)。
        uniforms: 每行一个 [0, 1) 里的随机数；随机性全在这里，同样的数总抽到同样的 token。
    """
    if probs.size(-1) == 1:
        return token_ids[:, 0].tolist()
    cumulative = probs.double().cumsum(dim=-1)
    points = cumulative.new_tensor(uniforms)[:, None] * cumulative[:, -1:]
    picked = (cumulative <= points).sum(dim=-1, keepdim=True).clamp_max_(probs.size(-1) - 1)
    return token_ids.gather(1, picked)[:, 0].tolist()
