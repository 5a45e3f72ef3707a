"""train.py：从头到尾各跑几步，看写下的文件、日志、续训和出错时的一句话。"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import math
import multiprocessing
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG, TINY_VOCAB
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.model_selection import train_test_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import train
from chitchat.architecture import build_model
from chitchat.cli import configure_logging, run_cli
from chitchat.errors import UserError
from chitchat.tokens.tokenizer import vocab_fingerprint
from chitchat.training import optimizer_choice, plan, reporting, run_folder
from chitchat.training.run_folder import occupy
from chitchat.training.state import DAMAGED_NAME, PREVIOUS_NAME, STATE_NAME
from chitchat.training.updater import Updater

NUM_DIALOGUES = 22  # 留出 2 段验证，20 段训练
EPOCH_LINE = re.compile(
    r"epoch=(\d+) train_loss=(\d+\.\d{4}) train_acc=(0\.\d{4}) val_loss=(\d+\.\d{4}) "
    r"val_ppl=(\d+\.\d{2}) lr=(\d\.\de[+-]\d\d) tokens_per_second=(\d+)$",
    re.MULTILINE,
)


DRAW_CURVE = train.save_loss_curve


@pytest.fixture(autouse=True)
def _quick_and_tidy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """画图占去一次短训练的一半时间，只在一个测试里画。"""
    monkeypatch.setattr(train, "save_loss_curve", lambda *_: False)
    yield
    configure_logging(None, console=False)
    logging.getLogger("chitchat").propagate = True


def make_dialogues(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    dialogues = []
    for i in range(NUM_DIALOGUES):
        words = torch.randint(104, len(TINY_VOCAB), (2 + i % 7,), generator=generator)
        dialogues.append([101, *words.tolist(), 102, int(words[0]), 102])
    return dialogues


def write_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def write_config(path: Path, **fields: object) -> Path:
    path.write_text(json.dumps({**TINY_CONFIG, **fields}), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path, vocab_path: Path, config_path: Path) -> Callable[..., Path]:
    """训练两轮，每轮五次更新，返回检查点所在的文件夹；关键字参数改换或追加选项。"""
    corpus_path = write_pickle(tmp_path / "train.pkl", make_dialogues())

    def run_main(name: str = "model", *, code: int = 0, **options: object) -> Path:
        folder = tmp_path / name
        values = {
            "train_path": corpus_path,
            "vocab_path": vocab_path,
            "model_config": config_path,
            "save_model_path": folder,
            "log_path": folder / "train.log",
            "max_len": 64,
            "epochs": 2,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "precision": "fp32",
            "optimizer": "adamw",
            **options,
        }
        argv = ["--no_cuda"]
        for key, value in values.items():
            argv += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        assert train.main(argv) == code
        return folder

    return run_main


def load_weights(folder: Path, name: str = "epoch2") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def read_log(folder: Path) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


def epochs_logged(folder: Path) -> list[int]:
    return [int(match[1]) for match in EPOCH_LINE.finditer(read_log(folder))]


def initial_model(config_path: Path, tokenizer, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return build_model(config_path, tokenizer)


def loss_sum_and_count(model: GPT2LMHeadModel, dialogues: list) -> tuple[torch.Tensor, int]:
    """不补齐，逐段相加。"""
    total = torch.zeros(())
    for token_ids in dialogues:
        row = torch.tensor(token_ids)
        logits = model(input_ids=row[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], row[1:], reduction="sum")
    return total, sum(len(token_ids) - 1 for token_ids in dialogues)


def test_every_parameter_moves_a_little_from_the_seeded_start(run, config_path, tokenizer):
    weights = load_weights(run(lr=1e-3))
    for name, before in initial_model(config_path, tokenizer).named_parameters():
        change = (weights[name] - before).abs().max()
        assert 0 < change < 0.03, name  # 10 次更新，每次至多约 lr


@pytest.mark.parametrize("name", ["epoch1", "epoch2", "min_ppl_model"])
def test_checkpoints_load_in_transformers(run, name):
    folder = run() / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == len(TINY_VOCAB)
    assert_same(dict(model.state_dict()), {**load_weights(folder, "."), **tied(model)})
    assert tokenizer("你好")["input_ids"] == [101, *map(TINY_VOCAB.index, "你好"), 102]


def tied(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    return {"lm_head.weight": model.transformer.wte.weight.detach()}


def test_epoch_line_states_the_validation_loss_of_its_checkpoint(run):
    folder = run(lr=1e-3, lr_schedule="linear")
    rows = [match.groups() for match in EPOCH_LINE.finditer(read_log(folder))]
    assert [row[0] for row in rows] == ["1", "2"]
    assert [row[5] for row in rows] == ["6.0e-04", "1.0e-04"]  # 一轮最后一次更新所用的
    _, validation = train_test_split(make_dialogues(), test_size=2, random_state=0)
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(folder / f"epoch{row[0]}").eval()
        with torch.no_grad():
            total, count = loss_sum_and_count(model, validation)
        loss = float(total) / count
        assert float(row[3]) == pytest.approx(loss, abs=2e-4)
        assert float(row[4]) == pytest.approx(math.exp(loss), rel=1e-3)


def test_each_checkpoint_says_what_it_is(run):
    folder = run(eval_steps=2, lr=0.01)
    for name, num_epochs in (("epoch1", 1), ("epoch2", 2)):
        card = (folder / name / "README.md").read_text(encoding="utf-8")
        rows = re.findall(r"\| (\d+) \| (\S+) \| (\S+) \| \S+ \|", card)
        logged = [(m[1], m[2], m[4]) for m in EPOCH_LINE.finditer(read_log(folder))]
        assert rows == logged[:num_epochs]
        assert "| peak_learning_rate | 0.01 |" in card
        assert "| train_dialogues | 20 |" in card
    config = json.loads((folder / "epoch1" / "config.json").read_text(encoding="utf-8"))
    assert config["n_ctx"] == config["n_positions"]


def test_tensorboard_gets_the_values_of_the_epoch_line(run):
    folder = run(log_step=1)
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    train_tags = {"loss", "accuracy", "lr", "grad_norm", "tokens_per_second", "padding"}
    val_tags = {"loss", "ppl", "accuracy"}
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert set(scalars) == {f"train/{t}" for t in train_tags} | {f"val/{t}" for t in val_tags}
    assert [event.step for event in scalars["train/loss"]] == list(range(1, 11))
    assert [event.step for event in scalars["val/loss"]] == [5, 10]
    logged = [float(match[4]) for match in EPOCH_LINE.finditer(read_log(folder))]
    assert [event.value for event in scalars["val/loss"]] == pytest.approx(logged, abs=1e-4)
    assert events.Tags()["tensors"] == ["samples/text_summary"]


def test_padding_is_the_share_of_the_forwards_of_each_step(run):
    folder = run(epochs=1, log_step=1)
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    training, _ = train_test_split(make_dialogues(), test_size=2, random_state=0)
    lengths = sorted(map(len, training))
    windows = [lengths[i : i + 4] for i in range(0, 20, 4)]
    expected = sorted(1 - sum(window) / (4 * max(window)) for window in windows)
    found = sorted(event.value for event in events.Scalars("train/padding"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_steps_before_a_saved_state_are_not_lost_from_the_curves(run):
    """存状态时取回的和，仍算在下一次记录的平均里。"""
    curves = []
    for name, save_steps in (("plain", 0), ("saving", 3)):
        folder = run(name, epochs=1, log_step=2, save_steps=save_steps)
        events = EventAccumulator(str(folder / "runs"))
        events.Reload()
        curves.append([event.value for event in events.Scalars("train/loss")])
    assert len(curves[0]) == 2
    assert curves[0] == curves[1]


def test_logged_lr_is_that_of_the_update_itself(run):
    folder = run(epochs=1, log_step=1, lr=0.01, lr_schedule="linear")
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/lr")]
    assert found == pytest.approx([0.01 * (1 - i / 5) for i in range(5)])


@pytest.mark.parametrize("log_step", [1, 3, 1000])
def test_logging_changes_nothing_but_the_log(log_step, run, with_dropout):
    assert_same_outcome(run("a", log_step=log_step, **with_dropout), run("b", **with_dropout))


def test_resumed_run_keeps_the_points_of_the_last_epoch(run):
    folder = run(epochs=1, log_step=5)
    time.sleep(1.1)  # 同一秒里开的两个事件文件，先后要看文件名里的序号
    run(epochs=2, log_step=5, resume=True)
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    for tag in ("train/loss", "val/loss"):
        assert [event.step for event in events.Scalars(tag)] == [5, 10], tag


PROGRESS_LINE = re.compile(
    r"INFO epoch=(\d+) step=(\d+) loss=(\d\.\d{4}) lr=\d\.\de[+-]\d\d "
    r"tokens_per_second=(\d+) minutes_left=(\d+)$",
    re.MULTILINE,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_logged_and_shown_where_no_bar_is(is_terminal, run, monkeypatch):
    stderr = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(reporting, "PROGRESS_SECONDS", 0)
    folder = run(log_step=2)
    steps = [("1", "2"), ("1", "4"), ("2", "6"), ("2", "8"), ("2", "10")]
    assert [match.groups()[:2] for match in PROGRESS_LINE.finditer(read_log(folder))] == steps
    shown = [match.groups()[:2] for match in PROGRESS_LINE.finditer(stderr.getvalue())]
    assert shown == ([] if is_terminal else steps)
    assert len(EPOCH_LINE.findall(stderr.getvalue())) == 2
    assert "estimated" not in read_log(folder)


def test_progress_comes_at_most_every_ten_seconds(run):
    """两轮不到一秒。"""
    assert PROGRESS_LINE.findall(read_log(run(log_step=1))) == []


def test_curve_is_drawn_next_to_the_checkpoints(run, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train, "save_loss_curve", DRAW_CURVE)
    assert (run(epochs=1) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_early_stop_ends_after_the_first_epoch_that_is_not_better(run):
    folder = run(epochs=30, patience=1, lr=0.3, lr_schedule="constant")
    losses = [float(match[4]) for match in EPOCH_LINE.finditer(read_log(folder))]
    assert 2 <= len(losses) < 30
    assert all(after < before for before, after in itertools.pairwise(losses[:-1]))
    assert losses[-1] >= losses[-2]
    assert "early stop" in read_log(folder)
    assert_same(
        load_weights(folder, "min_ppl_model"), load_weights(folder, f"epoch{len(losses) - 1}")
    )


def test_same_seed_gives_the_same_weights_and_another_seed_others(run, tmp_path):
    config = write_config(tmp_path / "dropout.json", resid_pdrop=0.2)
    first, again, other = (
        load_weights(run(name, seed=seed, model_config=config))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same(first, again)
    assert not any(first[name].equal(other[name]) for name in first if name.endswith("attn.weight"))


def test_pretrained_model_of_another_vocabulary_of_equal_size_is_refused(run, tmp_path):
    start = run("a", epochs=1) / "epoch1"
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*TINY_VOCAB[:104], *reversed(TINY_VOCAB[104:])]), encoding="utf-8")
    with pytest.raises(UserError, match="词表不同") as error:
        run("b", epochs=1, pretrained_model=start, vocab_path=other)
    for name in (str(start), str(other), "第 105 项", f"--vocab_path {start}", "preprocess.py"):
        assert name in str(error.value)


def test_pretrained_model_is_where_training_starts(run):
    start = run("a", epochs=1)
    folder = run("b", epochs=1, pretrained_model=start / "epoch1", model_config="none", lr=1e-12)
    torch.testing.assert_close(
        load_weights(folder, "epoch1"), load_weights(start, "epoch1"), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("sizes", [(4, 1), (1, 4), (2, 2)])
def test_accumulation_equals_a_plain_loop_over_unpadded_dialogues(
    sizes, run, tmp_path, config_path, tokenizer
):
    """语料恰好一个窗口：四段训练、一段验证；参照是 torch 的 AdamW 和逐段的交叉熵。"""
    corpus = make_dialogues()[:5]
    folder = run(
        train_path=write_pickle(tmp_path / "five.pkl", corpus),
        batch_size=sizes[0],
        gradient_accumulation_steps=sizes[1],
        epochs=3,
        lr=0.01,
        eps=1e-3,
        lr_schedule="constant",
        max_grad_norm=0.5,
    )
    model = initial_model(config_path, tokenizer)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) is is_matrix], "weight_decay": w}
        for is_matrix, w in ((True, 0.01), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-3)
    training, _ = train_test_split(corpus, test_size=1, random_state=0)
    for _ in range(3):
        total, count = loss_sum_and_count(model, training)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: param.detach() for name, param in model.named_parameters()}
    torch.testing.assert_close(load_weights(folder, "epoch3"), expected, rtol=1e-3, atol=2e-5)


class Killed(Exception):  # noqa: N818
    """代替 kill -9：什么也来不及存。"""


def happen_after(patch: pytest.MonkeyPatch, step: int, happen: Callable[[], None]) -> None:
    """让第 step 次参数更新之后发生一件事。"""
    update, done = Updater.step, []

    def step_and_happen(self, batch):
        result = update(self, batch)
        done.append(1)
        if len(done) == step:
            happen()
        return result

    patch.setattr(Updater, "step", step_and_happen)


@pytest.fixture
def with_dropout(tmp_path: Path) -> dict[str, object]:
    """续训要逐位相同，随机数也得接上。"""
    pdrop = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2)
    return {"model_config": write_config(tmp_path / "dropout.json", **pdrop), "lr": 0.01}


def assert_same_outcome(resumed: Path, whole: Path) -> None:
    for name in ("epoch1", "epoch2"):
        assert_same(load_weights(resumed, name), load_weights(whole, name))
    # 轮内的平均也接上；各行只有速度可以不同
    lines = [
        [match.groups()[:6] for match in EPOCH_LINE.finditer(read_log(folder))]
        for folder in (resumed, whole)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("step", [1, 5, 7])
def test_interrupted_run_resumes_bit_for_bit(step, optimizer, run, with_dropout, monkeypatch):
    options = {**with_dropout, "optimizer": optimizer}
    whole = run("whole", **options)
    with monkeypatch.context() as patch:
        happen_after(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        resumed = run("resumed", code=130, **options)
    assert f"interrupted: step={step}" in read_log(resumed)
    assert not (resumed / "epoch2").exists()
    run("resumed", resume=True, **options)
    assert_same_outcome(resumed, whole)


@pytest.mark.parametrize(
    "options", [{}, {"loss_on": "replies"}, {"train_mmi": True}, {"batch_tokens": 100}]
)
def test_long_dialogues_are_used_whole_and_resume_bit_for_bit(
    options, run, with_dropout, monkeypatch, tmp_path
):
    words = list(range(104, 116))
    rows = [[101, *([*words[: 2 + i % 5], 102, *words[i % 7 :], 102] * 6)] for i in range(22)]
    options = {**with_dropout, "max_len": 20, "log_step": 1, **options}
    options["train_path"] = write_pickle(tmp_path / "long.pkl", rows)
    whole = run("whole", **options)
    step = load_state_of(whole)["progress"]["step"] // 2 - 3
    assert step > 10  # 二十段对话，每段六块以上
    with monkeypatch.context() as patch:
        happen_after(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        resumed = run("resumed", code=130, **options)
    run("resumed", resume=True, **options)
    assert_same_outcome(resumed, whole)


MID_EPOCH_LINE = re.compile(r"epoch=(\d+) step=(\d+) val_loss=(\d+\.\d{4}) val_ppl=")


def test_mid_epoch_validation_keeps_the_best_and_changes_no_weight(run, with_dropout):
    plain = run("plain", **with_dropout)
    folder = run("a", eval_steps=2, log_step=1, **with_dropout)
    assert_same_outcome(folder, plain)
    found = [match.groups()[:2] for match in MID_EPOCH_LINE.finditer(read_log(folder))]
    assert found == [("1", "2"), ("1", "4"), ("2", "6"), ("2", "8")]  # 第 10 步是轮末，只做一次
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [2, 4, 5, 6, 8, 10]


def test_model_of_mid_epoch_can_be_chatted_with(run, config_path, tokenizer, monkeypatch):
    """一轮要几小时：第一次轮中验证之后就有模型；它的 loss 正是日志里那一行的。"""

    def die() -> None:
        raise Killed

    happen_after(monkeypatch, 4, die)
    with pytest.raises(Killed):
        run(eval_steps=3, lr=0.01)
    folder = Path("model")
    model = AutoModelForCausalLM.from_pretrained(folder / "min_ppl_model").eval()
    _, validation = train_test_split(make_dialogues(), test_size=2, random_state=0)
    total, count = loss_sum_and_count(model, validation)
    (row,) = MID_EPOCH_LINE.findall(read_log(folder))
    assert row[:2] == ("1", "3")
    assert float(row[2]) == pytest.approx(total.item() / count, abs=2e-4)
    assert not (folder / "epoch1").exists()


def test_best_of_mid_epoch_is_not_overwritten_by_a_worse_end(run):
    folder = run(epochs=3, eval_steps=1, lr=0.3, lr_schedule="constant")
    losses = [float(loss) for loss in re.findall(r" val_loss=(\d+\.\d{4})", read_log(folder))]
    assert len(losses) == 15
    model = AutoModelForCausalLM.from_pretrained(folder / "min_ppl_model").eval()
    _, validation = train_test_split(make_dialogues(), test_size=2, random_state=0)
    total, count = loss_sum_and_count(model, validation)
    assert total.item() / count == pytest.approx(min(losses), abs=2e-4)


@pytest.mark.parametrize("is_killed", [False, True])
def test_run_stopped_in_a_mid_epoch_validation_resumes_with_it(
    is_killed, run, with_dropout, monkeypatch
):
    def stop() -> None:
        if is_killed:
            raise Killed
        signal.raise_signal(signal.SIGINT)

    options = {**with_dropout, "eval_steps": 3, "save_steps": 2, "val_num": 2, "batch_size": 1}
    options["gradient_accumulation_steps"] = 4
    whole = run("whole", **options)
    with monkeypatch.context() as patch:
        happen_in_validation(patch, 1, stop)
        if is_killed:
            with pytest.raises(Killed):
                run("resumed", **options)
        else:
            resumed = run("resumed", code=130, **options)
            assert "interrupted: step=3" in read_log(resumed)
    resumed = run("resumed", resume=True, **options)
    assert_same_outcome(resumed, whole)
    assert_same(load_weights(resumed, "min_ppl_model"), load_weights(whole, "min_ppl_model"))
    lines = [MID_EPOCH_LINE.findall(read_log(folder)) for folder in (resumed, whole)]
    assert lines[0] == lines[1]


def load_state_of(folder: Path) -> dict:
    return torch.load(folder / STATE_NAME, weights_only=True)


def test_backward_model_cannot_learn_from_replies_alone(run):
    with pytest.raises(UserError, match=r"--train_mmi.*--loss_on replies"):
        run(train_mmi=True, loss_on="replies")


@pytest.mark.parametrize(("save_steps", "step"), [(3, 4), (2, 9), (0, 6)])
def test_killed_run_resumes_from_the_last_saved_step(
    save_steps, step, run, with_dropout, monkeypatch
):
    """save_steps 为 0 时从上一轮的结尾接着走。"""

    def die() -> None:
        raise Killed

    whole = run("whole", **with_dropout)
    with monkeypatch.context() as patch:
        happen_after(patch, step, die)
        with pytest.raises(Killed):
            run("resumed", save_steps=save_steps, **with_dropout)
    resumed = run("resumed", resume=True, **with_dropout)
    saved_step = step - step % save_steps if save_steps else 5
    assert f"resume: epoch={saved_step // 5 + 1} step={saved_step}\n" in read_log(resumed)
    assert_same_outcome(resumed, whole)


class GoneTerminal(io.StringIO):
    """Ssh 断开之后的标准错误。"""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def hang_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """调用它就像 ssh 断开：终端没了，再来一个 SIGHUP；没有人管它时抛出 Killed。"""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")

    def die(*_: object) -> None:
        raise Killed

    def hang_up() -> None:
        monkeypatch.setattr(sys, "stderr", GoneTerminal())
        signal.raise_signal(signal.SIGHUP)

    previous = signal.signal(signal.SIGHUP, die)
    yield hang_up
    signal.signal(signal.SIGHUP, previous)


def test_dropped_connection_saves_the_state(run, with_dropout, hang_up, monkeypatch):
    whole = run("whole", **with_dropout)
    with monkeypatch.context() as patch:
        happen_after(patch, 3, hang_up)
        resumed = run("resumed", code=130, **with_dropout)
    assert "interrupted: step=3" in read_log(resumed)
    run("resumed", resume=True, **with_dropout)
    assert_same_outcome(resumed, whole)


def test_dropped_connection_is_ignored_under_nohup(run, hang_up, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    happen_after(monkeypatch, 3, hang_up)
    assert epochs_logged(run()) == [1, 2]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def happen_in_validation(
    patch: pytest.MonkeyPatch, epoch: int, happen: Callable[[], None]
) -> list[int]:
    """让第 epoch 轮验证的第一次前向之后发生一件事；返回的列表里，每次验证用的前向各记一个。"""
    forward, calls = Updater.forward, []
    num_batches = 2  # 验证集两段，batch_size 1

    def forward_and_happen(self, batch):
        calls.append(1)
        sums = forward(self, batch)
        if len(calls) == num_batches * (epoch - 1) + 1:
            happen()
        return sums

    patch.setattr(Updater, "forward", forward_and_happen)
    return calls


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_validation_stops_at_once_and_resumes_bit_for_bit(
    epoch, signum, run, with_dropout, monkeypatch
):
    options = {**with_dropout, "batch_size": 1, "gradient_accumulation_steps": 4}
    whole = run("whole", **options)
    with monkeypatch.context() as patch:
        calls = happen_in_validation(patch, epoch, lambda: signal.raise_signal(signum))
        resumed = run("resumed", code=130, **options)
    assert len(calls) == 2 * (epoch - 1) + 1  # 验证没有做完
    assert f"interrupted: step={5 * epoch}" in read_log(resumed)
    assert epochs_logged(resumed) == list(range(1, epoch))
    run("resumed", resume=True, **options)
    assert_same_outcome(resumed, whole)


def test_run_killed_during_validation_resumes_at_the_validation(run, with_dropout, monkeypatch):
    def die() -> None:
        raise Killed

    options = {**with_dropout, "batch_size": 1, "gradient_accumulation_steps": 4}
    whole = run("whole", **options)
    with monkeypatch.context() as patch:
        happen_in_validation(patch, 1, die)
        with pytest.raises(Killed):
            run("resumed", **options)
    resumed = run("resumed", resume=True, **options)
    assert "resume: epoch=1 step=5\n" in read_log(resumed)
    assert_same_outcome(resumed, whole)


@pytest.mark.parametrize(("lr", "expected"), [(None, 0.3), (0.1, 0.1)])
def test_resumed_run_takes_the_old_peak_unless_told(lr, expected, run):
    folder = run(epochs=1, lr=0.3, lr_schedule="constant")
    again = {} if lr is None else {"lr": lr}
    run(epochs=2, resume=True, lr_schedule="constant", **again)
    rates = [float(match[6]) for match in EPOCH_LINE.finditer(read_log(folder))]
    assert rates == [0.3, expected]
    assert re.findall(r"peak_learning_rate=(\S+)", read_log(folder)) == ["0.3", f"{expected:g}"]


def test_fresh_run_that_dies_early_is_not_resumed_into_the_earlier_one(run, monkeypatch):
    def die() -> None:
        raise Killed

    folder = run()
    before = (folder / STATE_NAME).read_bytes()
    with monkeypatch.context() as patch:
        happen_after(patch, 2, die)
        with pytest.raises(Killed):
            run(lr=0.01)
    run(resume=True, lr=0.01)
    assert "starting afresh" in read_log(folder)
    assert (folder / "old1" / STATE_NAME).read_bytes() == before


def test_fresh_run_sets_the_whole_earlier_run_aside(run, capsys):
    folder = run("a", epochs=4)
    mine = {"base/config.json": "{}", "config.json": "{}", "epoch.txt": "", "epochs/x": ""}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "training_state.old1.pt").write_bytes(b"1")  # 旧版本留下的
    names = ["epoch1", "epoch2", "epoch3", "epoch4", "min_ppl_model", "runs", STATE_NAME]
    first = {name: content_of(folder / name) for name in names}
    capsys.readouterr()
    run("a", lr=0.01)
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "提示：" in line and str(folder / "old1") in line]
    assert "set aside" in read_log(folder)
    assert {name: content_of(folder / "old1" / name) for name in names} == first
    assert (folder / "old1" / "training_state.old1.pt").read_bytes() == b"1"
    assert {name: (folder / name).read_text(encoding="utf-8") for name in mine} == mine
    assert not (folder / "epoch3").exists()  # 新的一次只有两轮
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [5, 10]
    second = {name: content_of(folder / name) for name in ("epoch1", STATE_NAME)}
    run("a")
    assert {name: content_of(folder / "old2" / name) for name in second} == second
    assert {name: content_of(folder / "old1" / name) for name in names} == first


def content_of(path: Path) -> dict[str, bytes]:
    """文件，或文件夹里的全部文件。"""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_nothing_is_set_aside_by_a_resumed_or_a_first_run(run, capsys):
    folder = run(epochs=1)
    run(epochs=2, resume=True)
    assert not list(folder.glob("old*"))
    assert "提示：" not in capsys.readouterr().err


def test_refused_run_leaves_the_earlier_one_where_it_is(run):
    folder = run(epochs=1)
    with pytest.raises(UserError):
        run(epochs=1, max_len=65)
    assert (folder / STATE_NAME).is_file()
    assert not (folder / "old1").exists()


def test_pretrained_model_that_is_set_aside_is_named(run, capsys):
    folder = run("a", epochs=1)
    run("a", epochs=1, pretrained_model=folder / "epoch1")
    assert f"--pretrained_model {folder / 'old1' / 'epoch1'}" in capsys.readouterr().err


def hold_lock(folder: Path, is_locked: object, should_end: object) -> None:
    """另一个进程：占住文件夹。"""
    with occupy(folder):
        is_locked.set()
        should_end.wait(60)


@pytest.mark.parametrize("is_killed", [False, True])
def test_second_training_in_the_same_folder_is_refused_until_the_first_is_gone(
    is_killed, run, tmp_path, capsys
):
    folder = tmp_path / "model"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    is_locked, should_end = context.Event(), context.Event()
    other = context.Process(target=hold_lock, args=(folder, is_locked, should_end))
    other.start()
    assert is_locked.wait(60)
    with pytest.raises(SystemExit) as stopped:
        run_cli(run)
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert str(folder) in sentence
    assert "--save_model_path" in sentence
    assert not (folder / "epoch1").exists()
    if is_killed:
        other.kill()
    else:
        should_end.set()
    other.join()
    assert epochs_logged(run()) == [1, 2]


def test_folder_that_knows_no_locks_is_used_without(run, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder, "_lock", refuse)
    assert epochs_logged(run()) == [1, 2]


def full_disk_of_torch(*_: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def full_disk_of_safetensors(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error:\nNo space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "full_disk", "named"),
    [
        (torch, "save", full_disk_of_torch, STATE_NAME),
        (GPT2LMHeadModel, "save_pretrained", full_disk_of_safetensors, "epoch2"),
    ],
)
def test_full_disk_leaves_a_whole_state_and_gets_one_sentence(
    owner, name, full_disk, named, run, capsys, monkeypatch
):
    folder = run(epochs=1)
    before = (folder / STATE_NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises(SystemExit) as stopped:
            run_cli(lambda: run(epochs=2, resume=True))
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "错误：" in line]
    assert "磁盘" in sentence
    assert named in sentence
    if named == STATE_NAME:  # 权重写不下时，验证之前的状态已经存好
        assert (folder / STATE_NAME).read_bytes() == before
    run(epochs=2, resume=True)
    assert epochs_logged(folder)[-1] == 2


def test_finished_run_resumes_with_more_epochs(run, with_dropout):
    options = {**with_dropout, "lr_schedule": "constant"}
    whole = run("whole", epochs=2, **options)
    resumed = run("resumed", epochs=1, **options)
    run("resumed", epochs=2, resume=True, **options)
    assert_same_outcome(resumed, whole)
    run("resumed", epochs=2, resume=True, **options)  # 已经训练完，没有事可做
    assert epochs_logged(resumed) == [1, 2]


def test_raised_epochs_follow_the_new_schedule(run):
    folder = run(epochs=1)
    run(epochs=4, resume=True)
    rates = [float(match[6]) for match in EPOCH_LINE.finditer(read_log(folder))]
    # 线性，一轮五次更新：第 n 轮最后一次是 lr × (1 − (5n − 1) / 20)，单独一轮时是 lr × (1 − 4 / 5)
    assert rates == [2e-4, 5.5e-4, 3e-4, 5e-5]


def test_early_stop_counts_across_a_resume(run):
    options = {"patience": 1, "lr": 0.3, "lr_schedule": "constant"}
    whole = run("whole", epochs=30, **options)
    num_epochs = len(epochs_logged(whole))
    resumed = run("resumed", epochs=num_epochs - 1, **options)
    run("resumed", epochs=30, resume=True, **options)
    assert epochs_logged(resumed) == list(range(1, num_epochs + 1))


def test_resume_without_state_starts_afresh(run):
    folder = run("b", resume=True)
    assert "starting afresh" in read_log(folder)
    assert_same_outcome(folder, run("a"))


def test_resume_with_auto_precision_takes_the_saved_one(run, monkeypatch):
    folder = run(epochs=1, precision="bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # 自己选会选 fp32
    run(epochs=2, resume=True, precision="auto")
    assert re.findall(r" precision=(\S+)", read_log(folder)) == ["bf16", "bf16"]
    run(epochs=3, resume=True, precision="auto")  # 存下的仍是具体的精度
    assert epochs_logged(folder) == [1, 2, 3]


def test_resume_with_auto_optimizer_takes_the_saved_one(run, monkeypatch):
    folder = run(epochs=1, optimizer="muon")
    monkeypatch.setattr(plan, "choose_optimizer", lambda *_, **__: "adamw")  # 自己选会选它
    run(epochs=2, resume=True, optimizer="auto")
    assert re.findall(r" optimizer=(\S+)", read_log(folder)) == ["muon", "muon"]
    assert epochs_logged(folder) == [1, 2]


CHANGES = {
    "precision": lambda path: "bf16",
    "seed": lambda path: 1,
    "batch_size": lambda path: 5,
    "gradient_accumulation_steps": lambda path: 2,
    "max_len": lambda path: 32,
    "loss_on": lambda path: "replies",
    "batch_tokens": lambda path: 50,
    "val_num": lambda path: 1,
    "optimizer": lambda path: "muon",
    "train_mmi": lambda path: True,
    "train_path": lambda path: write_pickle(path, make_dialogues(seed=1)),
    "vocab_path": lambda path: write_text(path, "\n".join(TINY_VOCAB[:-2] + TINY_VOCAB[:-3:-1])),
    "model_config": lambda path: write_config(path, n_layer=1),
}


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_resume_with_anything_essential_changed_is_refused_by_name(run, tmp_path):
    folder = run(epochs=1)
    before = (folder / STATE_NAME).read_bytes()
    for name, change in CHANGES.items():
        with pytest.raises(UserError, match=f"--{name} .*--resume") as refused:
            run(epochs=2, resume=True, **{name: change(tmp_path / "changed")})
        assert STATE_NAME in str(refused.value)
    assert (folder / STATE_NAME).read_bytes() == before
    assert epochs_logged(folder) == [1]


def saved_by_torch(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a state",
        pickle.dumps([1, 2], protocol=2),
        saved_by_torch({"identity": [1]}),
        saved_by_torch({"identity": {}}),
        saved_by_torch([1]),
        saved_by_torch({"identity": {}})[:-30],
        saved_by_torch({"identity": {}}).replace(b"identity", b"ident\xffty"),
    ],
)
def test_broken_state_is_refused(content, run):
    folder = run(epochs=1)
    (folder / PREVIOUS_NAME).unlink()
    (folder / STATE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=rf"{STATE_NAME}.*--resume") as refused:
        run(epochs=2, resume=True)
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)


def test_damaged_state_goes_on_from_the_one_before(run, with_dropout, capsys):
    whole, resumed = (run(name, **with_dropout) for name in ("whole", "resumed"))
    state = resumed / STATE_NAME
    state.write_bytes(state.read_bytes()[:-100])
    run("resumed", resume=True, **with_dropout)
    assert f"从前一次存下的 {resumed / PREVIOUS_NAME} 接着训练" in capsys.readouterr().err
    assert (resumed / DAMAGED_NAME).is_file()
    states = [load_state_of(folder) for folder in (resumed, whole)]
    assert states[0]["progress"] == states[1]["progress"]
    assert_same(*(state["model"] for state in states))


@pytest.mark.parametrize("part", ["model", "updater"])
def test_state_with_tensors_of_other_shapes_is_refused(part, run):
    folder = run(epochs=1)
    (folder / PREVIOUS_NAME).unlink()
    state = load_state_of(folder)
    values = state["model"] if part == "model" else state["updater"]["optimizers"][0]["state"][0]
    name = next(name for name, value in values.items() if value.ndim > 1)
    values[name] = values[name][:1, :1].clone()
    torch.save(state, folder / STATE_NAME)
    with pytest.raises(UserError, match=r"形状不对.*--resume"):
        run(epochs=2, resume=True)


def test_only_the_newest_checkpoints_are_kept(run):
    folder = run(epochs=4, save_total_limit=2, train_path=Path("train.pkl"))
    kept = {path.name for path in folder.iterdir() if path.is_dir()}
    assert kept == {"epoch3", "epoch4", "min_ppl_model", "runs"}


def test_options_without_effect_are_accepted(run):
    folder = run("a", log="True", gpu0_bsz=0)
    assert "--log has no effect" in read_log(folder)
    assert "--gpu0_bsz has no effect" in read_log(folder)
    assert_same(load_weights(folder), load_weights(run("b")))


def test_ignore_index_has_no_effect_and_says_so(run):
    folder = run("a", ignore_index=-7)
    assert "--ignore_index has no effect" in read_log(folder)
    plain = run("b")
    assert "no effect" not in read_log(plain)
    assert_same(load_weights(folder), load_weights(plain))


def test_compile_without_a_compiler_is_one_sentence(run, monkeypatch, tmp_path, capsys):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "none")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(compile=True))
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "错误：" in line]
    assert "--compile" in sentence
    assert "No working C++ compiler found" in sentence


@pytest.mark.parametrize(
    ("options", "advice"),
    [({}, "--epochs"), ({"patience": 1, "lr": 0.3, "epochs": 30}, "--patience")],
)
def test_resuming_a_finished_run_says_that_nothing_is_left(run, options, advice):
    options = {"lr_schedule": "constant", **options}
    folder = run(**options)
    assert "nothing left to do" not in read_log(folder)
    epochs = epochs_logged(folder)
    run(resume=True, **options)
    assert re.search(f"nothing left to do: epoch={len(epochs)} .*{advice}", read_log(folder))
    assert epochs_logged(folder) == epochs


class Payload:
    """反序列化时建立文件夹 hacked；conftest 让当前目录是 tmp_path。"""

    def __reduce__(self):
        return Path.mkdir, (Path("hacked"),)


OUT_OF_RANGE = {
    "epochs": ["0", "-1", "1.5", "x"],
    "batch_size": ["0"],
    "gradient_accumulation_steps": ["0"],
    "max_len": ["1"],
    "val_num": ["0"],
    "num_workers": ["-1"],
    "ignore_index": ["0"],
    "lr": ["0", "-1", "nan", "inf"],
    "eps": ["0"],
    "max_grad_norm": ["0"],
    "warmup_steps": ["-1"],
    "patience": ["-1"],
    "seed": ["-1"],
    "log_step": ["0"],
    "save_steps": ["-1"],
    "eval_steps": ["-1"],
    "batch_tokens": ["-1"],
    "save_total_limit": ["-1"],
    "optimizer": ["sgd"],
    "precision": ["int8"],
    "lr_schedule": ["step"],
    "loss_on": ["none"],
}
# 选项、写进文件的内容（str 直接作为取值），以及一句话里要点明的
ERRORS = {
    "missing pickle": ("train_path", "none.pkl", ["none.pkl", "preprocess.py"]),
    "empty file": ("train_path", b"", ["bad.file"]),
    "no dialogue": ("train_path", pickle.dumps([]), ["bad.file", "没有对话"]),
    "nothing to predict": ("train_path", pickle.dumps([[101]] * 3), ["bad.file", "没有对话"]),
    "chat cannot run it": (
        "model_config",
        json.dumps({**TINY_CONFIG, "activation_function": "mish"}).encode(),
        ["activation_function", "mish"],
    ),
    "not a folder": ("save_model_path", b"", ["bad.file"]),
    "only empty dialogues": ("train_path", pickle.dumps([[], []]), ["bad.file", "没有对话"]),
    "not a pickle": ("train_path", "你好".encode(), ["bad.file"]),
    "not lists of ints": ("train_path", pickle.dumps([["a"]]), ["bad.file", "list[list[int]]"]),
    "id too large": (
        "train_path",
        pickle.dumps([[101, 9999]]),
        ["bad.file", "9999", "--vocab_path"],
    ),
    "hostile pickle": ("train_path", pickle.dumps([[Payload()]]), ["bad.file"]),
    "missing vocabulary": ("vocab_path", "none.txt", ["none.txt", "--vocab_path"]),
    "missing config": ("model_config", "none.json", ["none.json", "--model_config"]),
    "config not json": ("model_config", b"{", ["bad.file"]),
    "vocab_size differs": (
        "model_config",
        json.dumps({**TINY_CONFIG, "vocab_size": 13317}).encode(),
        ["bad.file", "13317", str(len(TINY_VOCAB))],
    ),
    "max_len beyond positions": ("max_len", "65", ["--max_len", "65", "n_positions 64"]),
    "no such model folder": ("pretrained_model", "a/b/c", ["a/b/c"]),
    "device not a number": ("device", "gpu", ["--device", "gpu"]),
    "device twice": ("device", "0,0", ["--device", "0,0"]),
    "unknown option": ("batchsize", "4", ["--batchsize"]),
    **{
        f"{name} {value}": (name, value, [f"--{name}", value])
        for name, values in OUT_OF_RANGE.items()
        for value in values
    },
}


@pytest.mark.parametrize(("option", "content", "named"), ERRORS.values(), ids=ERRORS)
def test_wrong_use_and_bad_input_exit_with_one_sentence(
    option, content, named, run, tmp_path, capsys
):
    if isinstance(content, bytes):
        (tmp_path / "bad.file").write_bytes(content)
        content = "bad.file"
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: run(**{option: content}))
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("错误：")
    assert sentence.count("\n") == 1
    assert [name for name in named if name not in sentence] == []
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "model" / "epoch1").exists()


def test_vocab_size_follows_the_vocabulary_the_corpus_was_encoded_with(
    run, config_path, tokenizer, tmp_path
):
    config_path.write_text(json.dumps({**TINY_CONFIG, "vocab_size": 13317}), encoding="utf-8")
    meta = {"vocab_fingerprint": vocab_fingerprint(tokenizer)}
    (tmp_path / "train.pkl.json").write_text(json.dumps(meta), encoding="utf-8")
    folder = run()
    assert json.loads((folder / "epoch1/config.json").read_text())["vocab_size"] == len(TINY_VOCAB)
    assert f"vocab_size={len(TINY_VOCAB)}" in read_log(folder)


@pytest.mark.parametrize(
    ("seconds", "options", "optimizer", "lr"),
    [
        (0.0, {}, "muon", "0.002"),
        (1e9, {}, "adamw", "0.001"),
        (0.0, {"lr": 0.01}, "muon", "0.01"),
    ],
)
def test_optimizer_and_lr_are_chosen_and_logged(seconds, options, optimizer, lr, run, monkeypatch):
    monkeypatch.setattr(optimizer_choice, "measure_orthogonalizing", lambda model: seconds)
    log = read_log(run(optimizer="auto", **options))
    assert f"optimizer={optimizer}\n" in log
    assert f"peak_learning_rate={lr}\n" in log


def test_training_from_weights_takes_adamw_with_a_small_lr(run):
    weights = run() / "epoch2"
    folder = run("continued", optimizer="auto", pretrained_model=weights)
    log = read_log(folder)
    assert "optimizer=adamw\n" in log
    assert "peak_learning_rate=0.0001\n" in log
