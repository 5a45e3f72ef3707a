"""多个候选：由同一个上下文生成好几句，挑最好的。

来源: Li et al. 2016, arXiv:1510.03055 的 MMI-bidi；DialoGPT, arXiv:1911.00536 §3.2。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from chitchat.chat.engine import Engine
from chitchat.chat.generation import Row
from chitchat.chat.scoring import score_continuations
from chitchat.tokens.tokenizer import SpecialIds, decode_response


@dataclass(frozen=True)
class Candidate:
    """一个候选回复和它的分数，分数都是平均每个 token 的对数概率，nat。"""

    token_ids: list[int]
    likelihood: float  # 由上下文得到它
    backward: float | None  # 由它得到上下文；没有反向模型时是 None

    @property
    def score(self) -> float:
        """挑选时比较的分数。"""
        return self.likelihood if self.backward is None else self.backward


class Ranker:
    """给说完的候选打分、排序。"""

    def __init__(self, tokenizer: Tokenizer, ids: SpecialIds, backward_engine: Engine | None):
        """backward_engine 是反向模型；None 表示按候选自身的概率挑选。"""
        self._tokenizer = tokenizer
        self._ids = ids
        self.backward_engine = backward_engine

    def rank(self, rows: Sequence[Row]) -> list[Candidate]:
        """最好的在最前；空的和重复的不算，除非没有别的。

        Args:
            rows: 上下文相同、说完了的各行，生成时算了分数。
        """
        by_text = {decode_response(self._tokenizer, row.token_ids).strip(): row for row in rows}
        kept = [row for text, row in by_text.items() if text] or list(rows[:1])
        replies = [row.token_ids for row in kept]
        scores: Sequence[float | None] = [None] * len(kept)
        if self.backward_engine is not None:
            scores = self._score_backward(rows[0].context, replies)
        candidates = [
            Candidate(row.token_ids, row.likelihood, score)
            for row, score in zip(kept, scores, strict=True)
        ]
        return sorted(candidates, key=lambda candidate: candidate.score, reverse=True)

    def _score_backward(self, context: Sequence[int], replies: list[list[int]]) -> list[float]:
        """反向模型给出的 log p(上文 | 回复)，平均到上文的每个 token。"""
        utterances: list[list[int]] = [[]]
        for token in context[1:]:
            utterances[-1].append(token)
            if token == self._ids.sep:
                utterances.append([])
        source = [token for utterance in reversed(utterances) for token in utterance]
        room = self.backward_engine.n_positions - 2 - max(map(len, replies))
        source = source[: max(1, room)]
        pairs = [([self._ids.cls, *reply, self._ids.sep], source) for reply in replies]
        sums = score_continuations(self.backward_engine, pairs, self._ids.pad)
        return [total / len(source) for total in sums]
