"""--optimizer auto：由量出的时间决定，量的时候什么也不改变。"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from chitchat.training import optimizer_choice
from chitchat.training.dataset import DialogueDataset
from chitchat.training.loaders import build_loaders
from chitchat.training.loss import LossModule
from chitchat.training.optimizer_choice import (
    MAX_MUON_COST,
    choose_optimizer,
    measure_orthogonalizing,
    measure_training,
)
from chitchat.training.processes import Processes

CLS, SEP = 101, 102


def make_loader(num_dialogues: int = 40, window: int = 8):
    """各段对话的长度从 5 到 24。"""
    rng = np.random.default_rng(0)
    table = [
        np.array([CLS, *rng.integers(103, 200, 3 + i % 20), SEP], dtype=np.uint16)
        for i in range(num_dialogues)
    ]
    options = {"max_len": 64, "pad_id": 0, "sep_id": SEP, "num_workers": 0, "seed": 0}
    return build_loaders(
        Rows(table), val_num=1, train_window=window, val_window=1,
        processes=Processes(), **options,
    )[0]  # fmt: skip


class Rows(list):
    """冒充 TokenTable 的列表。"""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self])


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """代替秒表：前向和反向每个 token 一秒，正交化由 orthogonalizing 定。"""
    clock = SimpleNamespace(orthogonalizing=0.0)
    monkeypatch.setattr(
        optimizer_choice, "measure_orthogonalizing", lambda model: clock.orthogonalizing
    )
    monkeypatch.setattr(optimizer_choice, "measure_training", lambda _, __, num_tokens: num_tokens)
    return clock


@pytest.mark.parametrize("num_processes", [1, 2])
def test_muon_is_taken_where_its_time_is_affordable(num_processes, clock, make_model):
    loader = make_loader()
    mean_tokens = loader.dataset.lengths.sum() / len(loader) / num_processes
    module = LossModule(make_model())
    for share, expected in ((0.99, "muon"), (1.01, "adamw")):
        clock.orthogonalizing = share * MAX_MUON_COST * mean_tokens
        assert choose_optimizer(module, loader, num_processes=num_processes) == expected


def test_measuring_changes_nothing(make_model):
    module = LossModule(make_model(resid_pdrop=0.1).train())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    choose_optimizer(module, make_loader(), num_processes=1)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(param.grad is None for param in module.parameters())
    assert module.training


class Slow(nn.Module):
    """每次要 overhead 秒、每个 token 另要 seconds 秒的模型；记下看到的段数。"""

    def __init__(self, limit: int, monkeypatch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.model = SimpleNamespace(device=torch.device("cpu"))
        self.limit, self.seen, self.now = limit, [], 0.0
        monkeypatch.setattr(optimizer_choice.time, "perf_counter", lambda: self.now)

    def forward(self, input_ids, labels):
        if len(input_ids) > self.limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        self.seen.append(len(input_ids))
        self.now += self.overhead + input_ids.numel() * self.seconds
        return (self.weight * input_ids.sum()).reshape(1, 1)


@pytest.mark.parametrize("overhead", [0.0, 0.7])
@pytest.mark.parametrize(
    ("seconds", "limit", "seen"),
    [
        (1.0, 99, [1, 1, 2, 2]),
        (0.1, 99, [1, 1, 2, 2]),
        (1e-4, 99, [1, 1, 2, 2, 4, 4, 8, 8]),
        (1e-4, 3, [1, 1, 2, 2]),
    ],
)
def test_bigger_batches_are_timed_and_the_rest_follows_the_slope(
    seconds, limit, seen, overhead, monkeypatch
):
    module = Slow(limit, monkeypatch)
    module.seconds, module.overhead = seconds, overhead
    batch = SimpleNamespace(
        input_ids=torch.ones(8, 10, dtype=torch.long), labels=None, lengths=[10] * 8
    )
    batch.labels = batch.input_ids
    assert measure_training(module, batch, 500) == pytest.approx(overhead + 500 * seconds)
    assert module.seen == seen


def test_every_hidden_matrix_is_orthogonalized_once(make_model, monkeypatch):
    model = make_model()
    shapes = []
    monkeypatch.setattr(
        optimizer_choice, "orthogonalize", lambda matrices: shapes.append(tuple(matrices.shape))
    )
    measure_orthogonalizing(model)
    timed = [shape for shape in shapes[1::2] for shape in [shape[1:]] * shape[0]]
    wanted = [tuple(p.shape) for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    assert sorted(timed) == sorted(wanted)


def test_middle_batch_has_the_dialogues_of_middle_length():
    dataset: DialogueDataset = make_loader().dataset
    batch = optimizer_choice._middle_batch(dataset, 5)
    ordered = sorted(dataset.lengths.tolist())
    start = (len(ordered) - 5) // 2
    assert batch.lengths == ordered[start : start + 5]
