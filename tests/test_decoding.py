"""对话的零件：上下文、采样的次序与手算的数、贪心与不用缓存的循环、边生成边显示。"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from conftest import TINY_VOCAB
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chitchat.decoding import Chatbot, SamplingOptions, build_context, build_logits_processors
from chitchat.runtime import UserError
from chitchat.tokenizer import SpecialIds, decode_response, encode_utterances

IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)
GREEDY = SamplingOptions(top_k=1)
SAMPLES = 400


@pytest.mark.parametrize(
    ("history", "max_history_len", "max_tokens", "context", "is_truncated"),
    [
        ([[7]], 3, 64, [101, 7, 102], False),
        ([[7, 8], [9], [5, 6]], 3, 64, [101, 7, 8, 102, 9, 102, 5, 6, 102], False),
        ([[7, 8], [9], [5, 6]], 2, 64, [101, 9, 102, 5, 6, 102], False),
        ([[7, 8], [9], [5, 6]], 1, 64, [101, 5, 6, 102], False),
        ([[7, 8], [9], [5, 6]], 3, 9, [101, 7, 8, 102, 9, 102, 5, 6, 102], False),
        ([[7, 8], [9], [5, 6]], 3, 8, [101, 9, 102, 5, 6, 102], True),
        ([[7, 8], [9], [5, 6]], 3, 5, [101, 5, 6, 102], True),
        ([[7, 8], [9], [5, 6]], 3, 3, [101, 6, 102], True),
        ([[1, 2, 3, 4, 5]], 3, 5, [101, 3, 4, 5, 102], True),
        ([[1, 2, 3, 4, 5]], 3, 7, [101, 1, 2, 3, 4, 5, 102], False),
        ([[], [7]], 3, 64, [101, 102, 7, 102], False),
    ],
)
def test_context(history, max_history_len, max_tokens, context, is_truncated):
    before = [list(utterance) for utterance in history]
    options = {"max_history_len": max_history_len, "max_tokens": max_tokens}
    assert build_context(history, ids=IDS, **options) == (context, is_truncated)
    assert history == before


def process(options: SamplingOptions, token_ids: list[int], logits: list[float], **kwargs):
    """经过全部处理器之后的分数，形状 (4,)。词表只有四个 token，3 是 [SEP]。"""
    values = {"context_len": 2, "eos_id": 3, "forbidden_ids": [], **kwargs}
    processors = build_logits_processors(options, **values)
    return processors(torch.tensor([token_ids]), torch.tensor([logits]))[0]


OFF = SamplingOptions(top_k=0)
NONE = -math.inf
# 上下文是 [3, 0]，回复到目前为止是其后的部分。
HAND_COMPUTED = {
    "all off": ({}, [3, 0, 1], [1.0, 2, -1, 0], [1.0, 2, -1, 0]),
    "temperature divides": ({"temperature": 0.5}, [3, 0, 1], [1.0, 2, -1, 0], [2.0, 4, -2, 0]),
    "top-k": ({"top_k": 2}, [3, 0, 1], [1.0, 2, -1, 0], [1.0, 2, NONE, NONE]),
    "top-k beyond the vocabulary": ({"top_k": 99}, [3, 0, 1], [1.0, 2, -1, 0], [1.0, 2, -1, 0]),
    # 概率 0.5 0.25 0.125 0.125：前两个累计 0.75，第三个才到 0.8
    "top-p": (
        {"top_p": 0.7},
        [3, 0, 1],
        [math.log(p) for p in (0.5, 0.25, 0.15, 0.1)],
        [math.log(0.5), math.log(0.25), NONE, NONE],
    ),
    "penalty on the reply only": (
        {"repetition_penalty": 2.0},
        [3, 0, 1, 2, 1],
        [4.0, 4, -4, 4],
        [4.0, 2, -8, 4],
    ),
    # 惩罚后 [4 2 2 0.5]，除以 0.5 得 [8 4 4 1]
    "penalty before temperature": (
        {"repetition_penalty": 2.0, "temperature": 0.5},
        [3, 0, 1],
        [4.0, 4, 2, 0.5],
        [8.0, 4, 4, 1],
    ),
    # 不先惩罚的话 1 号最高，top-k 会留下它
    "penalty before top-k": (
        {"repetition_penalty": 4.0, "top_k": 1},
        [3, 0, 1],
        [3.0, 4, 2, 0.5],
        [3.0, NONE, NONE, NONE],
    ),
    # 温度 2 后是 [log2 0 0 0] → 0.4 0.2 0.2 0.2；未除时 4/7 已到 0.5，只会留一个
    "temperature before top-p": (
        {"temperature": 2.0, "top_p": 0.45, "top_k": 2},
        [3, 0, 1],
        [2 * math.log(2), 0.1, 0, 0],
        [math.log(2), NONE, NONE, NONE],
    ),
    # top-k 留下 0.4 0.3，归一化为 4/7 3/7：4/7 已到 0.5
    "top-k before top-p": (
        {"top_k": 2, "top_p": 0.5},
        [3, 0, 1],
        [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)],
        [math.log(0.4), NONE, NONE, NONE],
    ),
    "[SEP] may not come first": ({}, [3, 0], [1.0, 2, -1, 5], [1.0, 2, -1, NONE]),
}


@pytest.mark.parametrize("case", HAND_COMPUTED)
def test_hand_computed_scores_of_four_tokens(case):
    fields, token_ids, logits, expected = HAND_COMPUTED[case]
    found = process(SamplingOptions(**{"top_k": 0, **fields}), token_ids, logits)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_forbidden_tokens_do_not_take_a_place_in_top_k():
    found = process(SamplingOptions(top_k=1), [3, 0, 1], [9.0, 2, 1, 0], forbidden_ids=[0])
    assert found.tolist() == [NONE, 2, NONE, NONE]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_transformers_processors_in_the_fixed_order(seed):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 40, (1, 20), generator=generator)
    logits = 3 * torch.randn(1, 40, generator=generator)
    before = logits.clone()
    options = SamplingOptions(1.7, 11, 0.8, 1.3)
    processors = build_logits_processors(options, context_len=12, eos_id=3, forbidden_ids=[5, 9])
    expected = logits.clone()
    expected[:, [5, 9]] = NONE
    expected = RepetitionPenaltyLogitsProcessor(1.3)(token_ids[:, 12:], expected)
    for step in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(11), TopPLogitsWarper(0.8)):
        expected = step(token_ids, expected)
    torch.testing.assert_close(processors(token_ids, logits), expected)
    assert torch.equal(logits, before)


def greedy_without_cache(model, context: list[int], max_len: int, forbidden: set[int]) -> list[int]:
    """每次从头算整个序列，取最大的；第一个不能是 [SEP]。"""
    response: list[int] = []
    while len(response) < max_len:
        with torch.no_grad():
            logits = model(torch.tensor([context + response]), use_cache=False).logits[0, -1]
        banned = [*forbidden, *([] if response else [IDS.sep])]
        logits[banned] = NONE
        token_id = int(logits.argmax())
        if token_id == IDS.sep:
            break
        response.append(token_id)
    return response


@pytest.mark.parametrize("seed", range(4))
def test_greedy_reply_equals_a_loop_without_cache(seed, make_model, tokenizer):
    model = make_model().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.3 * torch.randn_like(param)
    history = encode_utterances(tokenizer, ["你好吗", "我很好", "早"])
    context = [101, *history[0], 102, *history[1], 102, *history[2], 102]
    forbidden = {i for i in range(104) if i != IDS.sep}
    expected = greedy_without_cache(model, context, 25, forbidden)
    assert Chatbot(model, tokenizer).reply(history, GREEDY) == (expected, False)


def replies(bot: Chatbot, options: SamplingOptions, number: int) -> Counter:
    history = encode_utterances(bot.tokenizer, ["你好"])
    texts = (decode_response(bot.tokenizer, bot.reply(history, options)[0]) for _ in range(number))
    return Counter(texts)


def test_special_and_unused_tokens_are_never_generated(make_bigram_model, tokenizer):
    never = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *(f"[unused{i}]" for i in range(1, 100))]
    wanted = {**dict.fromkeys(never, 50.0), "早": 20.0}
    model = make_bigram_model({"[SEP]": wanted, "早": {**wanted, "[SEP]": 20.0}})
    bot = Chatbot(model, tokenizer)
    for _ in range(20):
        response, _ = bot.reply([[110]], SamplingOptions(top_k=0, max_len=10))
        assert set(response) == {TINY_VOCAB.index("早")}


def test_reply_is_never_empty_and_stops_at_sep_or_max_len(make_bigram_model, tokenizer):
    model = make_bigram_model({"[SEP]": {"[SEP]": 90.0, "早": 50.0}, "早": {"上": 90.0}})
    bot = Chatbot(model, tokenizer)
    assert replies(bot, SamplingOptions(max_len=1), 3) == {"早": 3}
    assert replies(bot, SamplingOptions(max_len=2), 3) == {"早上": 3}
    parrot = make_bigram_model({"[SEP]": {"[SEP]": 90.0, "早": 50.0}, "早": {"[SEP]": 90.0}})
    assert replies(Chatbot(parrot, tokenizer), SamplingOptions(), 3) == {"早": 3}


def test_sampling_follows_the_probabilities(make_bigram_model, tokenizer):
    """概率 0.75 与 0.25 抽 400 次：标准差 8.7，±44 是五个标准差。"""
    after_sep = {"早": 40 + math.log(3), "晚": 40.0}
    end = {"[SEP]": 60.0}
    model = make_bigram_model({"[SEP]": after_sep, "早": end, "晚": end})
    counts = replies(Chatbot(model, tokenizer), SamplingOptions(max_len=1), SAMPLES)
    assert set(counts) == {"早", "晚"}
    assert abs(counts["早"] - 0.75 * SAMPLES) < 44


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["早", "上", "好"], ["早", "上", "好"]),
        (["你", "h", "##e", "##y", "我"], ["你", "hey我"]),
        (["hello", "h", "##i", "1", "##2"], ["hello ", "hi ", "12"]),
        (["😂", "##😂", "早"], ["😂", "😂", "早"]),
        (["3", ".", "1", "##4", "，", "你"], ["3.", "14，", "你"]),
        (["##a", "早"], ["a早"]),
    ],
)
def test_streamed_pieces_concatenate_to_the_decoded_reply(pieces, expected, make_model, tokenizer):
    model, written = make_model(), []
    script = iter([*(TINY_VOCAB.index(piece) for piece in pieces), IDS.sep])

    def scripted(input_ids, logits):
        scores = torch.full_like(logits, NONE)
        scores[:, next(script)] = 0.0
        return scores

    generate = model.generate

    def generate_scripted(*args, **kwargs):
        kwargs["logits_processor"].append(scripted)
        return generate(*args, **kwargs)

    model.generate = generate_scripted
    response, _ = Chatbot(model, tokenizer).reply([[110]], OFF, written.append)
    assert response == [TINY_VOCAB.index(piece) for piece in pieces]
    assert written == expected  # 只有还可能接上 ## 的外文词要等一等
    assert "".join(written) == decode_response(tokenizer, response)


def test_context_that_does_not_fit_is_reported(make_parrot, tokenizer):
    bot = Chatbot(make_parrot("早上好"), tokenizer)
    early, late = [110] * 20, [111] * 20
    for max_len, is_truncated in ((21, False), (22, True)):  # 1 + 21 + 21 + 21 = 64
        options = SamplingOptions(max_len=max_len)
        assert bot.reply([early, late], options)[1] is is_truncated


@pytest.mark.parametrize(
    ("max_len", "is_valid"), [(1, True), (61, True), (62, False), (999, False)]
)
def test_reply_longer_than_the_positions_is_refused(max_len, is_valid, make_model, tokenizer):
    bot = Chatbot(make_model(), tokenizer)
    options = SamplingOptions(max_len=max_len)
    if is_valid:
        bot.check_options(options)
        assert 1 <= len(bot.reply([[110]] * 9, options)[0]) <= max_len
    else:
        with pytest.raises(UserError, match=f"{max_len}.*64.*61"):
            bot.check_options(options)
