"""损失：与逐句、不补齐、不分块的交叉熵一致，梯度也一致。

形状记号: B 批内对话数   T 批内最长对话的 token 数   V 词表大小
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from chitchat.training import loss as loss_module
from chitchat.training.dataset import IGNORE_INDEX, Batch, collate
from chitchat.training.loss import LinearCrossEntropy, LossModule

DIALOGUES = [
    [101, 110, 111, 102],
    [101, 120, 121, 122, 123, 124, 102, 130, 102],
    [101],
    [101, 102],
    [101, 140, 102, 141, 142, 102],
]
NUM_TARGETS = 3 + 8 + 0 + 1 + 5


@pytest.fixture(params=[1, 3, 17, 10**6], ids=lambda rows: f"{rows}_rows_a_chunk")
def model(request, make_model, monkeypatch) -> GPT2LMHeadModel:
    """同一个模型，输出层分别按 1 行、3 行、恰好全部和远超全部的行数分块。"""
    model = make_model()
    elements = request.param * model.config.vocab_size
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", elements)
    return model


def make_batch(dialogues: list[list[int]]) -> Batch:
    rows = [np.array(token_ids) for token_ids in dialogues]
    return collate(rows, 0, pad_id=0)


def sums_of(model: GPT2LMHeadModel, batch: Batch) -> torch.Tensor:
    sums = LossModule(model)(batch.input_ids, batch.labels)
    assert sums.shape == (1, 3)
    assert sums.dtype == torch.float32
    return sums[0]


def plain_sums(model: GPT2LMHeadModel, dialogues: list[list[int]]) -> list[torch.Tensor]:
    """逐句计算的 loss 之和、token 数、猜对数：不补齐，用模型自己的 logits。"""
    loss_sum, num_tokens, num_correct = torch.zeros(()), 0, 0
    for token_ids in dialogues:
        row = torch.tensor([token_ids])
        logits = model(input_ids=row).logits[0, :-1]  # (T-1, V)
        loss_sum = loss_sum + F.cross_entropy(logits, row[0, 1:], reduction="sum")
        num_tokens += len(token_ids) - 1
        num_correct += int((logits.argmax(dim=-1) == row[0, 1:]).sum())
    return [loss_sum, torch.tensor(float(num_tokens)), torch.tensor(float(num_correct))]


def make_confident(model: GPT2LMHeadModel) -> None:
    """放大词向量，让分数拉开、猜对的不只是零个；共享的输出层也跟着变。"""
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)


def test_sums_equal_unpadded_cross_entropy_sentence_by_sentence(model):
    make_confident(model)
    expected = plain_sums(model, DIALOGUES)
    assert expected[1] == NUM_TARGETS
    torch.testing.assert_close(sums_of(model, make_batch(DIALOGUES)), torch.stack(expected))


def test_padding_does_not_change_the_loss(model):
    batch = make_batch(DIALOGUES)
    has_targets = [token_ids for token_ids in DIALOGUES if len(token_ids) > 1]
    alone = sum(sums_of(model, make_batch([token_ids])) for token_ids in has_targets)
    wider = Batch(
        F.pad(batch.input_ids, (0, 30), value=145),  # 补什么都一样，不只是 [PAD]
        F.pad(batch.labels, (0, 30), value=IGNORE_INDEX),
        batch.lengths,
        0,
    )
    torch.testing.assert_close(sums_of(model, batch), alone)
    torch.testing.assert_close(sums_of(model, wider), alone)


def gradients(model: GPT2LMHeadModel, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_equal_autograd_of_the_plain_loss(make_model, monkeypatch, is_tied, scale):
    model = make_model(tie_word_embeddings=is_tied)
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 3 * model.config.vocab_size)
    assert (model.lm_head.weight is model.transformer.wte.weight) == is_tied
    expected = gradients(model, scale * plain_sums(model, DIALOGUES)[0])
    actual = gradients(model, scale * sums_of(model, make_batch(DIALOGUES))[0])
    assert all(grad.any() for grad in expected.values())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_number_correct_counts_the_right_guesses(model):
    """先问模型自己猜什么，再把一半的目标换成它的猜测。"""
    make_confident(model)
    input_ids = torch.tensor([[101, 110, 111, 112, 113, 114, 102]])
    guesses = model(input_ids=input_ids).logits[0].argmax(dim=-1)  # 位置 t 猜第 t+1 个
    labels = input_ids.clone()
    labels[0, 1:] = (guesses[:-1] + 1) % model.config.vocab_size  # 全猜错
    labels[0, 1:4] = guesses[:3]
    assert sums_of(model, Batch(input_ids, labels, [7], 0))[1:].tolist() == [6, 3]


def test_ignored_positions_count_nowhere(model):
    batch = make_batch(DIALOGUES)
    batch.labels[1, 3:6] = IGNORE_INDEX
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
    )
    loss_sum, num_tokens, _ = sums_of(model, batch)
    torch.testing.assert_close(loss_sum, expected)
    assert num_tokens == NUM_TARGETS - 3


@pytest.mark.parametrize("dialogues", [[], [[101]]])
def test_batch_without_targets_gives_zeros_and_zero_gradients(model, dialogues):
    """多进程的最后一个窗口不够分时，有的进程只拿到占位行。"""
    sums = sums_of(model, make_batch(dialogues))
    assert sums.tolist() == [0, 0, 0]
    assert not any(grad.any() for grad in gradients(model, sums[0]).values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_for_gradients_when_they_are_off(model, context):
    expected = sums_of(model, make_batch(DIALOGUES)).detach()
    with context():
        sums = sums_of(model, make_batch(DIALOGUES))
    assert not sums.requires_grad
    torch.testing.assert_close(sums, expected)


def test_gradient_buffers_are_not_made_when_gradients_are_off(make_model, monkeypatch):
    """没有梯度时，不应分配与输出层权重一样大的缓冲。"""
    model = make_model()
    shapes = []
    zeros_like = torch.zeros_like

    def record(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return zeros_like(tensor, **options)

    monkeypatch.setattr(torch, "zeros_like", record)
    weight_shape = tuple(model.lm_head.weight.shape)
    with torch.no_grad():
        sums_of(model, make_batch(DIALOGUES))
    assert weight_shape not in shapes
    sums_of(model, make_batch(DIALOGUES))
    assert weight_shape in shapes


def test_huge_logits_give_a_finite_loss(model):
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e4)
    expected = plain_sums(model, DIALOGUES)[0]
    assert expected.isfinite()
    torch.testing.assert_close(sums_of(model, make_batch(DIALOGUES))[0], expected)


def test_input_tensors_are_left_unchanged(model):
    batch, fresh = make_batch(DIALOGUES), make_batch(DIALOGUES)
    sums_of(model, batch)[0].backward()
    assert batch.input_ids.equal(fresh.input_ids)
    assert batch.labels.equal(fresh.labels)


@pytest.mark.parametrize(("precision", "dtype"), loss_module.PRECISIONS.items())
def test_layers_and_output_use_the_precision_in_every_thread(
    precision, dtype, make_model, monkeypatch
):
    """DataParallel 的每块卡在自己的线程里前向，外面的 autocast 管不到那里。"""
    module = LossModule(make_model(), precision=precision)
    seen = []
    matmul = LinearCrossEntropy.apply

    def watch(hidden: torch.Tensor, *args: object) -> tuple:
        seen.append(hidden.dtype)
        return matmul(hidden, *args)

    def watch_layer(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.append(output.dtype)

    monkeypatch.setattr(LinearCrossEntropy, "apply", watch)
    module.model.transformer.h[1].mlp.c_fc.register_forward_hook(watch_layer)
    batch = make_batch(DIALOGUES)
    sums = [module(batch.input_ids, batch.labels)]
    thread = threading.Thread(target=lambda: sums.append(module(batch.input_ids, batch.labels)))
    thread.start()
    thread.join()
    assert seen == [dtype] * 4
    torch.testing.assert_close(sums[0], sums[1])


def test_fp16_sum_over_many_tokens_does_not_overflow():
    """六千个 token 里多数是同一个目标，有一个通道很大：fp16 里直接相加会超过 65504。"""
    hidden = torch.randn(6000, 16)
    hidden[:, 3] = 20.0
    weight = torch.randn(40, 16) * 0.02
    targets = torch.where(torch.rand(6000) < 0.6, 7, torch.randint(0, 40, (6000,)))
    grads = []
    for hidden_dtype, weight_dtype in (
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        parts = [hidden.to(hidden_dtype, copy=True), weight.to(weight_dtype, copy=True)]
        for part in parts:
            part.requires_grad_()
        LinearCrossEntropy.apply(*parts, targets, True)[0].backward()
        grads.append([part.grad.double() for part in parts])
    for found, expected in zip(*grads, strict=True):
        assert found.isfinite().all()
        assert (found - expected).norm() < 0.01 * expected.norm()
