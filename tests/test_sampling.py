"""采样的每个旋钮：与 transformers 的 processor 比分布，并抽一万次做卡方检验。"""

import random

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as hf

from chitchat.knobs import SamplingOptions
from chitchat.sampling import apply_repetition_penalty, ban_repeated_ngrams, candidate_probs, draw

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


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("batch_size", [1, 4])
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
        for _ in range(10_000 // batch_size)
        for token in draw(probs, token_ids, [rng.random() for _ in range(batch_size)])
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=30).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        rare = expected[possible] * 10_000 < 5  # 卡方检验要求每格的期望不太小，合成一格
        observed, wanted = counts[possible], expected[possible] * 10_000
        merge = [torch.cat([v[~rare], v[rare].sum()[None]]) for v in (observed, wanted)]
        kept = merge[1] > 0
        wanted = merge[1][kept] * merge[0][kept].sum() / merge[1][kept].sum()
        assert chisquare(merge[0][kept].numpy(), wanted.numpy()).pvalue > 1e-4


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
