"""对话：由历史组成上下文，生成回复，边生成边显示；多个候选时挑最好的一个。

形状记号: B 批大小   T 上下文的 token 数   V 词表大小
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from chitchat.engine import Engine, KeyValueCache
from chitchat.knobs import SamplingOptions, check_max_len
from chitchat.sampling import apply_repetition_penalty, ban_repeated_ngrams, candidate_probs, draw
from chitchat.tokenizer import SpecialIds, decode_response, special_ids, unspeakable_ids


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
    utterances = [list(utterance) for utterance in history[-max_history_len:]]
    is_truncated = False
    while len(utterances) > 1 and 1 + sum(len(u) + 1 for u in utterances) > max_tokens:
        del utterances[0]
        is_truncated = True
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

    末尾的拉丁词还可能接上 ``##`` 片段，等它写完再交出，其余的立刻交出。
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
        self._emit(settled)

    def end(self) -> None:
        """把末尾剩下的文字交出。"""
        self._emit(decode_response(self._tokenizer, self._token_ids))

    def _emit(self, text: str) -> None:
        if len(text) > self._num_written:
            self._write(text[self._num_written :])
            self._num_written = len(text)


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
        pad_mask = torch.zeros(is_pad.shape, device=device).masked_fill_(is_pad, -torch.inf)
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
    log_probs = logits.log_softmax(dim=-1)
    for i, response in rows:
        response.log_prob_sum += float(log_probs[i, chosen[i]])
        response.num_scored += 1


@torch.inference_mode()
def score_continuations(
    engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """一次算出每对 (前文, 后文) 里后文的对数概率之和，nat。

    Args:
        engine: 模型。
        pairs: 前文、后文都至少一个 token，合起来不超过模型的位置数。
        pad_id: 补齐用的 id；右侧补齐，因果注意力看不到它。
    """
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
        check_max_len(options.max_len, self.max_positions)

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
        num_rows = self.num_candidates
        responses = self.generator.generate(
            [context] * num_rows, options, [rng] * num_rows, with_scores=True
        )
        by_text = {decode_response(self.tokenizer, r.token_ids).strip(): r for r in responses}
        kept = [response for text, response in by_text.items() if text] or responses[:1]
        candidates = [Candidate(response.token_ids, response.likelihood, None) for response in kept]
        if self.backward_engine is not None and len(candidates) > 1:
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
