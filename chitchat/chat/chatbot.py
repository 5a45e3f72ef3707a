"""对话：由历史组成上下文，生成回复，边生成边显示；多个候选时挑最好的一个。"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from chitchat.chat.engine import Engine
from chitchat.chat.generation import MAX_ROWS, Generator, Response, score_continuations
from chitchat.chat.options import SamplingOptions, check_max_len
from chitchat.tokens.tokenizer import SpecialIds, decode_response, special_ids, unspeakable_ids


def build_context(
    history: Sequence[Sequence[int]], *, ids: SpecialIds, max_history_len: int, max_tokens: int
) -> tuple[list[int], bool]:
    """组成上下文：[CLS] 加上最近的若干句，每句后接 [SEP]。

    放不下时先去掉最早的句子，只剩一句还放不下就去掉它左边的部分。

    Args:
        history: 到目前为止每句的 token id，最新的在最后，至少一句。
        ids: 特殊 token 的 id。
        max_history_len: 最多用最近的几句，双方合计，至少 1。
        max_tokens: 上下文最多的 token 数，至少 3。

    Returns:
        上下文的 token id，以及是否因为放不下而截去了一部分。
    """
    utterances: list[list[int]] = []
    size = 1
    is_truncated = False
    for utterance in reversed(history[-max_history_len:]):
        size += len(utterance) + 1
        if utterances and size > max_tokens:
            is_truncated = True
            break
        utterances.insert(0, list(utterance))
    room = max_tokens - 2
    if len(utterances) == 1 and len(utterances[0]) > room:
        utterances[0] = utterances[0][-room:]
        is_truncated = True
    context = [ids.cls]
    for utterance in utterances:
        context += [*utterance, ids.sep]
    return context, is_truncated


class ResponseStreamer:
    """每收到一个 token 就把新确定的文字交给 write。

    末尾的拉丁词还可能接上 ``##`` 片段，它前面的空格也可能被去掉（``3. 1`` → ``3.14``），
    所以连同空格等它写完再交出，其余的立刻交出。
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._token_ids: list[int] = []
        self._num_written = 0

    def put(self, token_id: int) -> None:
        """收下一个新的 token。"""
        self._token_ids.append(token_id)
        settled = decode_response(self._tokenizer, self._token_ids)
        while settled and settled[-1].isascii() and settled[-1].isalnum():
            settled = settled[:-1]
        self._emit(settled.rstrip(" "))

    def end(self) -> None:
        """把末尾剩下的文字交出。"""
        self._emit(decode_response(self._tokenizer, self._token_ids))

    def _emit(self, text: str) -> None:
        if len(text) > self._num_written:
            self._write(text[self._num_written :])
            self._num_written = len(text)


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


class Chatbot:
    """模型加 tokenizer：给它历史，它给出下一句。"""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        backward_engine: Engine | None = None,
        num_candidates: int = 1,
        seed: int | None = None,
    ) -> None:
        """准备生成。

        Args:
            engine: 打包好的模型。
            tokenizer: 模型的 tokenizer。
            backward_engine: 反向模型，用来挑选候选；None 表示按候选自身的概率挑选。
            num_candidates: 每次生成几个候选。
            seed: 随机种子，None 表示每次不同。
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.ids = special_ids(tokenizer)
        self.generator = Generator(engine, self.ids, unspeakable_ids(tokenizer))
        self.backward_engine = backward_engine
        self.num_candidates = num_candidates
        self._rng = random.Random(seed)
        self.last_candidates: list[Candidate] = []

    @property
    def max_positions(self) -> int:
        """上下文加回复最多的 token 数。"""
        return self.engine.n_positions

    def check_options(self, options: SamplingOptions) -> None:
        """确认 max_len 不太大，否则抛出 UserError。"""
        for engine in filter(None, (self.engine, self.backward_engine)):
            check_max_len(options.max_len, engine.n_positions)

    def build_context(
        self, history: Sequence[Sequence[int]], options: SamplingOptions
    ) -> tuple[list[int], bool]:
        """由历史组成上下文，给回复留出 max_len 个位置。"""
        return build_context(
            history,
            ids=self.ids,
            max_history_len=options.max_history_len,
            max_tokens=self.max_positions - options.max_len,
        )

    def reply(
        self,
        history: Sequence[Sequence[int]],
        options: SamplingOptions,
        write: Callable[[str], None] = lambda text: None,
    ) -> tuple[list[int], bool]:
        """生成一句回复。

        Args:
            history: 每句的 token id，最后一句是用户刚说的。
            options: 采样的旋钮。
            write: 每有新确定的文字就被调用；各次的文字连起来就是整句回复。有多个候选时只调用一次。

        Returns:
            回复的 token id（不含 [SEP]，至少一个），以及上下文是否放不下而被截短。
        """
        context, is_truncated = self.build_context(history, options)
        if self.num_candidates > 1:
            self.last_candidates = self.rank_candidates(context, options, self._rng)
            response = self.last_candidates[0].token_ids
            write(decode_response(self.tokenizer, response))
            return response, is_truncated
        streamer = ResponseStreamer(self.tokenizer, write)
        responses = self.generator.generate([context], options, [self._rng], on_token=streamer.put)
        streamer.end()
        return responses[0].token_ids, is_truncated

    def rank_candidates(
        self, context: list[int], options: SamplingOptions, rng: random.Random
    ) -> list[Candidate]:
        """成批生成候选并排序，最好的在最前；空的和重复的不算，除非没有别的。

        来源: Li et al. 2016, arXiv:1510.03055 的 MMI-bidi；DialoGPT, arXiv:1911.00536 §3.2。
        """
        responses: list[Response] = []
        while len(responses) < self.num_candidates:
            num_rows = min(MAX_ROWS, self.num_candidates - len(responses))
            responses += self.generator.generate(
                [context] * num_rows, options, [rng] * num_rows, with_scores=True
            )
        by_text = {decode_response(self.tokenizer, r.token_ids).strip(): r for r in responses}
        kept = [response for text, response in by_text.items() if text] or responses[:1]
        candidates = [Candidate(response.token_ids, response.likelihood, None) for response in kept]
        if self.backward_engine is not None:
            scores = self._score_backward(context, [c.token_ids for c in candidates])
            candidates = [
                replace(candidate, backward=score)
                for candidate, score in zip(candidates, scores, strict=True)
            ]
        return sorted(candidates, key=lambda candidate: candidate.score, reverse=True)

    def _score_backward(self, context: list[int], replies: list[list[int]]) -> list[float]:
        """反向模型给出的 log p(上文 | 回复)，平均到上文的每个 token。"""
        utterances: list[list[int]] = [[]]
        for token in context[1:]:
            utterances[-1].append(token)
            if token == self.ids.sep:
                utterances.append([])
        source = [token for utterance in reversed(utterances) for token in utterance]
        room = self.backward_engine.n_positions - 2 - max(map(len, replies))
        source = source[: max(1, room)]
        pairs = [([self.ids.cls, *reply, self.ids.sep], source) for reply in replies]
        sums = score_continuations(self.backward_engine, pairs, self.ids.pad)
        return [total / len(source) for total in sums]
