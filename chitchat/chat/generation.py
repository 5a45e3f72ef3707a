"""生成：从一批上下文逐个 token 地生成回复，或给已有的文字打分。

形状记号: B 批大小   T 上下文的 token 数   V 词表大小   C 隐藏宽度
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chitchat.chat.engine import Engine, KeyValueCache
from chitchat.chat.options import SamplingOptions
from chitchat.chat.sampling import (
    apply_repetition_penalty,
    ban_repeated_ngrams,
    candidate_probs,
    draw,
)
from chitchat.tokens.tokenizer import SpecialIds

MAX_ROWS = 32  # 一批最多几行：内存有数；再大，CPU 上每行也快不了多少


@dataclass
class Response:
    """一句生成的回复。"""

    token_ids: list[int] = field(default_factory=list)  # 不含 [SEP]
    log_prob_sum: float = 0.0  # nat，含 [SEP]；不要分数时是 0
    num_scored: int = 0  # log_prob_sum 是多少个 token 之和

    @property
    def likelihood(self) -> float:
        """平均每个 token 的对数概率，nat；按长度归一，长句不吃亏。"""
        return self.log_prob_sum / max(1, self.num_scored)


class Generator:
    """从上下文成批生成回复：一行是普通的对话，多行是多个候选或整个文件。"""

    def __init__(self, engine: Engine, ids: SpecialIds, forbidden_ids: Sequence[int]) -> None:
        """forbidden_ids 从不生成；第一个 token 也不能是 [SEP]，所以回复不会为空。"""
        self.engine = engine
        self.ids = ids
        vocab_size = engine.vocab_size
        self._forbidden = torch.zeros(vocab_size, device=engine.device)  # (V,)，加到分数上
        self._forbidden[list(forbidden_ids)] = -torch.inf
        self._forbidden_at_start = self._forbidden.clone()
        self._forbidden_at_start[ids.sep] = -torch.inf

    @torch.inference_mode()
    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        options: SamplingOptions,
        rngs: Sequence[random.Random],
        *,
        with_scores: bool = False,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """生成每个上下文的回复。

        Args:
            contexts: 每行的上下文；各行相同时（多个候选）只算一次。
            options: 采样的旋钮。
            rngs: 每行一个随机数源；一行的回复只取决于它自己的上下文和随机数源，与同批的其他行无关。
            with_scores: True 时算出回复的对数概率（按模型原来的分布，不受旋钮影响）。
            on_token: 只有一行时，每生成一个 token（不含 [SEP]）就调用。
        """
        cache, hidden, pad_mask, lengths = self._read_contexts(contexts, options.max_len)
        responses = [Response() for _ in contexts]
        rows = list(range(len(contexts)))  # 批里每行对应的回复
        alive = list(rows)  # 批里还没说完的行
        for step in range(options.max_len):
            logits = self.engine.logits(hidden)[:, -1]  # (B, V)
            chosen = self._choose(
                logits, [responses[row].token_ids for row in rows], options,
                [rngs[row].random() for row in rows],
            )  # fmt: skip
            if with_scores:
                _add_scores(logits, chosen, [(i, responses[rows[i]]) for i in alive])
            for i in list(alive):
                if chosen[i] == self.ids.sep:
                    alive.remove(i)
                    continue
                responses[rows[i]].token_ids.append(chosen[i])
                if on_token is not None:
                    on_token(chosen[i])
            if not alive or step + 1 == options.max_len:
                break
            if len(alive) <= len(rows) / 2:  # 一半已说完，才值得搬一次缓存
                kept = torch.tensor(alive, device=self.engine.device)
                cache, lengths = cache.select(kept), lengths[kept]
                pad_mask = None if pad_mask is None else pad_mask[kept]
                rows, chosen = [rows[i] for i in alive], [chosen[i] for i in alive]
                alive = list(range(len(rows)))
            hidden = self._step(chosen, cache, lengths + step, pad_mask)
        return responses

    def _read_contexts(
        self, contexts: Sequence[Sequence[int]], max_len: int
    ) -> tuple[KeyValueCache, Tensor, Tensor | None, Tensor]:
        """送入上下文；左侧补齐，最后一列因此总是最新的 token。

        Returns:
            缓存；最后一列的隐藏状态 (B, 1, C)；加到注意力分数上、盖住补齐的 mask (B, T + max_len)，
            没有补齐时是 None；各行上下文的长度 (B,)。
        """
        device, num_rows = self.engine.device, len(contexts)
        lengths = torch.tensor([len(context) for context in contexts], device=device)
        width = max(map(len, contexts))
        if all(context == contexts[0] for context in contexts):
            cache = self.engine.new_cache(1, width + max_len)
            input_ids = torch.tensor([contexts[0]], device=device)
            hidden = self.engine.hidden(input_ids, cache)[:, -1:]
            if num_rows > 1:
                same = torch.zeros(num_rows, dtype=torch.long, device=device)
                cache, hidden = cache.select(same), hidden[same]
            return cache, hidden, None, lengths
        cache = self.engine.new_cache(num_rows, width + max_len)
        padded = [[self.ids.pad] * (width - len(context)) + list(context) for context in contexts]
        columns = torch.arange(width + max_len, device=device)
        is_pad = columns < (width - lengths)[:, None]  # (B, T + max_len)
        pad_mask = torch.zeros(is_pad.shape, dtype=self.engine.dtype, device=device)
        pad_mask.masked_fill_(is_pad, -torch.inf)
        order = columns[:width]
        # 补齐的位置也要看得见自己，否则注意力对空集归一，得到 NaN。
        mask = pad_mask[:, None, :width].repeat(1, width, 1)  # (B, T, T)
        mask.masked_fill_(order[:, None] < order, -torch.inf).diagonal(dim1=1, dim2=2).zero_()
        positions = (order - (width - lengths)[:, None]).clamp_min(0)
        hidden = self.engine.hidden(
            torch.tensor(padded, device=device), cache, positions=positions, mask=mask[:, None]
        )
        return cache, hidden[:, -1:], pad_mask, lengths

    def _step(
        self, tokens: list[int], cache: KeyValueCache, positions: Tensor, pad_mask: Tensor | None
    ) -> Tensor:
        """每行送入一个 token，给出隐藏状态 (B, 1, C)。"""
        input_ids = torch.tensor(tokens, device=self.engine.device)[:, None]
        if pad_mask is None:
            return self.engine.hidden(input_ids, cache)
        mask = pad_mask[:, None, None, : cache.length + 1]
        return self.engine.hidden(input_ids, cache, positions=positions[:, None], mask=mask)

    def _choose(
        self,
        logits: Tensor,
        generated: Sequence[list[int]],
        options: SamplingOptions,
        uniforms: Sequence[float],
    ) -> list[int]:
        """按旋钮抽出每行的下一个 token；generated 中说完的行不再变长。"""
        step = max(map(len, generated))
        logits = logits + (self._forbidden if step else self._forbidden_at_start)
        if step and options.repetition_penalty != 1:
            padded = [row + row[-1:] * (step - len(row)) for row in generated]
            logits = apply_repetition_penalty(
                logits, torch.tensor(padded, device=logits.device), options.repetition_penalty
            )
        if options.no_repeat_ngram_size:
            logits = ban_repeated_ngrams(logits, generated, options.no_repeat_ngram_size)
        return draw(*candidate_probs(logits, options), uniforms)


def _add_scores(
    logits: Tensor, chosen: Sequence[int], rows: Sequence[tuple[int, Response]]
) -> None:
    """把刚抽到的 token 的对数概率记到各行的回复上；logits 形状 (B, V)。"""
    token_ids = torch.tensor(chosen, device=logits.device)[:, None]
    log_probs = logits.log_softmax(dim=-1).gather(1, token_ids)[:, 0].tolist()
    for i, response in rows:
        response.log_prob_sum += log_probs[i]
        response.num_scored += 1


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
