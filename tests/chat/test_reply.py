"""采样与生成：四个 token 的手算例子、处理的次序、何时停、边生成边显示。"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from conftest import TINY_VOCAB

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.context import TextStream
from chitchat.chat.engine import Engine
from chitchat.chat.options import SamplingOptions
from chitchat.chat.sampling import apply_repetition_penalty, candidate_probs
from chitchat.errors import UserError
from chitchat.tokens.tokenizer import decode_response

RNG = random.Random(0)
PROBS = [0.4, 0.3, 0.2, 0.1]
# 旋钮 → 手算的概率；原来的概率是 0.4 0.3 0.2 0.1。
HAND_COMPUTED = {
    "all off": ({}, PROBS),
    "temperature 0.5 squares": ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    "top-k": ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
    "top-k beyond the vocabulary": ({"top_k": 99}, PROBS),
    "top-p keeps the one that crosses": ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
    "top-p keeps at least one": ({"top_p": 0.01}, [1, 0, 0, 0]),
    "top-p 1 is off": ({"top_p": 1.0}, PROBS),
    "min-p": ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
    "greedy": ({"greedy": True}, [1, 0, 0, 0]),
    # top-k 之后是 4/7 3/7，头一个已超过 0.5；先做 top-p 的话会留下两个
    "top-k before top-p": ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
    # 平方之后头一个是 16/30，已超过 0.45；不先除以温度的话会留下两个
    "temperature before top-p": ({"temperature": 0.5, "top_p": 0.45}, [1, 0, 0, 0]),
    # 平方之后第二个是头一个的 9/16，小于 0.6
    "temperature before min-p": ({"temperature": 0.5, "min_p": 0.6}, [1, 0, 0, 0]),
}


@pytest.mark.parametrize("case", HAND_COMPUTED)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_hand_computed_probabilities_of_four_tokens(case, order):
    fields, expected = HAND_COMPUTED[case]
    logits = torch.tensor([PROBS])[:, order].log()
    probs, token_ids = candidate_probs(logits, SamplingOptions(**{"top_k": 0, **fields}))
    found = torch.zeros(4).scatter(0, token_ids[0], probs[0] / probs[0].sum())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32)[order])


def test_penalty_divides_positive_and_multiplies_negative_scores_once():
    logits, generated = torch.tensor([[4.0, 4, -4, -4]]), torch.tensor([[1, 2, 1]])
    found = apply_repetition_penalty(logits, generated, 2.0)
    assert found.tolist() == [[4.0, 2, -8, -4]]
    assert logits.tolist() == [[4.0, 4, -4, -4]]


@pytest.fixture
def make_bot(make_bigram_model, tokenizer) -> Callable[..., Chatbot]:
    """只看上一个 token 的模型，每个 token 之后的分数由测试指定。"""

    def make(**next_logits: dict[str, float]) -> Chatbot:
        table = {"[SEP]" if name == "SEP" else name: after for name, after in next_logits.items()}
        model = make_bigram_model(table)
        return Chatbot(Engine(model.config.to_dict(), model.state_dict()), tokenizer)

    return make


def reply(bot: Chatbot, history: str = "你好", **options: object) -> str:
    token_ids = [TINY_VOCAB.index(char) for char in history]
    return "".join(bot.reply([token_ids], SamplingOptions(**options), RNG))


def test_penalty_comes_before_top_k(make_bot):
    bot = make_bot(SEP={"早": 80.0}, 早={"早": 40.0, "上": 30.0}, 上={"[SEP]": 80.0})
    assert reply(bot, top_k=1, max_len=3) == "早早早"
    assert reply(bot, top_k=1, max_len=3, repetition_penalty=2.0) == "早上"


@pytest.mark.parametrize("value", [1e-300, 1e-50, 1e39, 1e300])
@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_extreme_knobs_are_limits_not_nan(name, value, make_bot):
    bot = make_bot(SEP={"早": 40.0}, 早={"早": 40.0, "上": 30.0}, 上={"[SEP]": 80.0})
    for _ in range(20):
        assert reply(bot, top_k=0, max_len=3, **{name: value})
    if value < 1:
        assert reply(bot, top_k=0, max_len=3, **{name: value}) == "早早早"


def test_penalty_looks_at_the_reply_only(make_bot):
    bot = make_bot(SEP={"早": 40.0, "上": 30.0}, 早={"[SEP]": 80.0})
    assert reply(bot, "早早", top_k=1, repetition_penalty=4.0) == "早"


def test_forbidden_tokens_take_no_place_in_top_k(make_bot):
    never = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *(f"[unused{i}]" for i in range(1, 100))]
    wanted = dict.fromkeys(never, 90.0)
    bot = make_bot(SEP={**wanted, "早": 40.0}, 早={**wanted, "[SEP]": 40.0})
    assert reply(bot, top_k=1) == reply(bot, top_k=4) == "早"


@pytest.mark.parametrize(
    ("max_len", "expected"), [(1, "早"), (2, "早上"), (3, "早上好"), (9, "早上好")]
)
def test_reply_is_never_empty_and_ends_at_sep_or_max_len(max_len, expected, make_bot):
    bot = make_bot(
        SEP={"[SEP]": 90.0, "早": 50.0}, 早={"上": 90.0}, 上={"好": 90.0}, 好={"[SEP]": 90.0}
    )
    assert reply(bot, max_len=max_len) == expected


def test_sampling_follows_the_probabilities(make_bot):
    """概率 0.75 与 0.25 抽 400 次：标准差 8.7，±44 是五个标准差。"""
    bot = make_bot(SEP={"早": 40 + math.log(3), "晚": 40.0})
    drawn = [reply(bot, max_len=1) for _ in range(400)]
    assert set(drawn) == {"早", "晚"}
    assert abs(drawn.count("早") - 300) < 44


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["早", "上", "好"], ["早", "上", "好"]),
        (["你", "h", "##e", "##y", "我"], ["你", "hey我"]),
        (["hello", "h", "##i", "1", "##2"], ["hello", " hi", " 12"]),
        (["😂", "##😂", "早"], ["😂", "😂", "早"]),
        (["3", ".", "1", "##4", "，", "你"], ["3.", "14，", "你"]),
        (["##a", "早"], ["a早"]),
    ],
)
def test_only_a_word_that_may_grow_is_held_back(pieces, expected, tokenizer):
    stream = TextStream(tokenizer)
    token_ids = [TINY_VOCAB.index(piece) for piece in pieces]
    written = [piece for piece in [*map(stream.put, token_ids), stream.end()] if piece]
    assert written == expected
    assert "".join(written) == decode_response(tokenizer, token_ids)


@pytest.mark.parametrize(("max_len", "is_truncated"), [(21, False), (22, True)])
def test_context_that_does_not_fit_is_reported(max_len, is_truncated, make_bot):
    history = [[110] * 20, [111] * 20]  # 1 + 21 + 21 = 43，加上 21 正好 64
    options = SamplingOptions(max_len=max_len)
    assert make_bot(SEP={"早": 80.0}).reply(history, options, RNG).is_truncated is is_truncated


def test_reply_longer_than_the_positions_is_refused(make_bot):
    bot = make_bot(SEP={"早": 80.0}, 早={"早": 80.0})
    bot.check_options(SamplingOptions(max_len=61))
    assert reply(bot, "你" * 99, max_len=61) == "早" * 61
    with pytest.raises(UserError, match=r"62.*64.*61"):
        bot.check_options(SamplingOptions(max_len=62))
