"""曾经出过的毛病，每个测试一个：写下时全部失败。"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
from conftest import ROOT, TINY_CONFIG, TINY_VOCAB

import interact
import train
from chitchat.architecture import build_model
from chitchat.chat.context import TextStream
from chitchat.chat.samples import sample_replies
from chitchat.checkpoint import save_checkpoint
from chitchat.cli import run_cli
from chitchat.errors import UserError
from chitchat.files import atomic_directory
from chitchat.tokens.tokenizer import load_tokenizer


@pytest.fixture
def train_once(tmp_path, vocab_path):
    """训练几轮；fields 改 config，options 改选项。"""
    rows = [[101, *range(104 + i, 108 + i), 102, 110 + i, 102] for i in range(22)]
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(rows, protocol=4))

    def run(fields: dict | None = None, **options: object) -> int:
        path = tmp_path / "c.json"
        path.write_text(json.dumps({**TINY_CONFIG, **(fields or {})}), encoding="utf-8")
        values = {
            **{"train_path": tmp_path / "t.pkl", "vocab_path": vocab_path, "model_config": path},
            **{"max_len": 16, "epochs": 1, "precision": "fp32", "save_model_path": "out"},
            **options,
        }
        argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return train.main(["--no_cuda", *argv])

    return run


def test_save_total_limit_never_deletes_the_folder_just_saved(train_once):
    train_once(epochs=3)
    train_once(epochs=1, save_total_limit=1)  # 同一个文件夹里重新训练
    assert Path("out/epoch1").is_dir()


def test_folder_can_be_replaced_after_a_kill_while_the_old_one_was_being_removed(tmp_path):
    """kill -9 落在 rmtree(.epoch1.old) 中间，会留下非空的 .epoch1.old。"""
    folder = tmp_path / "epoch1"
    folder.mkdir()
    left_over = tmp_path / ".epoch1.old"
    left_over.mkdir()
    (left_over / "tokenizer.json").write_text("{}")
    with atomic_directory(folder) as partial:
        (partial / "a").write_text("new")
    assert (folder / "a").read_text() == "new"


@pytest.mark.parametrize(
    "fields",
    [
        *({"n_layer": "2"}, {"n_layer": 1.5}, {"vocab_size": str(len(TINY_VOCAB))}),
        *({"layer_norm_epsilon": "x"}, {"n_layer": 0}, {"n_positions": 0}, {"n_head": 0}),
    ],
    ids=str,
)
def test_bad_field_in_model_config_is_a_user_error(fields, tmp_path, tokenizer):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**TINY_CONFIG, **fields}), encoding="utf-8")
    with pytest.raises(UserError, match=path.name):
        build_model(path, tokenizer)


def test_config_of_another_architecture_is_a_user_error(tmp_path, tokenizer):
    path = tmp_path / "c.json"
    fields = {"model_type": "bert", "vocab_size": len(TINY_VOCAB), "num_hidden_layers": 1}
    path.write_text(json.dumps({**fields, "hidden_size": 24}), encoding="utf-8")
    with pytest.raises(UserError, match="GPT-2"):
        build_model(path, tokenizer)


@pytest.mark.parametrize("seed", [2**32, 2**64])
def test_large_seed_trains_or_is_refused_in_one_sentence(seed, train_once):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: train_once(seed=seed))
    assert stop.value.code in (0, 2)


def test_sample_replies_of_a_model_with_few_positions(make_model, tokenizer):
    assert sample_replies(make_model(n_positions=16), tokenizer, [[110] * 5] * 8)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["a", ".", "c", "##o", "##m"], "a.com"),
        (["a", ".", "c", "##n", "啊"], "a.cn啊"),
        (["we", "'", "r", "##e"], "we're"),
        (["w", "##e", "'", "l", "##l"], "we'll"),
        (["o", "'", "c", "##l", "##o", "##c", "##k"], "o'clock"),
    ],
)
def test_streamed_text_is_the_whole_text_when_a_late_piece_removes_a_space(pieces, text):
    tokenizer = load_tokenizer(ROOT / "vocab" / "vocab.txt")
    stream = TextStream(tokenizer)
    written = [stream.put(tokenizer.token_to_id(piece)) for piece in pieces]
    assert "".join([*written, stream.end()]) == text


@pytest.fixture
def model_dir(tmp_path, make_model, tokenizer) -> Path:
    save_checkpoint(tmp_path / "m", make_model(), tokenizer)
    return tmp_path / "m"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")


def code_of(folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: interact.main(["--no_cuda", "--model_path", str(folder), *options]))
    return stop.value.code


@pytest.mark.parametrize("text", ["", "/quit\n"])
def test_broken_weights_are_reported_though_nothing_was_said(text, model_dir, monkeypatch):
    (model_dir / "model.safetensors").write_bytes(b"junkjunkjunk")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert code_of(model_dir) == 2


@pytest.mark.parametrize("fields", [{"n_head": 3}, {"n_positions": "64"}], ids=str)
def test_config_that_does_not_fit_the_weights_is_one_sentence(fields, model_dir, monkeypatch):
    edit_config(model_dir, **fields)
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    assert code_of(model_dir) == 2


def test_config_with_more_positions_than_the_weights_is_refused(model_dir, monkeypatch):
    edit_config(model_dir, n_positions=128)
    monkeypatch.setattr("sys.stdin", io.StringIO("你" * 100 + "\n"))
    assert code_of(model_dir, "--max_len", "5") == 2


def test_reply_is_not_empty_at_a_tiny_temperature(model_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    options = ["--temperature", "1e-40", "--topk", "0"]
    if code_of(model_dir, *options) == 0:
        assert capsys.readouterr().out.splitlines()[-1] != "chatbot:"
