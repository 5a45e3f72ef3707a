"""优化器与学习率：与 torch、transformers 的同名实现一致。"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from chitchat.training import optimizers as optimizers_module
from chitchat.training.loss import LossModule
from chitchat.training.optimizers import (
    Muon,
    build_optimizers,
    build_schedulers,
    learning_rate_factor,
    orthogonalize,
)

SHAPES = [(32, 32), (48, 12), (12, 48), (12, 48), (16, 17)]


def train_matrices(optimizer_class: type, num_steps: int, **options: object) -> list[torch.Tensor]:
    """同样的起点和同样的梯度，走若干步，返回最后的权重。"""
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer_class(params, **options)
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 3
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "is_fast", "tolerance"),
    [("bfloat16", False, 0.02), ("bfloat16", True, 0.03), ("float32", False, 1e-5)],
)
def test_muon_equals_that_of_torch(dtype, is_fast, tolerance, weight_decay, monkeypatch):
    """torch 的正交化固定用 bfloat16；把那次转换换成 float32，两者应当几乎逐位相同。"""
    monkeypatch.setattr(optimizers_module, "has_fast_bf16", lambda device: is_fast)
    if dtype == "float32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": weight_decay}
    start = train_matrices(Muon, 0, **options)
    actual = train_matrices(Muon, 5, **options)
    expected = train_matrices(torch.optim.Muon, 5, adjust_lr_fn="match_rms_adamw", **options)
    for before, mine, theirs in zip(start, actual, expected, strict=True):
        assert (mine - theirs).norm() < tolerance * (theirs - before).norm()


def test_muon_leaves_parameters_without_gradient_alone():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    params[0].grad = torch.eye(4)
    Muon(params, lr=0.1, weight_decay=0.5).step()
    assert params[1].equal(torch.ones(4, 4))
    assert not params[0].equal(torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 64, 16), (2, 16, 64), (1, 1, 5)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalize_brings_singular_values_near_one(shape, scale):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * scale
    before = matrices.clone()
    result = orthogonalize(matrices)
    assert matrices.equal(before)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_orthogonalize_keeps_the_singular_vectors():
    """U S V 变成 U S' V：投影回 U、V 以后仍是对角阵。"""
    matrices = torch.randn(2, 10, 14, generator=torch.Generator().manual_seed(3))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ orthogonalize(matrices) @ vh.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


@pytest.mark.parametrize("ratio", [1.5, 4])
def test_small_side_equals_the_plain_iteration_also_for_a_wide_spectrum(ratio):
    """奇异值从 1 到百万分之一；参照是双精度的普通迭代。"""
    generator = torch.Generator().manual_seed(5)
    a, b = 40, int(40 * ratio)
    u, _ = torch.linalg.qr(torch.randn(2, a, a, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(2, b, a, generator=generator, dtype=torch.float64))
    matrices = u @ torch.diag_embed(torch.logspace(0, -6, a, dtype=torch.float64)) @ v.mT
    matrices = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    expected = optimizers_module._iterate(matrices)
    found = optimizers_module._iterate_small_side(matrices.float()).double()
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_orthogonalize_takes_bf16_where_the_cpu_multiplies_it_fast(is_fast, dtype, monkeypatch):
    monkeypatch.setattr(optimizers_module, "has_fast_bf16", lambda device: is_fast)
    result = orthogonalize(torch.randn(2, 16, 64))
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.parametrize("is_cpu", [True, False])
def test_non_finite_gradient_leaves_weights_and_momenta_alone(is_cpu):
    """GPU 上不能为判断而等待，用乘以零来跳过；这里让 CPU 走那条路。"""
    params = [nn.Parameter(torch.randn(6, 9)) for _ in range(2)]
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    for param in params:
        param.grad = torch.randn(6, 9)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    momenta = [optimizer.state[param]["momentum_buffer"].clone() for param in params]
    params[0].grad[0, 0] = float("nan")
    params[1].grad[2, 3] = float("inf")
    bad = torch.ones(())
    if is_cpu:
        optimizer.found_inf = bad
        optimizer.step()
    else:
        with torch.no_grad():
            optimizer._update(params, optimizer.param_groups[0], bad)
    for param, value, momentum in zip(params, before, momenta, strict=True):
        assert param.equal(value)
        assert optimizer.state[param]["momentum_buffer"].equal(momentum)


def test_momenta_stay_in_one_block_and_are_taken_back_from_a_state():
    def make() -> tuple[list[nn.Parameter], Muon]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
        return params, Muon(params, lr=0.1)

    def step(params: list[nn.Parameter], optimizer: Muon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(4, 4, generator=generator)
        optimizer.step()

    params, optimizer = make()
    step(params, optimizer, 1)
    buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 1
    others, resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        step(params, optimizer, seed)
        step(others, resumed, seed)
    assert all(a.equal(b) for a, b in zip(params, others, strict=True))


def test_orthogonalize_of_zeros_is_zero():
    assert orthogonalize(torch.zeros(1, 4, 6)).equal(torch.zeros(1, 4, 6))


@pytest.mark.parametrize("wrap", [LossModule, lambda model: model])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_is_in_exactly_one_optimizer(make_model, name, wrap):
    module = wrap(make_model())
    groups = [g for o in build_optimizers(module, name, lr=0.1, eps=1e-8) for g in o.param_groups]
    given = [id(param) for group in groups for param in group["params"]]
    assert sorted(given) == sorted({id(param) for param in module.parameters()})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay_and_muon_gets_those_of_the_blocks(make_model, name):
    model = make_model()
    optimizers = build_optimizers(model, name, lr=0.125, eps=1e-7, weight_decay=0.25)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, Muon][: len(optimizers)]
    options = {
        id(param): (type(optimizer), group["weight_decay"], group["lr"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    }
    for param_name, param in model.named_parameters():
        in_block = param_name.split(".")[1] == "h"
        is_muon = name == "muon" and in_block and param.ndim == 2
        expected = (Muon if is_muon else torch.optim.AdamW, 0.25 * (param.ndim == 2), 0.125)
        assert options[id(param)] == expected, param_name
    assert {group["eps"] for group in optimizers[0].param_groups} == {1e-7}


def test_tied_weight_is_given_once(make_model):
    model = make_model()
    (optimizer,) = build_optimizers(model, "adamw", lr=0.1, eps=1e-8)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert sum(param is model.lm_head.weight for param in params) == 1


SCHEDULES = [(0, 10), (3, 10), (10, 10), (1, 1), (0, 1), (20, 10)]


@pytest.mark.parametrize(("warmup_steps", "total_steps"), SCHEDULES)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
        ("constant", lambda o, warmup, total: get_constant_schedule_with_warmup(o, warmup)),
    ],
)
def test_schedule_is_that_of_transformers(name, theirs, warmup_steps, total_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = theirs(optimizer, warmup_steps, total_steps)
    for step in range(total_steps + 1):
        factor = learning_rate_factor(
            step, schedule=name, warmup_steps=warmup_steps, total_steps=total_steps
        )
        assert factor == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_linear_schedule_by_hand():
    factors = [
        learning_rate_factor(step, schedule="linear", warmup_steps=2, total_steps=6)
        for step in range(8)
    ]
    assert factors == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


def test_all_optimizers_follow_the_same_schedule(make_model):
    optimizers = build_optimizers(make_model(), "muon", lr=0.5, eps=1e-8)
    schedulers = build_schedulers(optimizers, "linear", warmup_steps=2, total_steps=4)
    rates = []
    for _ in range(5):
        rates.append([group["lr"] for o in optimizers for group in o.param_groups])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert rates == [[lr] * 3 for lr in (0, 0.25, 0.5, 0.25, 0)]
