"""生成、候选、流式显示和整个文件的回答。"""

import math
import random
from concurrent.futures import Future

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor

from chitchat.corpus import read_dialogues
from chitchat.dataset import reverse_dialogues
from chitchat.decoding import MAX_ROWS, Chatbot, ResponseStreamer, build_context
from chitchat.engine import Engine
from chitchat.generation import score_continuations
from chitchat.knobs import SamplingOptions
from chitchat.replies import answer_file
from chitchat.runtime import UserError
from chitchat.token_table import TokenTable
from chitchat.tokenizer import (
    SpecialIds,
    decode_response,
    encode_utterances,
    unspeakable_ids,
)

CONTEXTS = [[101, 110, 111, 102], [101, 115, 102], [101, *range(110, 122), 102]]
GREEDY = SamplingOptions(greedy=True, max_len=12)


@pytest.fixture
def model(make_model):
    return make_model(initializer_range=0.5).eval()


@pytest.fixture
def make_bot(model, tokenizer):
    def make(precision: str = "fp32", **options: object) -> Chatbot:
        engine = Engine(model.config.to_dict(), model.state_dict(), precision=precision)
        return Chatbot(engine, tokenizer, **{"seed": 0, **options})

    return make


def generate(bot: Chatbot, contexts, options, seed: int = 0):
    rngs = [random.Random(seed + i) for i in range(len(contexts))]
    return [response.token_ids for response in bot.generator.generate(contexts, options, rngs)]


IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)


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


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(max_len=12, repetition_penalty=1.5)])
def test_a_reply_does_not_depend_on_its_batch(make_bot, options):
    bot = make_bot()
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
    replies = [make_bot(seed=seed).reply([[110, 111]], SamplingOptions())[0] for seed in (3, 3, 4)]
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
    bot.num_candidates, bot.backward_engine = 6, bot.engine
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
    bot.num_candidates, bot.backward_engine = 5, bot.engine
    (candidate,) = bot.rank_candidates([101, 110, 102], GREEDY, random.Random(0))
    pair = ([101, *candidate.token_ids, 102], [110, 102])
    expected = score_continuations(bot.engine, [pair], 0)[0] / 2
    assert candidate.backward == pytest.approx(expected, rel=1e-3)


def test_many_candidates_are_made_a_few_at_a_time(make_bot, monkeypatch):
    """内存只取决于一批有几行，与要几个候选无关。"""
    bot = make_bot()
    bot.num_candidates, bot.backward_engine = 2 * MAX_ROWS + 3, bot.engine
    sizes = []
    hidden = Engine.hidden

    def watch(self, input_ids, *args, **kwargs):
        sizes.append(len(input_ids))
        return hidden(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Engine, "hidden", watch)
    options = SamplingOptions(top_k=0, temperature=50.0, max_len=6)
    candidates = bot.rank_candidates([101, 110, 102], options, random.Random(0))
    assert len({tuple(c.token_ids) for c in candidates}) > 2 * MAX_ROWS
    assert max(sizes) == MAX_ROWS
    assert all(candidate.backward is not None for candidate in candidates)


@pytest.mark.parametrize("text", ["3.14", "it's ok", "www.abc.com", "12.30 hello, a", "你好a.cn"])
def test_spaces_that_a_later_token_removes_are_not_streamed(text, tokenizer):
    pieces: list[str] = []
    streamer = ResponseStreamer(tokenizer, pieces.append)
    for token_id in encode_utterances(tokenizer, [text])[0]:
        streamer.put(token_id)
    streamer.end()
    assert "".join(pieces) == text


def test_streamed_pieces_add_up_to_the_whole_text(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        token_ids = [rng.randrange(104, tokenizer.get_vocab_size()) for _ in range(15)]
        pieces: list[str] = []
        streamer = ResponseStreamer(tokenizer, pieces.append)
        for token_id in token_ids:
            streamer.put(token_id)
        streamer.end()
        assert "".join(pieces) == decode_response(tokenizer, token_ids)
        assert "##" not in "".join(pieces)


def test_reversed_dialogues_keep_the_words_of_each_utterance():
    table = TokenTable.from_dialogues([[101, 5, 6, 102, 7, 102, 8, 9, 102], [101, 5, 102]])
    reversed_rows = [row.tolist() for row in reverse_dialogues(table, 102)]
    assert reversed_rows == [[101, 8, 9, 102, 7, 102, 5, 6, 102], [101, 5, 102]]


def answer(bot: Chatbot, source, target, **options: object) -> str:
    loading: Future[Chatbot] = Future()
    loading.set_result(bot)
    options = {"seed": 5, "with_report": False, **options}
    return answer_file(loading, source, target, SamplingOptions(max_len=8), **options)


@pytest.fixture
def dialogues_path(tmp_path):
    path = tmp_path / "dialogues.txt"
    path.write_text("你好\n\n早上\n你是谁\n\n天气真不错\n吃饭了\n再见\n", encoding="utf-8")
    return path


def test_a_file_gets_one_reply_per_dialogue_and_resumes(make_bot, dialogues_path, tmp_path):
    whole, resumed = tmp_path / "whole.txt", tmp_path / "resumed.txt"
    answer(make_bot(), dialogues_path, whole)
    sources, results = (list(read_dialogues(path)) for path in (dialogues_path, whole))
    assert [dialogue[:-1] for dialogue in results] == sources
    text = whole.read_text(encoding="utf-8")
    part = tmp_path / "resumed.txt.part"
    part.write_text(text[: text.index("\n\n") + 4], encoding="utf-8")  # 第二段没写完
    answer(make_bot(), dialogues_path, resumed)
    assert resumed.read_text(encoding="utf-8") == text
    assert not part.exists()


def test_a_part_of_another_input_is_not_continued(make_bot, dialogues_path, tmp_path):
    (tmp_path / "out.txt.part").write_text("晚安\n你\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="另一份输入"):
        answer(make_bot(), dialogues_path, tmp_path / "out.txt")


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
