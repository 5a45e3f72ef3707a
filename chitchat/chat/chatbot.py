"""对话：给它历史、旋钮和随机数源，它给出一句回复；回复是逐段给出文字的迭代器。"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from chitchat.chat.candidates import Candidate, Ranker
from chitchat.chat.context import TextStream, build_context, encode_recent
from chitchat.chat.engine import Engine
from chitchat.chat.generation import Generator, Row
from chitchat.chat.options import SamplingOptions, check_max_len
from chitchat.tokens.tokenizer import decode_response, special_ids, unspeakable_ids


class Chatbot:
    """模型加 tokenizer：给它历史，它给出下一句。它自己不记得任何事。"""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        backward_engine: Engine | None = None,
        num_candidates: int = 1,
    ) -> None:
        """准备生成。

        Args:
            engine: 打包好的模型。
            tokenizer: 模型的 tokenizer。
            backward_engine: 反向模型，用来挑选候选；None 表示按候选自身的概率挑选。
            num_candidates: 每次生成几个候选。
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.ids = special_ids(tokenizer)
        self.generator = Generator(engine, self.ids, unspeakable_ids(tokenizer))
        self.ranker = Ranker(tokenizer, self.ids, backward_engine)
        self.num_candidates = num_candidates

    @property
    def max_positions(self) -> int:
        """上下文加回复最多的 token 数。"""
        return self.engine.n_positions

    def check_options(self, options: SamplingOptions) -> None:
        """确认 max_len 不太大，否则抛出 UserError。"""
        for engine in filter(None, (self.engine, self.ranker.backward_engine)):
            check_max_len(options.max_len, engine.n_positions)

    def build_context(
        self, history: Sequence[Sequence[int]], options: SamplingOptions
    ) -> tuple[list[int], bool]:
        """由历史组成上下文，给回复留出 max_len 个位置；第二项是有没有因为放不下而截短。"""
        return build_context(
            history,
            ids=self.ids,
            max_history_len=options.max_history_len,
            max_tokens=self.max_positions - options.max_len,
        )

    def encode_history(
        self, utterances: Sequence[str], options: SamplingOptions
    ) -> list[list[int]]:
        """把最近的几句变成 token，只编码上下文放得下的。"""
        recent = utterances[-options.max_history_len :]
        return encode_recent(self.tokenizer, recent, self.max_positions - options.max_len)

    def reply(
        self, history: Sequence[Sequence[int]], options: SamplingOptions, rng: random.Random
    ) -> Reply:
        """开始回答：取走 Reply 的每一段，它才逐段生成。

        Args:
            history: 每句的 token id，最后一句是用户刚说的。
            options: 采样的旋钮。
            rng: 随机数源。
        """
        return Reply(self, *self.build_context(history, options), options, rng)

    def rank_candidates(
        self, context: Sequence[int], options: SamplingOptions, rng: random.Random
    ) -> list[Candidate]:
        """成批生成候选并排序，最好的在最前。"""
        rows = self.candidate_rows(context, options, rng)
        for _ in self.generator.steps(rows):
            pass
        return self.ranker.rank(rows)

    def candidate_rows(
        self, context: Sequence[int], options: SamplingOptions, rng: random.Random
    ) -> list[Row]:
        """每个候选一行；只有一个候选时不必算分数。"""
        has_scores = self.num_candidates > 1
        return [Row(context, options, rng, has_scores) for _ in range(self.num_candidates)]


class Reply(Iterator[str]):
    """一句正在生成的回复：逐段给出文字，各段连起来是整句。

    有多个候选时，选好之前的各段都是空的，好让等着的人有机会停下它。

    Attributes:
        context: 上下文。
        is_truncated: 上下文是否放不下而被截短。
        token_ids: 到目前为止的回复，不含 [SEP]；说完时至少一个。
        candidates: 全部候选，选中的在最前；只有一个候选时是空的。
    """

    def __init__(
        self,
        bot: Chatbot,
        context: list[int],
        is_truncated: bool,
        options: SamplingOptions,
        rng: random.Random,
    ) -> None:
        """由 Chatbot.reply 建立。"""
        self.context = context
        self.is_truncated = is_truncated
        self.token_ids: list[int] = []
        self.candidates: list[Candidate] = []
        self._bot = bot
        self._pieces = self._speak(options, rng)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """不再生成；已经说的留在 token_ids 里。"""
        self._pieces.close()

    @property
    def text(self) -> str:
        """到目前为止的全部文字，连同还没有交出的最后一个词。"""
        return decode_response(self._bot.tokenizer, self.token_ids)

    def _speak(self, options: SamplingOptions, rng: random.Random) -> Iterator[str]:
        if self._bot.num_candidates > 1:
            rows = self._bot.candidate_rows(self.context, options, rng)
            for _ in self._bot.generator.steps(rows):
                yield ""
            self.candidates = self._bot.ranker.rank(rows)
            self.token_ids = list(self.candidates[0].token_ids)
            yield self.text
            return
        stream = TextStream(self._bot.tokenizer)
        for token_id in self._bot.generator.tokens(Row(self.context, options, rng)):
            self.token_ids.append(token_id)
            if piece := stream.put(token_id):
                yield piece
        if piece := stream.end():
            yield piece
