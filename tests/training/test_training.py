"""训练的零件：平均、早停、一次参数更新、验证、指标。"""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from chitchat.errors import UserError
from chitchat.tokens.token_table import TokenTable
from chitchat.training import meters as training
from chitchat.training import reporting
from chitchat.training.batching import LengthBucketSampler
from chitchat.training.dataset import Batch, DialogueDataset, collate
from chitchat.training.loss import LossModule
from chitchat.training.meters import Meter, TokenAverage, evaluate
from chitchat.training.optimizers import build_optimizers, build_schedulers
from chitchat.training.processes import Processes
from chitchat.training.reporting import MetricWriter
from chitchat.training.state import Progress
from chitchat.training.updater import Updater

CPU = torch.device("cpu")
DIALOGUES = [
    [101, 110, 111, 102],
    [101, 120, 121, 122, 123, 124, 102, 130, 102],
    [101, 102],
    [101, 140, 102, 141, 142, 102],
]


def make_batch(dialogues: list[list[int]]) -> Batch:
    rows = [np.array(token_ids) for token_ids in dialogues]
    num_targets = sum(len(row) - 1 for row in rows)
    return collate(rows, num_targets, pad_id=0)


def take_step(
    module: nn.Module, optimizers: list, *, batch: Batch | None = None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    defaults = {
        "schedulers": [],
        "max_grad_norm": 1e9,
        "processes": Processes(),
        "device": CPU,
    }
    updater = Updater(module, optimizers, **{**defaults, **options})
    result = updater.step(batch or make_batch(DIALOGUES))
    updater.check_finite()
    return result


def copy_params(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def sgd_updates(model: GPT2LMHeadModel, optimizers: list, **options) -> dict[str, torch.Tensor]:
    """学习率为 1 的 SGD 走一步，参数减少的量就是（裁剪后的）梯度。"""
    before = copy_params(model)
    take_step(LossModule(model), optimizers, **options)
    return {name: before[name] - param for name, param in copy_params(model).items()}


def plain_loss_sum(model: GPT2LMHeadModel, token_ids: list[int]) -> torch.Tensor:
    row = torch.tensor([token_ids])
    return F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="sum")


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors.values()))


def test_average_is_over_tokens_not_over_batches():
    average = TokenAverage()
    average.add(torch.tensor([900.0, 300, 30]))
    average.add(torch.tensor([1.0, 1, 1]))
    assert average.loss == 901 / 301
    assert average.accuracy == 31 / 301
    assert average.ppl == pytest.approx(2.718281828 ** (901 / 301))


def test_average_without_tokens_is_nan_and_huge_perplexity_is_infinite():
    assert math.isnan(TokenAverage().loss)
    assert math.isnan(TokenAverage().accuracy)
    assert TokenAverage(loss_sum=5000.0, num_tokens=5).ppl == math.inf


@pytest.mark.parametrize(
    ("patience", "losses", "best", "stops"),
    [
        (0, [3, 4, 5, 6], "ynnn", "nnnn"),
        (1, [3, 2, 2.5], "yyn", "nny"),
        (2, [3, 4, 2, 2, 5], "ynynn", "nnnny"),  # 变好一次就重新数；相等不算变好
        (2, [math.nan, math.nan], "nn", "ny"),
        (3, [5, 4, 3, 2], "yyyy", "nnnn"),
    ],
)
def test_early_stopping_by_table(patience, losses, best, stops):
    progress = Progress()
    seen = [(progress.finish_epoch(loss), progress.should_stop(patience)) for loss in losses]
    assert "".join("ny"[is_best] for is_best, _ in seen) == best
    assert "".join("ny"[should_stop] for _, should_stop in seen) == stops


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_changes_in_one_step(make_model, name):
    model = make_model(resid_pdrop=0.1)
    before = copy_params(model)
    optimizers = build_optimizers(model, name, lr=1e-3, eps=1e-9)
    schedulers = build_schedulers(optimizers, "linear", warmup_steps=0, total_steps=10)
    take_step(LossModule(model), optimizers, schedulers=schedulers)
    for param_name, param in model.named_parameters():
        assert not param.equal(before[param_name]), param_name
    assert [s.get_last_lr()[0] for s in schedulers] == pytest.approx([9e-4] * len(schedulers))


def test_a_window_of_four_has_the_gradient_of_four_accumulated_dialogues(make_model):
    model = make_model()
    num_tokens = sum(len(token_ids) - 1 for token_ids in DIALOGUES)
    for token_ids in DIALOGUES:
        (plain_loss_sum(model, token_ids) / num_tokens).backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters()}
    updates = sgd_updates(model, [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)])
    torch.testing.assert_close(updates, expected, rtol=1e-3, atol=1e-6)


def test_gradients_of_an_earlier_step_are_dropped(make_model):
    def run(*, is_dirty: bool) -> dict[str, torch.Tensor]:
        model = make_model()
        if is_dirty:
            plain_loss_sum(model, DIALOGUES[1]).backward()
        return sgd_updates(model, [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)])

    torch.testing.assert_close(run(is_dirty=True), run(is_dirty=False), rtol=0, atol=0)


@pytest.mark.parametrize("is_split", [False, True])
def test_all_gradients_together_are_clipped_to_the_maximum_norm(make_model, is_split):
    """两个优化器时也按全部参数的总范数裁剪一次，而不是各裁各的。"""
    full = sgd_updates(
        model := make_model(), [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)]
    )
    model = make_model()
    params = list(model.parameters())
    groups = [params[::2], params[1::2]] if is_split else [params]
    optimizers = [torch.optim.SGD(group, lr=1.0, fused=True) for group in groups]
    max_grad_norm = norm_of(full) / 10
    clipped = sgd_updates(model, optimizers, max_grad_norm=max_grad_norm)
    assert norm_of(clipped) == pytest.approx(max_grad_norm, rel=1e-3)
    scaled = {name: tensor / 10 for name, tensor in full.items()}
    torch.testing.assert_close(clipped, scaled, rtol=1e-2, atol=1e-6)


def test_step_returns_the_sums_and_the_norm_before_clipping(make_model):
    model = make_model()
    loss_sum = sum(plain_loss_sum(model, token_ids) for token_ids in DIALOGUES)
    (loss_sum / 17).backward()
    norm = norm_of({name: param.grad for name, param in model.named_parameters()})
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)]
    sums, grad_norm = take_step(LossModule(model), optimizers, max_grad_norm=norm / 3)
    assert sums.tolist()[:2] == pytest.approx([loss_sum.item(), 17])
    assert not sums.requires_grad
    assert grad_norm.item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_non_finite_loss_stops_before_the_step(make_model, name, value):
    model = make_model()
    optimizers = build_optimizers(model, name, lr=0.1, eps=1e-9)
    take_step(LossModule(model), optimizers)  # 动量不再是零
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = value
    before = copy_params(model)
    with pytest.raises(UserError, match="--lr"):
        take_step(LossModule(model), optimizers)
    torch.testing.assert_close(copy_params(model), before, rtol=0, atol=0, equal_nan=True)


def test_ranks_scale_their_gradients_so_that_their_mean_is_the_window(make_model):
    """DistributedDataParallel 对各进程取平均：两份的平均应等于整个窗口的梯度。"""
    model = make_model()
    whole = sgd_updates(model, [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)])
    parts = []
    for rank in range(2):
        model = make_model()
        batch = make_batch(DIALOGUES[rank::2])._replace(num_targets=17)
        optimizers = [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)]
        processes = Processes(rank=rank, world_size=2)
        parts.append(sgd_updates(model, optimizers, batch=batch, processes=processes))
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    torch.testing.assert_close(mean, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_is_the_mean_over_all_tokens_without_dropout(make_model, batch_size):
    dialogues = [[101, *range(110, 110 + n), 102] for n in (1, 9, 2, 30, 5, 3, 17)]
    model = make_model(resid_pdrop=0.5, embd_pdrop=0.5)
    model.eval()
    expected = sum(plain_loss_sum(model, token_ids).item() for token_ids in dialogues)
    num_tokens = sum(len(token_ids) - 1 for token_ids in dialogues)
    module = LossModule(model).train()
    dataset = DialogueDataset(
        TokenTable.from_dialogues(dialogues),
        np.arange(len(dialogues)),
        max_len=64,
        pad_id=0,
        sep_id=102,
    )
    sampler = LengthBucketSampler(dataset.lengths, window_size=batch_size, seed=0, shuffle=False)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler)
    updater = Updater(
        module, [], [], max_grad_norm=1.0, processes=Processes(), device=CPU, max_padding=0.05
    )
    average = evaluate(updater, loader)
    assert average.num_tokens == num_tokens
    assert average.loss == pytest.approx(expected / num_tokens, rel=1e-5)
    assert all(part.training for part in module.modules())
    assert all(param.grad is None for param in model.parameters())


def test_metrics_get_their_tensorboard_tags(tmp_path):
    writer = MetricWriter(tmp_path / "runs")
    writer.write(3, train_loss=2.5, train_tokens_per_second=1000.0)
    writer.write(7, val_ppl=12.0, train_loss=1.5)
    writer.close()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert scalars == {
        "train/loss": [(3, 2.5), (7, 1.5)],
        "train/tokens_per_second": [(3, 1000.0)],
        "val/ppl": [(7, 12.0)],
    }


def test_metrics_without_a_folder_write_nothing():
    writer = MetricWriter(None)
    writer.write(1, train_loss=2.5)
    writer.close()
    assert list(Path.cwd().iterdir()) == []  # conftest 让当前目录是空的 tmp_path


class FullDisk:
    """代替 SummaryWriter：第 ``allowed`` 次写之后磁盘满了；``where`` 是在哪里发现的。"""

    allowed, where = 1, "add"

    def __init__(self, *_: object, **__: object) -> None:
        self.num_writes = 0
        if self.where == "open":
            raise OSError(errno.ENOSPC, "No space left on device")

    def add_scalar(self, *_: object) -> None:
        self.num_writes += 1
        if self.where == "add" and self.num_writes > self.allowed:
            raise OSError(errno.ENOSPC, "No space left on device")

    add_text = add_scalar

    def close(self) -> None:
        if self.where == "close":
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def warnings_of(monkeypatch, caplog):
    """reporting 写下的警告。"""
    logger = logging.getLogger("chitchat.training.reporting")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("where", ["open", "add", "close"])
def test_full_disk_stops_the_metrics_with_one_warning(where, tmp_path, monkeypatch, warnings_of):
    monkeypatch.setattr(FullDisk, "where", where)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", FullDisk)
    writer = MetricWriter(tmp_path / "runs")
    for step in range(5):
        writer.write(step, train_loss=1.0, train_lr=1.0)
        writer.write_text(step, "samples", "x")
    writer.close()
    (warning,) = warnings_of()
    assert "tensorboard stopped" in warning
    assert "No space left on device" in warning


def test_full_disk_found_in_the_background_is_one_warning_too(
    tmp_path, monkeypatch, warnings_of, capsys
):
    """真的 SummaryWriter：它在自己的线程里写文件。"""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hook = threading.excepthook
    writer = MetricWriter(tmp_path / "runs")
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", refuse)
    for step in range(30):
        writer.write(step, train_loss=1.0)
        time.sleep(0.01)
    writer.close()
    assert len(warnings_of()) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is hook


def test_meter_reads_recent_and_whole_epoch_with_speed(monkeypatch):
    clock = iter([100.0, 102.0, 107.0, 110.0])
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    average = TokenAverage()
    meter = Meter(CPU, Processes(), average)
    meter.add(torch.tensor([8.0, 4, 1]), num_cells=10, num_padding=2)
    meter.add(torch.tensor([4.0, 2, 1]), num_cells=30, num_padding=3)
    recent, speed, padding = meter.read()
    assert (recent.loss, recent.accuracy, speed, padding) == (2.0, 2 / 6, 6 / 2, 5 / 40)
    meter.add(torch.tensor([1.0, 10, 5]), num_cells=8, num_padding=0)
    recent, speed, padding = meter.read()
    assert (recent.loss, recent.accuracy, speed, padding) == (0.1, 0.5, 10 / 5, 0)
    meter.add(torch.tensor([7.0, 4, 0]))
    speed = meter.read_epoch_speed()
    assert (average.loss, average.accuracy, speed) == (20.0 / 20, 7 / 20, 20 / 10)


def test_progress_lines_average_over_ten_seconds_and_estimate_the_rest(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now[0])
    logger = logging.getLogger("chitchat.training.reporting")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "propagate", False)
    lines = reporting.ProgressLines(total_steps=700, first_step=100)
    for step in range(101, 131):  # 每步 4 秒，100 个 token
        now[0] += 4
        recent = TokenAverage(loss_sum=100.0 * step, num_tokens=100)
        lines.report(step, 1, recent, lr=1e-3)
        if step == 104:
            now[0] += 1000  # 验证占去的时间不算进速度
            lines.restart()
    texts = [record.getMessage() for record in caplog.records]
    # 第 3、7、10、… 步满十秒；还剩的分钟数里算进了验证
    minutes = [round((4 * n + 1000 * (n > 4)) / n * (600 - n) / 60) for n in (3, 7, 10)]
    assert texts[:3] == [
        f"epoch=1 step=103 loss=102.0000 lr=1.0e-03 tokens_per_second=25 minutes_left={minutes[0]}",
        f"epoch=1 step=107 loss=106.0000 lr=1.0e-03 tokens_per_second=25 minutes_left={minutes[1]}",
        f"epoch=1 step=110 loss=109.0000 lr=1.0e-03 tokens_per_second=25 minutes_left={minutes[2]}",
    ]
    assert len(texts) == 1 + 8
