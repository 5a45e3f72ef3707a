"""生成：许多行各走各的，每一步每行得到一个 token；随时可以有新的行加入、旧的行退出。

一行的回复只取决于它自己的上下文、旋钮和随机数源，与同批的其他行无关：int8 逐位如此，fp32 除了
舍入如此，bf16 不是（原因见 engine）。单独一句是 ``Generator.tokens`` 这个迭代器，关掉它就停；
服务器让许多句轮流走，用 ``Batch``。

形状记号: B 一组的行数   N 批里的行数   V 词表大小   C 隐藏宽度
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(eq=False)
class Row:
    """一行：由上下文生成的一句回复，连同它怎样生成。

    Attributes:
        context: 上下文，至少一个 token。
        options: 采样的旋钮。
        rng: 随机数源，每个 token 用一个数。
        has_scores: True 时算出回复的对数概率（按模型原来的分布，不受旋钮影响）。
        token_ids: 已生成的 token，不含 [SEP]。
        is_finished: 是否说完了：得到了 [SEP]，或已有 max_len 个 token，或被请出了批。
        log_prob_sum: 对数概率之和，nat，含 [SEP]；不要分数时是 0。
        num_scored: log_prob_sum 是多少个 token 之和。
    """

    context: Sequence[int]
    options: SamplingOptions
    rng: random.Random
    has_scores: bool = False
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False
    log_prob_sum: float = 0.0
    num_scored: int = 0

    @property
    def likelihood(self) -> float:
        """平均每个 token 的对数概率，nat；按长度归一，长句不吃亏。"""
        return self.log_prob_sum / max(1, self.num_scored)


class _Group:
    """一样长的几行：共用一份缓存，一起往前走。"""

    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        """各行的上下文一样长；内容也都相同时（多个候选）只算一次。"""
        contexts = [row.context for row in rows]
        if all(context == contexts[0] for context in contexts):
            contexts = contexts[:1]
        max_len = max(row.options.max_len for row in rows)
        self.rows = list(rows)
        self.input_ids = torch.tensor([list(c) for c in contexts], device=engine.device)  # (B, T)
        num_rows, width = self.input_ids.shape
        self.cache: KeyValueCache = engine.new_cache(num_rows, width + max_len)

    def take(self, hidden: Tensor) -> Tensor:
        """由刚算出的隐藏状态 (B, T, C) 取出各行最新的 (B, C)；候选从这里开始分开。"""
        last = hidden[:, -1]
        if len(last) < len(self.rows):
            same = torch.zeros(len(self.rows), dtype=torch.long, device=last.device)
            self.cache, last = self.cache.select(same), last[same]
        return last

    def advance(self, chosen: Sequence[int]) -> None:
        """记下各行刚得到的 token，等下一步送入；过半的行说完了，就把它们的缓存让出来。"""
        alive = [i for i, row in enumerate(self.rows) if not row.is_finished]
        if 0 < len(alive) <= len(self.rows) / 2:  # 一半已说完，才值得搬一次缓存
            self.cache = self.cache.select(torch.tensor(alive, device=self.input_ids.device))
            self.rows, chosen = [self.rows[i] for i in alive], [chosen[i] for i in alive]
        self.input_ids = torch.tensor(chosen, device=self.input_ids.device)[:, None]

    @property
    def is_finished(self) -> bool:
        """是否各行都说完了。"""
        return all(row.is_finished for row in self.rows)


class Batch:
    """正在一起生成的各行。"""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._groups: list[_Group] = []

    @property
    def num_rows(self) -> int:
        """还没有说完的行数。"""
        return sum(not row.is_finished for group in self._groups for row in group.rows)

    def add(self, rows: Iterable[Row]) -> None:
        """让新的行从下一步开始加入。"""
        by_length: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_length[len(row.context)].append(row)
        engine = self._generator.engine
        self._groups += [_Group(engine, same) for same in by_length.values()]

    def remove(self, row: Row) -> None:
        """请出一行，不再为它生成。"""
        row.is_finished = True
        self._groups = [group for group in self._groups if not group.is_finished]

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int]]:
        """往前走一步。

        Returns:
            得到了新 token 的行和它的 token，[SEP] 不算；说完的行不再出现。
        """
        if not self._groups:
            return []
        engine = self._generator.engine
        states = engine.hidden_groups([(g.input_ids, g.cache) for g in self._groups])
        last = [group.take(state) for group, state in zip(self._groups, states, strict=True)]
        logits = engine.logits(torch.cat(last))  # (N, V)
        rows = [row for group in self._groups for row in group.rows]
        chosen = self._generator.choose(logits, rows)
        alive = [i for i, row in enumerate(rows) if not row.is_finished]
        _add_scores(logits, chosen, [(i, rows[i]) for i in alive if rows[i].has_scores])
        spoken = [(rows[i], chosen[i]) for i in alive if chosen[i] != self._generator.ids.sep]
        for i in alive:
            if chosen[i] == self._generator.ids.sep:
                rows[i].is_finished = True
            else:
                rows[i].token_ids.append(chosen[i])
                rows[i].is_finished = len(rows[i].token_ids) == rows[i].options.max_len
        self._advance(chosen)
        return spoken

    def _advance(self, chosen: Sequence[int]) -> None:
        start, going = 0, []
        for group in self._groups:
            end = start + len(group.rows)
            if not group.is_finished:
                group.advance(chosen[start:end])
                going.append(group)
            start = end
        self._groups = going


class Generator:
    """模型和它不能说的 token：逐个 token 地生成一句，或成批地生成许多句。"""

    def __init__(self, engine: Engine, ids: SpecialIds, forbidden_ids: Sequence[int]) -> None:
        """forbidden_ids 从不生成；第一个 token 也不能是 [SEP]，所以回复不会为空。"""
        self.engine = engine
        self.ids = ids
        vocab_size = engine.vocab_size
        self._forbidden = torch.zeros(vocab_size, device=engine.device)  # (V,)，加到分数上
        self._forbidden[list(forbidden_ids)] = -torch.inf
        self._forbidden_at_start = self._forbidden.clone()
        self._forbidden_at_start[ids.sep] = -torch.inf

    def tokens(self, row: Row) -> Iterator[int]:
        """逐个给出这一行的 token，不含 [SEP]；关掉迭代器，就不再生成。"""
        batch = Batch(self)
        batch.add([row])
        while not row.is_finished:
            for _, token_id in batch.step():
                yield token_id

    def steps(self, rows: Sequence[Row]) -> Iterator[None]:
        """成批生成，一步一步地把每一行说完；各行的 token_ids 就是结果。

        一批最多 MAX_ROWS 行，内存因此与一共几行无关。
        """
        for start in range(0, len(rows), MAX_ROWS):
            batch = Batch(self)
            batch.add(rows[start : start + MAX_ROWS])
            while batch.num_rows:
                batch.step()
                yield

    def generate(self, rows: Sequence[Row]) -> None:
        """一起生成，把每一行说完。"""
        batch = Batch(self)
        batch.add(rows)
        while batch.num_rows:
            batch.step()

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """按各行自己的旋钮抽出下一个 token；logits 形状 (N, V)，说完的行也照抽。"""
        uniforms = [row.rng.random() for row in rows]
        alike: dict[tuple[SamplingOptions, bool], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            alike[row.options, not row.token_ids].append(i)
        chosen = [0] * len(rows)
        for (options, is_start), picked in alike.items():
            part = logits if len(picked) == len(rows) else logits[picked]
            part = part + (self._forbidden_at_start if is_start else self._forbidden)
            generated = [rows[i].token_ids for i in picked]
            drawn = _choose_alike(part, generated, options, [uniforms[i] for i in picked])
            for i, token_id in zip(picked, drawn, strict=True):
                chosen[i] = token_id
        return chosen


def _choose_alike(
    logits: Tensor,
    generated: Sequence[list[int]],
    options: SamplingOptions,
    uniforms: Sequence[float],
) -> list[int]:
    """旋钮相同的几行；generated 或都是空的，或都不是。"""
    longest = max(map(len, generated))
    if longest and options.repetition_penalty != 1:
        padded = [row + row[-1:] * (longest - len(row)) for row in generated]
        logits = apply_repetition_penalty(
            logits, torch.tensor(padded, device=logits.device), options.repetition_penalty
        )
    if options.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, generated, options.no_repeat_ngram_size)
    return draw(*candidate_probs(logits, options), uniforms)


def _add_scores(logits: Tensor, chosen: Sequence[int], rows: Sequence[tuple[int, Row]]) -> None:
    """把刚抽到的 token 的对数概率记到要分数的各行上；logits 形状 (N, V)。"""
    if not rows:
        return
    token_ids = torch.tensor(chosen, device=logits.device)[:, None]
    log_probs = logits.log_softmax(dim=-1).gather(1, token_ids)[:, 0].tolist()
    for i, row in rows:
        row.log_prob_sum += log_probs[i]
        row.num_scored += 1
