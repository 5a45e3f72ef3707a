"""一次参数更新：放不下就拆开、非有限数不更新、精度、状态的存取。"""

from __future__ import annotations

import io
import logging
import timeit
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from chitchat.errors import UserError
from chitchat.training.dataset import Batch, collate
from chitchat.training.loss import LossModule
from chitchat.training.optimizers import build_optimizers, build_schedulers
from chitchat.training.plan import choose_precision
from chitchat.training.processes import Processes
from chitchat.training.updater import Updater

CPU = torch.device("cpu")
DIALOGUES = [
    [101, 110, 111, 102],
    [101, 120, 121, 122, 123, 124, 102, 130, 102],
    [101, 102],
    [101, 140, 102, 141, 142, 102],
    [101, 150, 151, 102],
]
NUM_TARGETS = 20


def make_batch(dialogues: list[list[int]] = DIALOGUES) -> Batch:
    rows = [np.array(token_ids) for token_ids in dialogues]
    num_targets = sum(len(row) - 1 for row in rows)
    return collate(rows, num_targets, pad_id=0)


class Scarce(LossModule):
    """对话数超过 limit 的前向放不下；failing_calls 里的那几次前向也放不下。"""

    def __init__(
        self,
        model: nn.Module,
        limit: int = 99,
        failing_calls: tuple = (),
        precision: str = "fp32",
    ) -> None:
        super().__init__(model, precision=precision)
        self.limit = limit
        self.failing_calls = failing_calls
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore")
        self.sizes: list[int] = []
        self.factor = 1.0

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.limit or len(self.sizes) in self.failing_calls:
            raise self.error
        return super().forward(input_ids, labels) * self.factor


def make_updater(
    module: nn.Module, name: str = "sgd", *, max_grad_norm: float = 1e9, lr: float = 0.01
) -> Updater:
    """Sgd 的学习率是 1：参数减少的量就是梯度。"""
    if name == "sgd":
        optimizers = [torch.optim.SGD(module.parameters(), lr=1.0, fused=True)]
    else:
        optimizers = build_optimizers(module, name, lr=lr, eps=1e-9)
    return Updater(
        module,
        optimizers,
        build_schedulers(optimizers, "linear", warmup_steps=0, total_steps=100),
        max_grad_norm=max_grad_norm,
        processes=Processes(),
        device=CPU,
    )


def copy_params(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def plain_update(model: GPT2LMHeadModel) -> tuple[float, dict[str, Tensor]]:
    """逐段的交叉熵之和，以及梯度走一步之后的参数；不改动 model。"""
    loss_sum = torch.zeros(())
    for token_ids in DIALOGUES:
        row = torch.tensor(token_ids)
        logits = model(input_ids=row[None]).logits[0]
        loss_sum = loss_sum + F.cross_entropy(logits[:-1], row[1:], reduction="sum")
    grads = torch.autograd.grad(loss_sum / NUM_TARGETS, list(model.parameters()))
    named = zip(model.named_parameters(), grads, strict=True)
    return loss_sum.item(), {name: param.detach() - grad for (name, param), grad in named}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list]:
    """拆分时写下的日志，各行的文字。"""
    logger = logging.getLogger("chitchat.training.splitting")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    return lambda: [r.getMessage() for r in caplog.records if r.name == logger.name]


@pytest.mark.parametrize(
    ("limit", "failing_calls", "sizes", "max_rows"),
    [
        (99, (), [5], None),
        (4, (), [5, 3, 2], 3),
        (2, (), [5, 3, 2, 2, 1], 2),
        (1, (), [5, 3, 2, 1, 1, 1, 1, 1], 1),
        (3, (3,), [5, 3, 2, 2, 2, 1], 2),  # 前一份已经反向，后一份才放不下
    ],
)
def test_window_that_does_not_fit_is_split_without_changing_the_gradient(
    make_model, log, limit, failing_calls, sizes, max_rows
):
    model = make_model()
    loss_sum, expected = plain_update(model)
    module = Scarce(model, limit, failing_calls)
    updater = make_updater(module)
    sums, _ = updater.step(make_batch())
    assert sums.tolist()[:2] == pytest.approx([loss_sum, NUM_TARGETS])
    torch.testing.assert_close(copy_params(model), expected, rtol=1e-3, atol=1e-6)
    assert module.sizes == sizes
    assert updater.splitter.max_rows == max_rows
    halvings = [rows for rows in (3, 2, 1) if rows >= (max_rows or 9)]
    assert log() == [f"out of memory: max dialogues per forward={rows}" for rows in halvings]


def test_padded_window_is_split_without_changing_the_gradient(make_model):
    dialogues = [[101, *[110 + i] * (i // 4), 102] for i in range(40)]
    results = []
    for max_padding in (1.0, 0.05):
        model = make_model()
        module = Scarce(model)
        updater = make_updater(module)
        updater.splitter.max_padding = max_padding
        sums, _ = updater.step(make_batch(dialogues))
        results.append((copy_params(model), sums))
        assert module.sizes == ([40] if max_padding == 1.0 else [20, 20])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)


def test_split_is_remembered_and_smaller_windows_stay_whole(make_model, log):
    module = Scarce(make_model(), limit=3)
    updater = make_updater(module)
    for dialogues in (DIALOGUES, DIALOGUES, DIALOGUES[:3]):
        updater.step(make_batch(dialogues))
    assert module.sizes == [5, 3, 2, 3, 2, 3]
    assert len(log()) == 1


def test_memory_that_the_cpu_refuses_counts_as_out_of_memory(make_model):
    module = Scarce(make_model(), limit=3)
    module.error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    make_updater(module).step(make_batch())
    assert module.sizes == [5, 3, 2]


def test_other_errors_are_not_swallowed(make_model):
    module = Scarce(make_model(), limit=3)
    module.error = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_updater(module).step(make_batch())
    assert module.sizes == [5]


def test_single_dialogue_that_does_not_fit_is_a_user_error(make_model):
    model = make_model()
    before = copy_params(model)
    with pytest.raises(UserError, match=r"9 个 token.*Tried 2 GiB.*--max_len") as refused:
        make_updater(Scarce(model, limit=0)).step(make_batch())
    assert "\n" not in str(refused.value)
    torch.testing.assert_close(copy_params(model), before, rtol=0, atol=0)


def plain_state(updater: Updater) -> list:
    """各优化器的状态，深拷贝成普通的列表。"""
    return [
        {key: torch.as_tensor(value).clone() for key, value in state.items()}
        for optimizer in updater.optimizers
        for state in optimizer.state_dict()["state"].values()
    ]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_non_finite_step_changes_nothing_and_is_reported_later(make_model, name, factor):
    model = make_model()
    module = Scarce(model)
    updater = make_updater(module, name, max_grad_norm=2.0)
    updater.step(make_batch())
    updater.check_finite()
    params, state = copy_params(model), plain_state(updater)
    module.factor = factor
    updater.step(make_batch())
    torch.testing.assert_close(copy_params(model), params, rtol=0, atol=0)
    torch.testing.assert_close(plain_state(updater), state, rtol=0, atol=0)
    module.factor = 1.0
    updater.step(make_batch())  # 隔几步才问一次，也要记得
    with pytest.raises(UserError, match=r"NaN 或 Inf.*--lr"):
        updater.check_finite()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_fp32_and_keeps_fp32_weights(make_model, precision):
    model = make_model(n_embd=64)
    loss_sum, expected = plain_update(model)
    before = copy_params(model)
    updater = make_updater(LossModule(model, precision=precision))
    sums, _ = updater.step(make_batch())
    assert sums[0].item() == pytest.approx(loss_sum, rel=5e-3)
    assert sums[0].item() != pytest.approx(loss_sum, rel=1e-7)  # 真的用了半精度
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32
        update, wanted = before[name] - param.detach(), before[name] - expected[name]
        assert (update - wanted).norm() < 0.05 * wanted.norm() + 1e-4, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fp16_overflow_lowers_the_scale_and_skips_the_step(make_model, name):
    model = make_model()
    module = Scarce(model, precision="fp16")
    updater = make_updater(module, name, max_grad_norm=2.0)
    before, scale = copy_params(model), updater.scaler.get_scale()
    module.factor = float("inf")
    updater.step(make_batch())
    torch.testing.assert_close(copy_params(model), before, rtol=0, atol=0)
    assert updater.scaler.get_scale() == scale / 2
    updater.check_finite()  # 缩放还有余地，不算出错
    for _ in range(40):
        updater.step(make_batch())
    with pytest.raises(UserError, match="NaN 或 Inf"):
        updater.check_finite()


@pytest.mark.parametrize("value", [float("inf"), 1e25])  # 后者自己有限，范数却溢出
@pytest.mark.parametrize(
    "param_name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"]
)
def test_one_bad_fp16_gradient_skips_every_optimizer(make_model, param_name, value):
    model = make_model()
    updater = make_updater(LossModule(model, precision="fp16"), "muon", max_grad_norm=2.0)
    updater.step(make_batch())
    params, state = copy_params(model), plain_state(updater)
    scale = updater.scaler.get_scale()

    def spoil(param: nn.Parameter) -> None:
        param.grad.fill_(value * scale)

    hook = model.get_parameter(param_name).register_post_accumulate_grad_hook(spoil)
    _, grad_norm = updater.step(make_batch())
    hook.remove()
    assert not grad_norm.isfinite()
    torch.testing.assert_close(copy_params(model), params, rtol=0, atol=0)
    torch.testing.assert_close(plain_state(updater), state, rtol=0, atol=0)
    assert updater.scaler.get_scale() == scale / 2
    updater.step(make_batch())
    updater.check_finite()
    assert all(not param.equal(params[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "device", "capabilities", "expected"),
    [
        ("auto", "cuda", {"bf16": True}, "bf16"),
        ("auto", "cuda", {"bf16": False}, "fp16"),
        ("auto", "cpu", {"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ("auto", "cpu", {"avx512_f": True, "amx_bf16": True}, "bf16"),
        ("auto", "cpu", {"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, "bf16"),
        ("auto", "cpu", {"avx512_bf16": True, "avx512_fp16": True}, "fp32"),  # amx 被藏起来了
        ("auto", "cpu", {"neon": True, "bf16": True}, "bf16"),  # arm
        ("auto", "cpu", {"neon": True, "bf16": False}, "fp32"),
        ("auto", "cpu", {"avx512_f": True, "avx512_bf16": False}, "fp32"),  # 只能模拟，慢
        ("fp32", "cuda", {"bf16": True}, "fp32"),
        ("fp16", "cpu", {}, "fp16"),
        ("bf16", "cpu", {}, "bf16"),
    ],
)
def test_precision_by_table(name, device, capabilities, expected, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: capabilities["bf16"]
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert choose_precision(name, SimpleNamespace(type=device)) == expected


def test_cpu_without_fast_matrix_library_takes_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_precision("auto", CPU) == "fp32"


def test_auto_precision_is_the_faster_one_on_this_machine():
    def seconds(dtype: torch.dtype) -> float:
        linear = torch.nn.Linear(384, 1536, dtype=dtype)
        x = torch.randn(512, 384, dtype=dtype)
        return min(timeit.repeat(lambda: linear(x), number=3, repeat=8))

    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    if 0.6 < ratio < 1.6:
        pytest.skip("两种精度差不多快，选哪个都行")
    assert choose_precision("auto", CPU) == ("bf16" if ratio < 1 else "fp32")


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_state_survives_a_file_and_training_goes_on_bit_for_bit(make_model, name, precision):
    def step(updater: Updater, count: int) -> None:
        for _ in range(count):
            updater.step(make_batch())

    whole = make_updater(Scarce(make_model(), limit=3, precision=precision), name)
    step(whole, 3)
    file = io.BytesIO()
    torch.save([whole.state_dict(), whole.loss_module.model.state_dict()], file)
    step(whole, 3)

    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed = make_updater(Scarce(make_model(), limit=3, precision=precision), name)
    resumed.loss_module.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    step(resumed, 3)
    mine, theirs = (copy_params(updater.loss_module.model) for updater in (resumed, whole))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert resumed.lr == whole.lr == pytest.approx(0.01 * 95 / 100)
    assert resumed.loss_module.sizes == [3, 2] * 3  # max_rows 也记得，不再试一次


@pytest.mark.parametrize(("wanted", "expected"), [(None, 0.01), (0.5, 0.5)])
def test_resumed_updater_takes_the_new_peak_and_its_own_eps(make_model, wanted, expected):
    first = make_updater(Scarce(make_model()), "adamw")
    for _ in range(3):
        first.step(make_batch())
    resumed = make_updater(Scarce(make_model()), "adamw", lr=0.2)
    resumed.optimizers[0].param_groups[0]["eps"] = 1e-3
    resumed.load_state_dict(first.state_dict(), peak_lr=wanted)
    assert resumed.peak_lr == expected
    assert resumed.lr == pytest.approx(expected * 98 / 100)
    resumed.step(make_batch())
    assert resumed.lr == pytest.approx(expected * 97 / 100)
    assert resumed.optimizers[0].param_groups[0]["eps"] == 1e-3


def test_forward_splits_like_a_step_and_changes_nothing(make_model):
    model = make_model()
    before = copy_params(model)
    loss_sum, _ = plain_update(model)
    module = Scarce(model, limit=2)
    updater = make_updater(module)
    sums = updater.forward(make_batch())
    assert sums.tolist()[:2] == pytest.approx([loss_sum, NUM_TARGETS])
    assert module.sizes == [5, 3, 2, 2, 1]
    assert updater.splitter.max_rows == 2
    assert all(param.grad is None for param in model.parameters())
    torch.testing.assert_close(copy_params(model), before, rtol=0, atol=0)
