"""显卡：与 CPU 算出同样的数；两个副本等于一块卡。没有显卡时自动跳过。"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from chitchat.chat.engine import Engine
from chitchat.chat.scoring import score_continuations
from chitchat.training.dataset import Batch, collate
from chitchat.training.loss import LossModule
from chitchat.training.optimizers import build_optimizers
from chitchat.training.processes import Processes, parallelize
from chitchat.training.updater import Updater

NUM_GPUS = torch.cuda.device_count()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 1, reason="需要显卡")]
NEEDS_TWO = [pytest.mark.multi_gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="需要两块显卡")]
ONE, TWO = ["cuda:0"], ["cuda:0", "cuda:1"]
CPU = ["cpu"]
DIALOGUES = [
    [101, 110, 111, 102],
    [101, 120, 121, 122, 123, 124, 102, 130, 102],
    [101, 140, 102, 141, 142, 102],
    [101, 150, 151, 102, 152, 102],
    [101, 160, 102],
]


def make_batch(num_dialogues: int) -> Batch:
    rows = [np.array(token_ids) for token_ids in DIALOGUES[:num_dialogues]]
    num_targets = sum(len(row) - 1 for row in rows)
    return collate(rows, num_targets, pad_id=0)


def build_loss_module(
    model: nn.Module, names: list[str], precision: str = "fp32"
) -> tuple[nn.Module, torch.device]:
    devices = [torch.device(name) for name in names]
    module = LossModule(copy.deepcopy(model).to(devices[0]), precision=precision)
    return parallelize(module, devices, Processes()), devices[0]


def sums_on(names: list[str], model: nn.Module, batch: Batch) -> torch.Tensor:
    """三个和，形状 (3,)，在 CPU 上。"""
    module, device = build_loss_module(model.eval(), names)
    with torch.no_grad():
        sums = module(batch.input_ids.to(device), batch.labels.to(device))
    assert sums.shape == (len(names), 3) or len(batch.input_ids) < len(names)
    return sums.sum(dim=0).cpu()


def trained_on(names: list[str], model: nn.Module, *, optimizer: str, precision: str) -> dict:
    """更新三次之后的参数。"""
    module, device = build_loss_module(model.train(), names, precision)
    inner = getattr(module, "module", module).model
    updater = Updater(
        module,
        build_optimizers(inner, optimizer, lr=1e-3, eps=1e-9),
        [],
        max_grad_norm=1.0,
        processes=Processes(),
        device=device,
    )
    for _ in range(3):
        updater.step(make_batch(5))
    updater.check_finite()
    return {name: param.detach().cpu() for name, param in inner.named_parameters()}


@pytest.mark.parametrize(
    "names", [pytest.param(ONE, marks=NEEDS_GPU), pytest.param(TWO, marks=NEEDS_TWO)]
)
@pytest.mark.parametrize("num_dialogues", [1, 2, 3, 5])
def test_loss_counts_and_hits_agree_with_the_cpu(names, num_dialogues, make_model):
    model, batch = make_model(), make_batch(num_dialogues)
    found, expected = sums_on(names, model, batch), sums_on(CPU, model, batch)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert found[1:].tolist() == expected[1:].tolist()


@pytest.mark.parametrize(
    ("names", "reference"),
    [pytest.param(ONE, CPU, marks=NEEDS_GPU), pytest.param(TWO, ONE, marks=NEEDS_TWO)],
)
def test_three_updates_give_the_same_parameters(names, reference, make_model):
    model = make_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    options = {"optimizer": "adamw", "precision": "fp32"}
    found, expected = trained_on(names, model, **options), trained_on(reference, model, **options)
    for name, param in found.items():
        # AdamW 的头几步每次约走一个 lr：方向看错的话会差 1e-3 以上。
        is_moved = (expected[name] - before[name]).abs() > 1e-4
        moved = is_moved.sum().item()
        is_close = torch.isclose(param, expected[name], rtol=1e-3, atol=2e-4)
        assert (is_close & is_moved).sum().item() >= 0.99 * moved, name


@pytest.mark.parametrize(
    "names", [pytest.param(ONE, marks=NEEDS_GPU), pytest.param(TWO, marks=NEEDS_TWO)]
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_parameter_changes_in_every_precision(names, optimizer, precision, make_model):
    model = make_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    after = trained_on(names, model, optimizer=optimizer, precision=precision)
    for name, param in after.items():
        assert torch.isfinite(param).all(), name
        assert not torch.equal(param, before[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("names", [pytest.param(ONE, marks=NEEDS_GPU)])
def test_a_batch_of_replies_equals_the_cpu(names, precision, make_model):
    """int8 之外的推理引擎：补齐的一批与 CPU 上算出同样的分数。"""
    model = make_model(initializer_range=0.5).eval()
    pairs = [([101, 110, 102], [111, 112, 102]), ([101], [115, 116, 117, 118, 102])]
    found, expected = (
        score_continuations(
            Engine(model.config.to_dict(), model.state_dict(), precision=kind, device=device),
            pairs,
            0,
        )
        for kind, device in ((precision, names[0]), ("fp32", "cpu"))
    )
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("names", [pytest.param(TWO, marks=NEEDS_TWO)])
def test_only_three_numbers_per_card_are_gathered(names, make_model):
    module, device = build_loss_module(make_model(), names)
    batch = make_batch(5)
    assert module(batch.input_ids.to(device), batch.labels.to(device)).shape == (2, 3)


def test_two_replicas_on_the_cpu_equal_one(make_model):
    """没有显卡也能验证的部分：两个副本各算一半，三个和相加与整批相同。"""
    model, batch = make_model().eval(), make_batch(5)
    module = LossModule(model)
    halves = [
        module(batch.input_ids[part], batch.labels[part]) for part in (slice(0, 3), slice(3, 5))
    ]
    found, expected = torch.cat(halves).sum(dim=0), module(batch.input_ids, batch.labels)[0]
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found[1:].tolist() == expected[1:].tolist()
