"""生成、候选、流式显示和整个文件的回答。"""

import itertools
import json
import math
import random
from concurrent.futures import Future

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.context import TextStream, build_context
from chitchat.chat.engine import Engine
from chitchat.chat.generation import MAX_ROWS, Row
from chitchat.chat.options import SamplingOptions
from chitchat.chat.scoring import score_continuations
from chitchat.chat.whole_files import answers as replies
from chitchat.chat.whole_files.answers import answer_file
from chitchat.corpus.reader import read_dialogues
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


def answer(bot: Chatbot, source, target, **options: object) -> str:
    loading: Future[Chatbot] = Future()
    loading.set_result(bot)
    options = {"seed": 5, "with_report": False, "settings": {"model_path": "m"}, **options}
    return answer_file(
        loading, lambda: read_dialogues(source), target, SamplingOptions(max_len=8), **options
    )


@pytest.fixture
def dialogues_path(tmp_path):
    path = tmp_path / "dialogues.txt"
    path.write_text("你好\n\n早上\n你是谁\n\n天气真不错\n吃饭了\n再见\n", encoding="utf-8")
    return path


def answer_and_stop(monkeypatch, num_batches: int, *args, **options) -> None:
    """每批一段，做完几批就像被杀一样停下。"""
    answer_batches = replies.answer_batches

    def stop(*args, **kwargs):
        yield from itertools.islice(answer_batches(*args, **kwargs), num_batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replies, "MAX_ROWS", 1)
        patch.setattr(replies, "answer_batches", stop)
        with pytest.raises(KeyboardInterrupt):
            answer(*args, **options)


def test_a_file_gets_one_reply_per_dialogue_and_resumes(
    make_bot, dialogues_path, tmp_path, monkeypatch
):
    whole, resumed = tmp_path / "whole.txt", tmp_path / "new" / "resumed.txt"
    answer(make_bot(), dialogues_path, whole)
    sources, results = (list(read_dialogues(path)) for path in (dialogues_path, whole))
    assert [dialogue[:-1] for dialogue in results] == sources
    answer_and_stop(monkeypatch, 2, make_bot(), dialogues_path, resumed)
    part = resumed.with_name("resumed.txt.part")
    assert not resumed.exists()
    done = part.read_bytes()
    assert done.count(b"\n") == 3
    part.write_bytes(done[:-3])  # 第二批没写完
    answer(make_bot(), dialogues_path, resumed)
    assert resumed.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
    assert not part.exists()


def test_without_a_seed_the_rest_uses_the_seed_of_the_first_part(
    make_bot, dialogues_path, tmp_path, monkeypatch
):
    target = tmp_path / "out.txt"
    answer_and_stop(monkeypatch, 1, make_bot(), dialogues_path, target, seed=None)
    seed = json.loads(target.with_name("out.txt.part").read_text().split("\n")[0])["seed"]
    answer(make_bot(), dialogues_path, target, seed=None)
    answer(make_bot(), dialogues_path, tmp_path / "again.txt", seed=seed)
    assert target.read_text() == (tmp_path / "again.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"model_path": "n"}}, "model_path"),
        ({"settings": {}}, "model_path"),
        ({"seed": 6}, "seed"),
        ({"with_report": True}, "input_path"),
    ],
)
def test_a_part_made_otherwise_is_not_continued(
    changes, named, make_bot, dialogues_path, tmp_path, monkeypatch
):
    answer_and_stop(monkeypatch, 1, make_bot(), dialogues_path, tmp_path / "out.txt")
    part = tmp_path / "out.txt.part"
    before = part.read_bytes()
    monkeypatch.setattr(replies, "require_sacrebleu", lambda: None)
    with pytest.raises(UserError, match=f"{named} 与那时不同"):
        answer(make_bot(), dialogues_path, tmp_path / "out.txt", **changes)
    assert part.read_bytes() == before


@pytest.mark.parametrize("name", ["dialogues.txt", "exists.txt", ".", "folder", "foreign.txt"])
@pytest.mark.parametrize("content", ["要紧的笔记", "笔记\n\n第二段", "[1]\n", "{}"])
def test_nothing_that_was_there_is_overwritten(name, content, make_bot, dialogues_path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "exists.txt").write_text(content, encoding="utf-8")
    (tmp_path / "foreign.txt.part").write_text(content, encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(UserError, match="output_path"):
        answer(make_bot(), dialogues_path, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_the_report_is_about_the_replies_whatever_the_file_is_called(
    make_bot, dialogues_path, tmp_path
):
    pytest.importorskip("sacrebleu")
    reports = [
        answer(make_bot(), dialogues_path, tmp_path / name, with_report=True)
        for name in ("out.txt", "out.tsv", "out.json")
    ]
    assert reports[0] == reports[1] == reports[2]
    assert "| 回复数 | 2 |" in reports[0].replace("  ", " ")


def test_the_max_len_must_fit_both_models(make_bot, make_model):
    bot, short = make_bot(), make_model(n_positions=40)
    bot.ranker.backward_engine = Engine(short.config.to_dict(), short.state_dict())
    bot.num_candidates = 3
    bot.check_options(SamplingOptions(max_len=37))
    options = SamplingOptions(top_k=0, temperature=50.0, no_repeat_ngram_size=1, max_len=37)
    assert list(bot.reply([[110, 111]], options, random.Random(0)))
    with pytest.raises(UserError, match=r"38.*40.*37"):
        bot.check_options(SamplingOptions(max_len=38))


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
