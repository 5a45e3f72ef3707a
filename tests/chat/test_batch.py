"""许多行一起生成：中途加入、退出、旋钮各不相同，每行的回复都与单独生成时相同。"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import Engine
from chitchat.chat.generation import Batch, Generator, Row
from chitchat.chat.options import SamplingOptions
from chitchat.tokens.tokenizer import decode_response

KNOBS = [
    {},
    {"top_k": 0, "temperature": 1.5},
    {"top_p": 0.8, "repetition_penalty": 1.3},
    {"min_p": 0.05, "no_repeat_ngram_size": 2},
    {"greedy": True},
    {"max_len": 3},
]


@pytest.fixture
def make_bot(make_model, tokenizer):
    def make(precision: str = "int8", **fields: object) -> Chatbot:
        size = {"n_embd": 64, "n_head": 4, "n_layer": 3, "initializer_range": 0.3}
        model = make_model(**{**size, **fields}).eval()
        engine = Engine(model.config.to_dict(), model.state_dict(), precision=precision)
        return Chatbot(engine, tokenizer)

    return make


def make_rows(num_rows: int) -> list[Row]:
    """各行的上下文长短、旋钮、种子都不同。"""
    rng = random.Random(5)
    rows = []
    for i in range(num_rows):
        context = [101, *(rng.randrange(104, 150) for _ in range(rng.randrange(1, 25))), 102]
        options = SamplingOptions(**{"max_len": 20, **KNOBS[i % len(KNOBS)]})
        rows.append(Row(context, options, random.Random(i), has_scores=i % 3 == 0))
    return rows


def reply_alone(generator: Generator, i: int, num_rows: int) -> list[int]:
    return list(generator.tokens(make_rows(num_rows)[i]))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_row_that_joins_at_any_moment_gets_the_reply_it_gets_alone(precision, make_bot):
    generator = make_bot(precision).generator
    rows = make_rows(40)
    batch, waiting, rng = Batch(generator), list(rows), random.Random(1)
    while waiting or batch.num_rows:
        joining = [waiting.pop() for _ in range(min(len(waiting), rng.randrange(4)))]
        batch.add(joining)
        batch.step()
    for i, row in enumerate(rows):
        assert row.token_ids == reply_alone(generator, i, 40)


def test_int8_scores_are_those_of_the_row_alone_bit_for_bit(make_bot):
    """不只是抽到的 token：分数也逐位相同，所以怎样抽都一样。"""
    generator = make_bot("int8").generator
    rows = make_rows(32)
    generator.generate(rows)
    for i in range(0, 32, 3):
        alone = make_rows(32)[i]
        generator.generate([alone])
        assert (alone.token_ids, alone.log_prob_sum) == (rows[i].token_ids, rows[i].log_prob_sum)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 2.0)])
def test_in_other_precisions_a_row_differs_by_rounding_only(precision, bound, make_bot):
    """矩阵乘法随行数换用不同的累加次序，这里只保证差得不多；bf16 的回复因此可能不同。"""
    generator = make_bot(precision).generator
    contexts = [[*row.context] for row in make_rows(24)]
    engine = generator.engine
    groups = [(torch.tensor([c]), engine.new_cache(1, len(c))) for c in contexts]
    together = engine.hidden_groups(groups)
    for context, hidden in zip(contexts, together, strict=True):
        alone = engine.hidden(torch.tensor([context]), engine.new_cache(1, len(context)))
        difference = engine.logits(alone) - engine.logits(hidden)
        assert difference.abs().max() < bound


def test_a_removed_row_stops_and_the_others_do_not_notice(make_bot):
    generator = make_bot().generator
    rows = make_rows(9)
    batch = Batch(generator)
    batch.add(rows)
    batch.step()
    batch.remove(rows[4])
    said = list(rows[4].token_ids)
    while batch.num_rows:
        assert all(row is not rows[4] for row, _ in batch.step())
    assert rows[4].token_ids == said
    for i in (*range(4), *range(5, 9)):
        assert rows[i].token_ids == reply_alone(generator, i, 9)
    assert batch.step() == []


def test_memory_of_finished_rows_is_given_back(make_bot):
    batch = Batch(make_bot().generator)
    batch.add(make_rows(9))
    while batch.num_rows:
        batch.step()
    assert batch._groups == []


def test_closing_a_reply_stops_it_and_what_was_said_stays(make_bot, monkeypatch):
    bot, steps = make_bot(), []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: steps.append(1) or step(self))
    options = SamplingOptions(max_len=30, top_k=0, temperature=5.0)
    whole = list(bot.reply([[110, 111]], options, random.Random(3)))
    reply = bot.reply([[110, 111]], options, random.Random(3))
    steps.clear()
    begun = list(itertools.islice(reply, 3))
    num_steps = len(steps)
    reply.close()
    assert list(reply) == []
    assert begun == whole[:3]
    assert len(steps) == num_steps == len(reply.token_ids) < 30
    assert reply.text.startswith("".join(begun))
    assert reply.text == decode_response(bot.tokenizer, reply.token_ids)


def test_many_replies_can_be_interleaved(make_bot):
    bot = make_bot()
    options = SamplingOptions(max_len=15)
    histories = [[[110 + i, 111]] for i in range(5)]
    replies = [bot.reply(history, options, random.Random(i)) for i, history in enumerate(histories)]
    texts = [""] * 5
    for pieces in itertools.zip_longest(*replies, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    for i, history in enumerate(histories):
        assert texts[i] == "".join(bot.reply(history, options, random.Random(i)))
        assert texts[i] == replies[i].text


def test_nothing_is_computed_before_the_first_piece_is_taken(make_bot, monkeypatch):
    steps = []
    monkeypatch.setattr(Batch, "step", steps.append)
    make_bot().reply([[110]], SamplingOptions(), random.Random(0)).close()
    assert steps == []
