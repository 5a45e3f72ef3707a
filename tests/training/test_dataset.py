"""训练数据：划分、按长度分桶、补齐。"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader

from chitchat.tokens.batch_encoder import EncodedBatch
from chitchat.tokens.token_table import TokenTable, load_token_table
from chitchat.tokens.token_writer import open_writer
from chitchat.training.batching import LengthBucketSampler, Window
from chitchat.training.dataset import IGNORE_INDEX, DialogueDataset, collate
from chitchat.training.loaders import split_indices
from chitchat.training.splitting import split_rows


@pytest.mark.parametrize(
    ("num_dialogues", "val_num", "num_val", "is_reduced"),
    [
        (100, 10, 10, False),
        (101, 10, 10, False),
        (99, 10, 9, True),
        (1000, 8000, 100, True),
        (2, 8000, 1, True),
        (9, 1, 1, True),
        (10, 1, 1, False),
    ],
)
def test_split_has_the_asked_size_or_a_tenth(num_dialogues, val_num, num_val, is_reduced):
    train, validation, reduced = split_indices(num_dialogues, val_num, seed=0)
    assert (len(validation), reduced) == (num_val, is_reduced)
    assert sorted([*train, *validation]) == list(range(num_dialogues))


def test_single_dialogue_is_used_on_both_sides():
    train, validation, _ = split_indices(1, 8000, seed=0)
    assert (train.tolist(), validation.tolist()) == ([0], [0])


def test_split_is_that_of_scikit_learn_and_depends_only_on_the_seed():
    expected = train_test_split(list(range(200)), test_size=20, random_state=3)
    for _ in range(2):
        train, validation, _ = split_indices(200, 20, seed=3)
        assert [train.tolist(), validation.tolist()] == expected
    assert split_indices(200, 20, seed=4)[1].tolist() != expected[1]


LENGTHS = np.random.default_rng(0).integers(2, 151, size=1003)


def windows_of(epoch: int = 0, lengths: np.ndarray = LENGTHS, **options) -> list[Window]:
    sampler = LengthBucketSampler(lengths, **{"window_size": 32, "seed": 5, **options})
    sampler.epoch = epoch
    windows = list(sampler)
    assert len(sampler) == len(windows)
    return windows


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window_size", [1, 7, 32, 1003, 5000])
def test_every_dialogue_comes_exactly_once_per_epoch(window_size, shuffle):
    windows = windows_of(window_size=window_size, shuffle=shuffle)
    assert len(windows) == -(-1003 // window_size)
    assert sorted(i for window in windows for i in window.indices) == list(range(1003))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("window_tokens", [1, 500, 2000, 10**9])
def test_windows_of_about_equal_token_counts(window_tokens, world_size):
    ranks = [
        windows_of(window_tokens=window_tokens, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    windows = [[i for part in parts for i in part.indices] for parts in zip(*ranks, strict=True)]
    assert sorted(i for window in windows for i in window) == list(range(1003))
    sizes = sorted(int(LENGTHS[window].sum()) for window in windows)
    assert sizes[-1] < window_tokens + LENGTHS.max()
    assert all(size > window_tokens - LENGTHS.max() for size in sizes[1:])
    assert windows_of(epoch=3, window_tokens=window_tokens) != windows_of(
        epoch=4, window_tokens=window_tokens
    )


def test_order_is_fixed_by_seed_and_epoch():
    assert windows_of(epoch=2) == windows_of(epoch=2)
    for other in (windows_of(epoch=3), windows_of(epoch=2, seed=6)):
        assert windows_of(epoch=2) != other


def test_windows_of_two_epochs_differ_in_order_and_in_company():
    """不只是窗口换了次序：同一个窗口里的伙伴也换了。"""
    first, second = ({frozenset(w.indices) for w in windows_of(epoch=e)} for e in (0, 1))
    assert len(first & second) < len(first) / 4
    lengths = [LENGTHS[window.indices].mean() for window in windows_of()]
    assert lengths != sorted(lengths)


def test_order_without_shuffling_is_the_same_in_every_epoch():
    assert windows_of(epoch=0, shuffle=False) == windows_of(epoch=1, shuffle=False, seed=9)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_partition_each_window(world_size):
    whole = windows_of(window_size=20)
    ranks = [windows_of(window_size=20, rank=r, world_size=world_size) for r in range(world_size)]
    for window, *parts in zip(whole, *ranks, strict=True):
        indices = [i for part in parts for i in part.indices]
        assert sorted(indices) == sorted(window.indices)
        assert {part.num_targets for part in parts} == {window.num_targets}
        sizes = [len(part.indices) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_targets_of_a_window_are_all_tokens_but_the_first_of_each_dialogue():
    lengths = np.array([5, 1, 3, 0, 2])
    (window,) = windows_of(lengths=lengths, window_size=5)
    assert window.num_targets == 4 + 0 + 2 + 0 + 1


def padding_share(groups: list[list[int]]) -> float:
    padded = sum(int(LENGTHS[group].max()) * len(group) for group in groups)
    return 1 - LENGTHS.sum() / padded


def test_length_buckets_leave_little_padding():
    order = np.random.default_rng(1).permutation(len(LENGTHS))
    at_random = [order[start : start + 32] for start in range(0, len(order), 32)]
    assert padding_share([window.indices for window in windows_of()]) < 0.05
    assert padding_share(at_random) > 0.4


def test_rows_are_padded_on_the_right_and_padding_is_no_target():
    rows = [np.array([5, 6, 7, 8]), np.array([0, 9])]  # 对话里的 0 不是补齐
    batch = collate(rows, 4, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [0, 9, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, 7, 8], [0, 9, -100, -100]]
    assert {batch.input_ids.dtype, batch.labels.dtype} == {torch.long}
    assert batch.num_targets == 4


@pytest.mark.parametrize(
    ("rows", "input_ids", "labels"),
    [
        ([], [[3, 3]], [[-100, -100]]),
        ([[]], [[3, 3]], [[-100, -100]]),
        ([[7]], [[7, 3]], [[7, -100]]),
        ([[], [7, 8, 9]], [[3, 3, 3], [7, 8, 9]], [[-100] * 3, [7, 8, 9]]),
    ],
)
def test_short_or_missing_rows_become_placeholders(rows, input_ids, labels):
    arrays = [np.array(row, dtype=np.int64) for row in rows]
    batch = collate(arrays, 0, pad_id=3)
    assert batch.input_ids.tolist() == input_ids
    assert batch.labels.tolist() == labels


def make_dataset(max_len: int) -> DialogueDataset:
    table = TokenTable.from_dialogues([[11, 12], [21, 22, 23, 24, 25], [31], [41, 42, 43]])
    return DialogueDataset(table, np.array([1, 3, 0]), max_len=max_len, pad_id=0, sep_id=0)


def test_dataset_truncates_and_maps_its_own_indices():
    dataset = make_dataset(max_len=4)
    assert len(dataset) == 3
    assert dataset.lengths.tolist() == [4, 3, 2]
    batch = dataset[Window([0, 2], 4)]
    assert batch.input_ids.tolist() == [[21, 22, 23, 24], [11, 12, 0, 0]]
    assert batch.labels.tolist() == [[21, 22, 23, 24], [11, 12, -100, -100]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_gives_one_batch_per_window_with_its_number_of_targets(num_workers):
    dataset = make_dataset(max_len=4)
    sampler = LengthBucketSampler(dataset.lengths, window_size=2, seed=0)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=num_workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    rows = [tuple(t for t in row if t) for batch in batches for row in batch.input_ids.tolist()]
    assert sorted(rows) == [(11, 12), (21, 22, 23, 24), (41, 42, 43)]
    for batch in batches:
        assert batch.num_targets == int((batch.labels[:, 1:] != IGNORE_INDEX).sum())


def test_spawned_workers_map_the_corpus_themselves(tmp_path):
    """Spawn 之下子进程收到的是 pickle：语料有好几 GB 时不能整个装进去。"""
    with open_writer(tmp_path / "corpus", 300, {}) as writer:
        writer.write(EncodedBatch.from_rows([[11, 12, 13], [21, 22], [31, 32]] * 10_000))
    table = load_token_table(tmp_path / "corpus", 300)
    dataset = DialogueDataset(table, np.arange(3), max_len=4, pad_id=0, sep_id=0)
    assert len(pickle.dumps(dataset)) < 2000
    sampler = LengthBucketSampler(dataset.lengths, window_size=2, seed=0)
    spawned = DataLoader(
        dataset, batch_size=None, sampler=sampler, num_workers=1, multiprocessing_context="spawn"
    )
    plain = DataLoader(dataset, batch_size=None, sampler=sampler)
    rows = [[batch.input_ids.tolist() for batch in loader] for loader in (spawned, plain)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("lengths", "max_rows", "limits", "parts"),
    [
        ([9] * 64, 99, (0.0, 0), [(0, 64)]),  # 没有补齐
        ([9] * 64, 40, (0.0, 0), [(0, 40), (40, 64)]),
        ([3] * 32 + [9] * 32, 99, (0.05, 0), [(0, 32), (32, 64)]),
        ([3] * 32 + [9] * 32, 99, (0.34, 0), [(0, 64)]),  # 补齐恰好三分之一
        ([3] * 16 + [9] * 48, 99, (0.05, 0), [(0, 16), (16, 32), (32, 64)]),
        ([*range(31)], 99, (0.05, 0), [(0, 31)]),  # 再分就不足 16 段
        ([0], 1, (0.05, 0), [(0, 1)]),  # 多进程时的占位
        ([3] * 32 + [9] * 32, 99, (0.05, 191), [(0, 32), (32, 64)]),  # 补齐 192 个
        ([3] * 32 + [9] * 32, 99, (0.05, 192), [(0, 64)]),  # 省不下这么多
    ],
)
def test_only_padded_windows_are_split(lengths, max_rows, limits, parts):
    max_padding, min_padding = limits
    assert parts == split_rows(
        lengths, max_rows=max_rows, max_padding=max_padding, min_padding=min_padding
    )
