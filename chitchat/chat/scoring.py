"""打分：已有的文字在模型看来有多可能。挑选候选、算困惑度都用它。"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chitchat.chat.engine import Engine

MAX_ROWS = 32  # 一批最多几行


def score_continuations(
    engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """每对 (前文, 后文) 里后文的对数概率之和，nat；每批 MAX_ROWS 对，长短相近的排在一起最快。

    Args:
        engine: 模型。
        pairs: 前文、后文都至少一个 token，合起来不超过模型的位置数。
        pad_id: 补齐用的 id；右侧补齐，因果注意力看不到它。
    """
    sums: list[float] = []
    for start in range(0, len(pairs), MAX_ROWS):
        sums += _score_batch(engine, pairs[start : start + MAX_ROWS], pad_id)
    return sums


@torch.inference_mode()
def _score_batch(
    engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    rows = [[*prefix, *continuation] for prefix, continuation in pairs]
    width = max(map(len, rows))
    padded = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    input_ids = padded[:, :-1].to(engine.device)
    hidden = engine.hidden(input_ids, engine.new_cache(len(rows), width - 1))
    sums = []
    for i, (prefix, continuation) in enumerate(pairs):
        start = len(prefix) - 1
        logits = engine.logits(hidden[i : i + 1, start : start + len(continuation)])[0]
        targets = torch.tensor(continuation, device=engine.device)
        sums.append(-float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")))
    return sums
