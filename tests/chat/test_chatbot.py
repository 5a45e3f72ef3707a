"""上下文、回复、候选、逐段的文字。"""

import math
import random

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.context import TextStream, build_context, encode_recent
from chitchat.chat.engine import Engine
from chitchat.chat.generation import MAX_ROWS, Row
from chitchat.chat.options import SamplingOptions
from chitchat.chat.scoring import score_continuations
from chitchat.errors import UserError
from chitchat.tokens.token_table import TokenTable
from chitchat.tokens.tokenizer import (
    SpecialIds,
    decode_response,
    encode_utterances,
    unspeakable_ids,
)
from chitchat.training.dataset import reverse_dialogues

CONTEXTS = [[101, 110, 111, 102], [101, 115, 102], [101, *range(110, 122), 102]]
GREEDY = SamplingOptions(greedy=True, max_len=12)


@pytest.fixture
def model(make_model):
    return make_model(initializer_range=0.5).eval()


@pytest.fixture
def make_bot(model, tokenizer):
    def make(precision: str = "fp32", **options: object) -> Chatbot:
        engine = Engine(model.config.to_dict(), model.state_dict(), precision=precision)
        return Chatbot(engine, tokenizer, **options)

    return make


def generate(bot: Chatbot, contexts, options, seed: int = 0):
    rows = [Row(context, options, random.Random(seed + i)) for i, context in enumerate(contexts)]
    bot.generator.generate(rows)
    return [row.token_ids for row in rows]


IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102)


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


def test_greedy_equals_the_generate_of_transformers(model, make_bot, tokenizer):
    bot = make_bot()
    for context in CONTEXTS:
        output = model.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=12, min_new_tokens=1, eos_token_id=102, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList(
                [SuppressTokensLogitsProcessor(unspeakable_ids(tokenizer))]
            ),
        )
        expected = [token for token in output[0, len(context) :].tolist() if token != 102]
        assert generate(bot, [context], GREEDY) == [expected]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(max_len=12, repetition_penalty=1.5)])
def test_a_reply_does_not_depend_on_its_batch(make_bot, options, precision):
    bot = make_bot(precision)
    together = generate(bot, CONTEXTS, options)
    alone = [generate(bot, [context], options, seed=i)[0] for i, context in enumerate(CONTEXTS)]
    assert together == alone


def test_special_tokens_are_never_generated_and_replies_are_not_empty(make_bot, tokenizer):
    bot = make_bot()
    options = SamplingOptions(top_k=0, temperature=50.0, max_len=30)
    replies = generate(bot, [CONTEXTS[0]] * 50, options)
    assert all(replies)
    assert not {token for reply in replies for token in reply} & {*unspeakable_ids(tokenizer), 102}


def test_the_same_seed_gives_the_same_reply(make_bot):
    history, options = [[110, 111]], SamplingOptions()
    replies = ["".join(make_bot().reply(history, options, random.Random(s))) for s in (3, 3, 4)]
    assert replies[0] == replies[1] != replies[2]


def test_scores_equal_an_unbatched_loop(model, make_bot):
    pairs = [([101, 110, 102], [111, 112, 102]), ([101], [115, 116, 117, 118, 102])]
    expected = []
    for prefix, continuation in pairs:
        with torch.inference_mode():
            log_probs = model(torch.tensor([prefix + continuation])).logits[0].log_softmax(-1)
        start = len(prefix) - 1
        expected.append(sum(float(log_probs[start + i, t]) for i, t in enumerate(continuation)))
    assert score_continuations(make_bot().engine, pairs, 0) == pytest.approx(expected, rel=1e-4)


def test_candidates_are_ranked_by_the_backward_model(make_bot):
    bot = make_bot()
    bot.num_candidates, bot.ranker.backward_engine = 6, bot.engine
    context = [101, 110, 111, 102, 112, 102]
    candidates = bot.rank_candidates(context, SamplingOptions(max_len=6), random.Random(0))
    assert len({tuple(c.token_ids) for c in candidates}) == len(candidates) > 1
    for candidate in candidates:
        pair = ([101, *candidate.token_ids, 102], [112, 102, 110, 111, 102])
        expected = score_continuations(bot.engine, [pair], 0)[0] / 5
        assert candidate.backward == pytest.approx(expected, rel=1e-3)
        assert math.isfinite(candidate.likelihood)
    scores = [candidate.backward for candidate in candidates]
    assert scores == sorted(scores, reverse=True)


def test_a_lone_candidate_is_scored_too(make_bot):
    bot = make_bot()
    bot.num_candidates, bot.ranker.backward_engine = 5, bot.engine
    (candidate,) = bot.rank_candidates([101, 110, 102], GREEDY, random.Random(0))
    pair = ([101, *candidate.token_ids, 102], [110, 102])
    expected = score_continuations(bot.engine, [pair], 0)[0] / 2
    assert candidate.backward == pytest.approx(expected, rel=1e-3)


def test_many_candidates_are_made_a_few_at_a_time(make_bot, monkeypatch):
    """内存只取决于一批有几行，与要几个候选无关。"""
    bot = make_bot()
    bot.num_candidates, bot.ranker.backward_engine = 2 * MAX_ROWS + 3, bot.engine
    sizes = []
    hidden_groups = Engine.hidden_groups

    def watch(self, groups):
        sizes.append(sum(len(input_ids) for input_ids, _ in groups))
        return hidden_groups(self, groups)

    monkeypatch.setattr(Engine, "hidden_groups", watch)
    options = SamplingOptions(top_k=0, temperature=50.0, max_len=6)
    candidates = bot.rank_candidates([101, 110, 102], options, random.Random(0))
    assert len({tuple(c.token_ids) for c in candidates}) > 2 * MAX_ROWS
    assert max(sizes) == MAX_ROWS
    assert all(candidate.backward is not None for candidate in candidates)


@pytest.mark.parametrize("text", ["3.14", "it's ok", "www.abc.com", "12.30 hello, a", "你好a.cn"])
def test_spaces_that_a_later_token_removes_are_not_streamed(text, tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.put(token_id) for token_id in encode_utterances(tokenizer, [text])[0]]
    assert "".join([*pieces, stream.end()]) == text


def test_streamed_pieces_add_up_to_the_whole_text(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        token_ids = [rng.randrange(104, tokenizer.get_vocab_size()) for _ in range(15)]
        stream = TextStream(tokenizer)
        pieces = [*map(stream.put, token_ids), stream.end()]
        assert "".join(pieces) == decode_response(tokenizer, token_ids)
        assert "##" not in "".join(pieces)


def test_reversed_dialogues_keep_the_words_of_each_utterance():
    table = TokenTable.from_dialogues([[101, 5, 6, 102, 7, 102, 8, 9, 102], [101, 5, 102]])
    reversed_rows = [row.tolist() for row in reverse_dialogues(table, 102)]
    assert reversed_rows == [[101, 8, 9, 102, 7, 102, 5, 6, 102], [101, 5, 102]]


def test_the_max_len_must_fit_both_models(make_bot, make_model):
    bot, short = make_bot(), make_model(n_positions=40)
    bot.ranker.backward_engine = Engine(short.config.to_dict(), short.state_dict())
    bot.num_candidates = 3
    bot.check_options(SamplingOptions(max_len=37))
    options = SamplingOptions(top_k=0, temperature=50.0, no_repeat_ngram_size=1, max_len=37)
    assert list(bot.reply([[110, 111]], options, random.Random(0)))
    with pytest.raises(UserError, match=r"38.*40.*37"):
        bot.check_options(SamplingOptions(max_len=38))


TEXTS = [
    "你好",
    "hello world, 小柚！ " * 40,
    "你" * 1000,
    "a1b2 c3 " * 300,
    "",
    "😂早 " * 90,
    "晚安",
]


@pytest.mark.parametrize("max_tokens", [3, 10, 44, 500])
def test_encoding_only_the_end_of_the_history_gives_the_same_context(max_tokens, tokenizer):
    for num_left_out in range(len(TEXTS)):
        history = TEXTS[: len(TEXTS) - num_left_out]
        limits = {"ids": IDS, "max_history_len": 9, "max_tokens": max_tokens}
        whole, _ = build_context(encode_utterances(tokenizer, history), **limits)
        recent, _ = build_context(encode_recent(tokenizer, history, max_tokens), **limits)
        assert recent == whole


def test_a_huge_message_is_not_encoded_as_a_whole(tokenizer, monkeypatch):
    sizes = []

    def counted(tokenizer, texts):
        sizes.extend(map(len, texts))
        return encode_utterances(tokenizer, texts)

    monkeypatch.setattr("chitchat.chat.context.encode_utterances", counted)
    encode_recent(tokenizer, ["你好"] * 30_000 + ["你" * 1_000_000, "早"], 100)
    assert sum(sizes) < 1000


def test_context_of_a_long_history_takes_no_longer():
    """只看放得下的那几句：历史长一千倍，碰到的句子一样多。"""

    class Utterance(list):
        num_read = 0

        def __len__(self) -> int:
            Utterance.num_read += 1
            return super().__len__()

    counts = []
    for num_utterances in (20, 20_000):
        Utterance.num_read = 0
        history = [Utterance([200]) for _ in range(num_utterances)]
        context, is_truncated = build_context(
            history, ids=IDS, max_history_len=num_utterances, max_tokens=21
        )
        assert (len(context), is_truncated) == (21, True)
        counts.append(Utterance.num_read)
    assert counts[0] == counts[1]
