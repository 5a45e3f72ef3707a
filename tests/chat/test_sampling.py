"""采样的每个旋钮：与 transformers 的 processor 比分布，并抽一万次做卡方检验。

先只看采样的函数，再看整个生成：有缓存与没有缓存，单独与成批，成批又分一样长与不一样长。
"""

import random

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as hf

from chitchat.chat.engine import Engine
from chitchat.chat.generation import Generator, Row
from chitchat.chat.options import SamplingOptions
from chitchat.chat.sampling import (
    apply_repetition_penalty,
    ban_repeated_ngrams,
    candidate_probs,
    draw,
)
from chitchat.tokens.tokenizer import SpecialIds

NUM_DRAWS = 10_000
KNOBS = {
    "plain": ({"top_k": 0}, []),
    "temperature": ({"top_k": 0, "temperature": 0.6}, [hf.TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
    "top_p": ({"top_k": 0, "top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
    "min_p": ({"top_k": 0, "min_p": 0.2}, [hf.MinPLogitsWarper(0.2)]),
    "greedy": ({"greedy": True}, [hf.TopKLogitsWarper(1)]),
    "all": (
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
        [
            hf.TemperatureLogitsWarper(1.5),
            hf.TopKLogitsWarper(9),
            hf.TopPLogitsWarper(0.8),
            hf.MinPLogitsWarper(0.1),
        ],
    ),
}


def expected_probs(logits: torch.Tensor, processors: list) -> torch.Tensor:
    for processor in processors:
        logits = processor(None, logits)
    return logits.softmax(dim=-1)


def check_drawn_from(expected: torch.Tensor, drawn: list[int]) -> None:
    """卡方检验：drawn 是不是按 expected (V,) 抽出的；概率为 0 的一次也不能有。"""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    observed, wanted = counts[possible], expected[possible] * len(drawn)
    rare = wanted < 5  # 卡方检验要求每格的期望不太小，合成一格
    observed, wanted = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (observed, wanted))
    kept = wanted > 0
    assert observed[~kept].sum() == 0
    observed, wanted = observed[kept], wanted[kept] / wanted[kept].sum() * len(drawn)
    if len(wanted) > 1:
        assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("batch_size", [1, 100])
def test_ten_thousand_draws_follow_the_distribution_of_transformers(name, batch_size):
    fields, processors = KNOBS[name]
    logits = (torch.randn(30) * 2).repeat(batch_size, 1)
    before = logits.clone()
    expected = expected_probs(logits, processors)[0].double()
    probs, token_ids = candidate_probs(logits, SamplingOptions(**fields))
    assert torch.equal(logits, before)
    dense = torch.zeros(30).scatter(0, token_ids[0], probs[0] / probs[0].sum())
    torch.testing.assert_close(dense, expected.float())
    rng = random.Random(0)
    drawn = [
        token
        for _ in range(NUM_DRAWS // batch_size)
        for token in draw(probs, token_ids, [rng.random() for _ in range(batch_size)])
    ]
    check_drawn_from(expected, drawn)


def test_repetition_penalty_equals_transformers():
    logits, generated = torch.randn(3, 20), torch.tensor([[1, 2, 1], [4, 5, 6], [7, 7, 7]])
    expected = hf.RepetitionPenaltyLogitsProcessor(1.7)(generated, logits.clone())
    torch.testing.assert_close(apply_repetition_penalty(logits, generated, 1.7), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_equals_transformers(size):
    logits = torch.randn(2, 9)
    generated = [[1, 2, 3, 1, 2], [5, 5, 5, 5, 5]]
    expected = hf.NoRepeatNGramLogitsProcessor(size)(torch.tensor(generated), logits.clone())
    assert torch.equal(ban_repeated_ngrams(logits, generated, size), expected)


IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3)
FORBIDDEN = [0, 1, 2, 4]
CONTEXT, LONGER = [2, 7, 3], [2, 8, 9, 3]
# 只看本轮回复的旋钮；transformers 的 processor 也只给它本轮回复。
REPLY_KNOBS = {
    "repetition_penalty": (
        {"top_k": 0, "repetition_penalty": 1.7},
        [hf.RepetitionPenaltyLogitsProcessor(1.7)],
    ),
    "no_repeat_ngram_size": (
        {"top_k": 0, "no_repeat_ngram_size": 1},
        [hf.NoRepeatNGramLogitsProcessor(1)],
    ),
    "everything": (
        {**KNOBS["all"][0], "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        [
            hf.RepetitionPenaltyLogitsProcessor(1.7),
            hf.NoRepeatNGramLogitsProcessor(2),
            *KNOBS["all"][1],
        ],
    ),
}


class Tokens:
    """冒充缓存：只记下送过的 token (B, S)。"""

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.input_ids = input_ids

    def select(self, rows: torch.Tensor) -> "Tokens":
        return Tokens(self.input_ids[rows])


class EngineWithoutCache(Engine):
    """每一步都把整个上下文从头算一遍。"""

    def new_cache(self, batch_size, max_tokens):
        return Tokens(torch.empty(batch_size, 0, dtype=torch.long))

    def hidden_groups(self, groups):
        parts = []
        for input_ids, cache in groups:
            cache.input_ids = torch.cat([cache.input_ids, input_ids], dim=1)
            empty = super().new_cache(*cache.input_ids.shape)
            states = super().hidden_groups([(cache.input_ids, empty)])[0]
            parts.append(states[:, -input_ids.size(1) :])
        return parts


class Uniforms:
    """给定的随机数，按次序用；成批时全部行共用一个。"""

    def __init__(self, *values: float) -> None:
        self.random = iter(values).__next__


@pytest.fixture
def peaked_model(make_model):
    size = {"n_embd": 8, "n_inner": 8, "activation_function": "relu"}  # 一万行，越小越快
    return make_model(vocab_size=30, initializer_range=0.7, **size).eval()


@pytest.mark.parametrize("name", [*KNOBS, *REPLY_KNOBS])
@pytest.mark.parametrize("way", ["cache", "cache and lengths", "no cache"])
def test_ten_thousand_replies_follow_the_distribution_of_transformers(name, way, peaked_model):
    fields, processors = {**KNOBS, **REPLY_KNOBS}[name]
    options = SamplingOptions(**fields, max_len=3)
    make_engine = EngineWithoutCache if way == "no cache" else Engine
    engine = make_engine(peaked_model.config.to_dict(), peaked_model.state_dict())
    generator = Generator(engine, IDS, FORBIDDEN)
    contexts = [CONTEXT] * NUM_DRAWS
    if way == "cache and lengths":
        contexts[-1] = LONGER
    # 前两个 token 各行都一样，第三个才真的随机。
    uniforms = torch.rand(NUM_DRAWS, dtype=torch.double).tolist()
    shared = Uniforms(*[0.3] * NUM_DRAWS, *[0.6] * NUM_DRAWS, *uniforms)
    rows = [Row(context, options, shared) for context in contexts]
    generator.generate(rows)
    replies = [row.token_ids for row in rows]
    if way == "cache and lengths":
        del replies[-1]
    beginning = replies[0][:2]
    assert len(beginning) == 2
    assert all(reply[:2] == beginning for reply in replies)
    with torch.no_grad():
        logits = peaked_model(torch.tensor([CONTEXT + beginning])).logits[:, -1]
    logits[:, FORBIDDEN] = -torch.inf
    for processor in processors:
        logits = processor(torch.tensor([beginning]), logits)
    expected = logits.softmax(dim=-1)[0].double()
    check_drawn_from(expected, [reply[2] if len(reply) > 2 else IDS.sep for reply in replies])
    for i in range(10):  # 单独生成，随机数相同，回复也相同
        alone = Row(CONTEXT, options, Uniforms(0.3, 0.6, uniforms[i]))
        assert list(generator.tokens(alone)) == replies[i]
