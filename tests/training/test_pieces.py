"""长对话切成块：与另一种写法的切法相同，每个 token 恰好预测一次，loss 与整段前向的相同。"""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from chitchat.errors import UserError
from chitchat.tokens.batch_encoder import EncodedBatch
from chitchat.tokens.token_table import TokenTable, load_token_table
from chitchat.tokens.token_writer import open_writer
from chitchat.training import pieces as pieces_module
from chitchat.training.batching import Window
from chitchat.training.dataset import (
    IGNORE_INDEX,
    Batch,
    DialogueDataset,
    reverse_dialogues,
)
from chitchat.training.loaders import build_loaders
from chitchat.training.loss import LossModule
from chitchat.training.pieces import count_reply_tokens, cut_dialogue, cut_pieces
from chitchat.training.processes import Processes

CLS, SEP = 101, 102


def make_dialogue(rng: np.random.Generator, num_utterances: int, longest: int) -> list[int]:
    """互不相同的 token，因此看得出每一个被预测了几次。"""
    sizes = rng.integers(0, longest + 1, num_utterances)
    words = iter(range(1000, 10_000_000))
    row = [CLS]
    for size in sizes:
        row += [*(next(words) for _ in range(size)), SEP]
    return row


def plain_cut(row: list[int], max_len: int) -> list[tuple[list[int], list[int]]]:
    """逐句装箱：每块的 token 和 labels。"""
    utterances, rest = [], row[1:]
    while rest:
        size = rest.index(SEP) + 1 if SEP in rest else len(rest)
        utterances.append(rest[:size])
        rest = rest[size:]
    blocks, before = [], None
    while utterances:
        tokens, labels = [CLS], [CLS]
        if before is not None and 1 + len(before) + len(utterances[0]) <= max_len:
            tokens, labels = tokens + before, labels + [IGNORE_INDEX] * len(before)
        if 1 + len(utterances[0]) > max_len:
            before = utterances.pop(0)
            tokens, labels = tokens + before[: max_len - 1], labels + before[: max_len - 1]
        while utterances and len(tokens) + len(utterances[0]) <= max_len:
            before = utterances.pop(0)
            tokens, labels = tokens + before, labels + before
            if len(tokens) == max_len:
                break
        blocks.append((tokens, labels))
    return blocks


def read_all(dataset: DialogueDataset) -> list[tuple[list[int], list[int]]]:
    """每块单独取出，去掉补齐。"""
    blocks = []
    for i in range(len(dataset)):
        batch = dataset[Window([i], 0)]
        size = batch.lengths[0]
        assert size == dataset.lengths[i]
        blocks.append((batch.input_ids[0, :size].tolist(), batch.labels[0, :size].tolist()))
    return blocks


def make_dataset(rows: list[list[int]], max_len: int, **options: object) -> DialogueDataset:
    table = TokenTable.from_dialogues(rows)
    indices = np.arange(len(rows))
    return DialogueDataset(table, indices, max_len=max_len, pad_id=0, sep_id=SEP, **options)


@pytest.mark.parametrize("max_len", [2, 5, 9, 20, 64, 10_000])
def test_pieces_are_those_of_an_independent_cut(max_len):
    rng = np.random.default_rng(0)
    rows = [make_dialogue(rng, int(rng.integers(1, 30)), 12) for _ in range(60)]
    rows += [[CLS], [CLS, SEP], [CLS, 7, 8, 9], [CLS, 7, SEP, 8]]
    expected = [block for row in rows for block in plain_cut(row, max_len) or [([CLS], [CLS])]]
    assert read_all(make_dataset(rows, max_len)) == expected


@pytest.mark.parametrize("max_len", [16, 40])
def test_each_token_is_predicted_exactly_once(max_len):
    rng = np.random.default_rng(1)
    rows = [make_dialogue(rng, 40, 14) for _ in range(5)]
    dataset = make_dataset(rows, max_len)
    assert dataset.lengths.max() <= max_len
    for i, row in enumerate(rows):
        mine = dataset.pieces.spans[dataset.pieces.dialogues == i]
        assert [t for _, start, stop in mine for t in range(start, stop)] == [*range(1, len(row))]
    targets = [t for _, labels in read_all(dataset) for t in labels[1:] if t != IGNORE_INDEX]
    assert targets == [t for row in rows for t in row[1:]]
    assert dataset.num_targets.sum() == len(targets)


def test_only_an_utterance_too_long_by_itself_is_cut_off():
    row = np.array([CLS, 1, SEP, *range(2, 12), SEP, 12, SEP])
    spans, num_cut, num_lost = cut_dialogue(row, 6, SEP)
    assert spans == [(1, 1, 3), (3, 3, 8), (14, 14, 16)]
    assert (num_cut, num_lost) == (1, 6)


def test_hundred_dialogues_of_two_thousand_tokens_are_used_whole():
    rows = [[CLS, *([*range(1000, 1019), SEP] * 100)] for _ in range(100)]
    dataset = make_dataset(rows, 150)
    assert dataset.num_targets.sum() == 100 * 2000
    assert dataset.lengths.max() <= 150


@pytest.fixture
def log(caplog, monkeypatch):
    logger = logging.getLogger("chitchat.training.loaders")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "propagate", False)
    return lambda: [record.getMessage() for record in caplog.records]


def loaders_of(table, max_len: int, **options: object):
    defaults = {"val_num": 1, "train_window": 4, "val_window": 2, "num_workers": 0, "seed": 0}
    defaults |= {"processes": Processes(), "pad_id": 0, "sep_id": SEP}
    return build_loaders(table, max_len=max_len, **{**defaults, **options})


def test_log_says_how_many_utterances_were_cut_off(log):
    rows = [[CLS, *range(1000, 1030), SEP, 5, SEP]] * 3 + [[CLS, 5, SEP]] * 7
    loaders = loaders_of(TokenTable.from_dialogues(rows), 20)
    assert "dialogues=10 pieces=13 utterances_cut=3 tokens_lost=36" in log()[-1]
    assert sum(len(loader.dataset) for loader in loaders) == 13  # 验证集也一样切


def test_nothing_is_said_when_all_dialogues_fit(log):
    loaders_of(TokenTable.from_dialogues([[CLS, 5, SEP]] * 20), 20)
    assert not any("cut" in line for line in log())


def plain_loss(model, tokens: list[int], labels: list[int]) -> tuple[torch.Tensor, int]:
    """一块的交叉熵之和：只数 labels 里写明的位置。"""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    targets = torch.tensor(labels[1:])
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    return loss, int((targets != IGNORE_INDEX).sum())


def make_speakable(num_utterances: int, longest: int = 6) -> list[int]:
    """小模型词表里的 token。"""
    row = make_dialogue(np.random.default_rng(2), num_utterances, longest)
    return [token if token < 1000 else 104 + token % 40 for token in row]


def sums_of(model, dataset: DialogueDataset) -> torch.Tensor:
    batch: Batch = dataset[Window([*range(len(dataset))], 0)]
    return LossModule(model)(batch.input_ids, batch.labels)[0]


def test_loss_and_gradient_are_those_of_the_counted_positions(make_model):
    rows = [make_speakable(n) for n in (30, 3, 12)]
    model = make_model()
    losses, counts = zip(
        *(plain_loss(model, *block) for row in rows for block in plain_cut(row, 20)), strict=True
    )
    expected = torch.autograd.grad(sum(losses), list(model.parameters()))
    sums = sums_of(model, make_dataset(rows, 20))
    assert sums[1] == sum(counts) == sum(len(row) - 1 for row in rows)
    assert sums[0].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    found = torch.autograd.grad(sums[0], list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_loss_of_the_pieces_is_that_of_one_long_forward(make_bigram_model):
    """只看上一个 token 的模型，有一句上文就够了：切与不切，loss 应当相同。"""
    chain = {"[CLS]": {"你": 3.0}, "你": {"好": 2.0}, "[SEP]": {"早": 4.0, "你": 1.0}}
    model = make_bigram_model(chain, n_positions=256)
    row = make_speakable(40, 5)
    dataset = make_dataset([row], 20)
    assert len(dataset) > 5
    assert (dataset.pieces.spans[1:, 0] < dataset.pieces.spans[1:, 1]).all()  # 都带着上文
    whole, count = plain_loss(model, row, row)
    sums = sums_of(model, dataset)
    assert sums[1] == count
    assert sums[0].item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("max_len", [12, 40, 1000])
@pytest.mark.parametrize("at_once", [1, 3, 2**16])
def test_only_even_utterances_count_also_across_pieces(max_len, at_once, monkeypatch):
    monkeypatch.setattr(pieces_module, "DIALOGUES_AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    rows = [make_dialogue(rng, int(n), 9) for n in rng.integers(1, 12, 20)]
    dataset = make_dataset(rows, max_len, is_only_replies=True)
    found = [t for _, labels in read_all(dataset) for t in labels[1:] if t != IGNORE_INDEX]
    replies = []
    for row in rows:
        number = 0
        for token in row[1:]:
            replies += [token] if number % 2 else []
            number += token == SEP
    assert found == replies
    assert dataset.num_targets.sum() == len(replies)
    assert dataset.num_targets.min() > 0


def test_reply_counts_do_not_depend_on_the_order_of_the_dialogues():
    rows = [make_dialogue(np.random.default_rng(i), 9, 9) for i in range(10)]
    table = TokenTable.from_dialogues(rows)
    order = np.random.default_rng(0).permutation(10)[:6]
    pieces = cut_pieces(table, order, max_len=15, sep_id=SEP)
    counts = count_reply_tokens(table, pieces, SEP)
    for i, dialogue in enumerate(order):
        alone = cut_pieces(table, np.array([dialogue]), max_len=15, sep_id=SEP)
        mine = counts[pieces.dialogues == order[i]]
        assert mine.tolist() == count_reply_tokens(table, alone, SEP).tolist()


def test_corpus_without_replies_is_refused():
    with pytest.raises(UserError, match="--loss_on all"):
        loaders_of(TokenTable.from_dialogues([[CLS, 5, SEP]] * 20), 20, is_only_replies=True)


def write_folder(folder: Path, rows: list[list[int]]) -> TokenTable:
    with open_writer(folder, 60_000, {}) as writer:
        writer.write(EncodedBatch.from_rows(rows))
    return load_token_table(folder, 60_000)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_mapped_corpus_is_cut_and_reversed_without_a_copy(is_reversed, tmp_path):
    """语料 8 MB，只有几段放不下；数据集自己占的远小于它。"""
    rows = [[CLS, *([7, 8, 9, SEP] * 10)] for _ in range(100_000)]
    rows[5] = [CLS, *([7, 8, 9, SEP] * 100)]
    table = write_folder(tmp_path / "corpus", rows)
    source = reverse_dialogues(table, SEP) if is_reversed else table
    tracemalloc.start()
    dataset = DialogueDataset(source, np.arange(50), max_len=50, pad_id=0, sep_id=SEP)
    dataset[Window([*range(50)], 0)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < table.tokens.nbytes / 5
    assert dataset.num_targets.sum() == 49 * 40 + 400


def test_reversed_dialogue_is_cut_like_any_other():
    row = make_dialogue(np.random.default_rng(4), 30, 9)
    utterances = [[]]
    for token in row[1:]:
        utterances[-1].append(token)
        utterances += [[]] if token == SEP else []
    backward = [CLS, *(token for u in reversed(utterances) for token in u)]
    table = reverse_dialogues(TokenTable.from_dialogues([row]), SEP)
    dataset = DialogueDataset(table, np.array([0]), max_len=25, pad_id=0, sep_id=SEP)
    assert read_all(dataset) == plain_cut(backward, 25)


@pytest.mark.parametrize("options", [{}, {"is_only_replies": True}])
def test_two_processes_share_each_window_of_pieces(options):
    """各自的份合起来就是整个窗口，分母也是整个窗口的。"""
    rows = [make_dialogue(np.random.default_rng(i), 20, 9) for i in range(12)]
    table = TokenTable.from_dialogues(rows)
    whole, _ = loaders_of(table, 30, **options)
    shares = [loaders_of(table, 30, processes=Processes(r, 2, r), **options)[0] for r in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        targets = [sorted(targets_of(batch)), sorted(t for part in parts for t in targets_of(part))]
        assert targets[0] == targets[1]
        assert {batch.num_targets, *(part.num_targets for part in parts)} == {len(targets[0])}


def targets_of(batch: Batch) -> list[int]:
    targets = batch.labels[:, 1:]
    return targets[targets != IGNORE_INDEX].tolist()
