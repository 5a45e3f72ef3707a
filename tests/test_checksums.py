"""损坏：每种后来要信的文件，随便哪一位翻转了，都看得出来，或者读出来的仍是原样。"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from chitchat.chat.loading import load_engine
from chitchat.checkpoint import load_model, save_checkpoint
from chitchat.checksums import CHECKSUMS_NAME, file_checksum
from chitchat.errors import UserError
from chitchat.tokens.batch_encoder import EncodedBatch
from chitchat.tokens.token_table import load_token_table
from chitchat.tokens.token_writer import open_writer
from chitchat.training.processes import Processes
from chitchat.training.state import DAMAGED_NAME, PREVIOUS_NAME, STATE_NAME, find_state

NUM_FLIPS = 40
CPU = torch.device("cpu")


def flips(path: Path, seed: int = 0, number: int = NUM_FLIPS, places: Sequence[int] = ()):
    """逐次翻转一位，先是 places 里的各个字节，再是随便哪一个；用完恢复原样。"""
    whole = path.read_bytes()
    rng = random.Random(seed)
    for index in [*places, *(rng.randrange(len(whole)) for _ in range(number))]:
        bit = rng.randrange(8)
        damaged = bytearray(whole)
        damaged[index] ^= 1 << bit
        path.write_bytes(damaged)
        yield index
    path.write_bytes(whole)


def test_checksum_is_that_of_the_whole_file(tmp_path):
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert file_checksum(tmp_path / "a") == f"{zlib.crc32(data):08x}"


@pytest.mark.parametrize(
    ("name", "damaged"),
    [("train.pkl", "train.pkl"), ("train", "train/tokens.npy"), ("train", "train/offsets.npy")],
)
def test_flipped_bits_in_training_data_are_noticed(name, damaged, tmp_path):
    rows = [[101, *np.random.default_rng(i).integers(200, 9000, 20), 102] for i in range(50)]
    with open_writer(tmp_path / name, 13317, {"vocab_size": 13317}) as writer:
        writer.write(EncodedBatch.from_rows(rows))
    assert len(load_token_table(tmp_path / name, 13317)) == 50
    for _ in flips(tmp_path / damaged):
        with pytest.raises(UserError, match=r"已损坏.*重新运行 python preprocess.py"):
            load_token_table(tmp_path / name, 13317)
    assert len(load_token_table(tmp_path / name, 13317)) == 50


def test_renamed_training_data_keeps_its_note(tmp_path):
    with open_writer(tmp_path / "a.pkl", 13317, {"vocab_fingerprint": "x"}) as writer:
        writer.write(EncodedBatch.from_rows([[101, 200, 102]]))
    for suffix in (".pkl", ".pkl.json"):
        (tmp_path / f"a{suffix}").rename(tmp_path / f"b{suffix}")
    with pytest.raises(UserError, match="另一份词表"):
        load_token_table(tmp_path / "b.pkl", 13317, "y")
    for _ in flips(tmp_path / "b.pkl", number=5):
        with pytest.raises(UserError, match="已损坏"):
            load_token_table(tmp_path / "b.pkl", 13317)


def test_training_data_of_other_tools_is_read_as_before(tmp_path):
    path = tmp_path / "train.pkl"
    with open_writer(path, 13317, {}) as writer:
        writer.write(EncodedBatch.from_rows([[101, 200, 102]]))
    path.write_bytes(pickle.dumps([[101, 201, 202, 102]]))  # 别的工具改写了，说明还是旧的
    assert load_token_table(path, 13317)[0].tolist() == [101, 201, 202, 102]


def test_table_without_checksums_is_looked_through(tmp_path):
    folder = tmp_path / "train"
    with open_writer(folder, 13317, {"vocab_size": 13317}) as writer:
        writer.write(EncodedBatch.from_rows([[101, 13316, 102]]))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert load_token_table(folder, 13317)[0].tolist() == [101, 13316, 102]
    with pytest.raises(UserError, match="13317 项"):
        load_token_table(folder, 13316)


@pytest.fixture
def checkpoint(tmp_path, make_model, tokenizer) -> Path:
    save_checkpoint(tmp_path / "epoch1", make_model(), tokenizer, card="说明")
    shutil.copytree(tmp_path / "epoch1", tmp_path / "epoch2")
    return tmp_path / "epoch1"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"]
)
def test_flipped_bits_in_a_checkpoint_are_noticed(name, checkpoint):
    for _ in flips(checkpoint / name):
        with pytest.raises(UserError, match=r"epoch1"):
            load_engine(str(checkpoint), precision="fp32", device=CPU)
    for _ in flips(checkpoint / name, number=4):
        with pytest.raises(UserError, match=r"epoch1"):
            load_model(str(checkpoint))
    load_engine(str(checkpoint), precision="fp32", device=CPU)


def test_damaged_checkpoint_offers_the_others_and_the_way_out(checkpoint):
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"bos_token_id": 101', '"bos_token_id": 102'))
    with pytest.raises(UserError) as error:
        load_engine(str(checkpoint), precision="fp32", device=CPU)
    assert "config.json 已损坏" in str(error.value)
    others = str(error.value).partition("完好的模型文件夹：")[2]
    assert others == str(checkpoint.parent / "epoch2")  # 没有坏了的这一个
    assert f"删去 {checkpoint / CHECKSUMS_NAME}" in str(error.value)
    (checkpoint / CHECKSUMS_NAME).unlink()  # 照着做
    load_engine(str(checkpoint), precision="fp32", device=CPU)


def test_the_card_may_be_edited(checkpoint):
    (checkpoint / "README.md").write_text("我的")  # 与原来一样长
    load_engine(str(checkpoint), precision="fp32", device=CPU)


def write_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)


def leave_part(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.part")


def make_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()  # 打不开：与没有权限的一样，是 OSError


SPOILT = {
    "LFS pointer": lambda folder: write_weights(folder, b"version https://git-lfs.github.com/s"),
    "part": leave_part,
    "cut": lambda folder: write_weights(folder, (folder / "model.safetensors").read_bytes()[:-9]),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "unreadable": make_folder,
}


def find_offered(model_path: Path) -> list[str]:
    """说坏了的句子里，给出的别的模型文件夹的名字。"""
    with pytest.raises(UserError) as error:
        load_model(str(model_path))
    assert "python train.py" not in str(error.value)
    others = str(error.value).partition("；完好的模型文件夹：")[2]
    return [Path(name).name for name in others.split("、") if name]


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("how", SPOILT)
def test_only_whole_checkpoints_are_offered(how, has_checksums, checkpoint):
    beside = checkpoint.parent / "epoch2"
    shutil.copytree(checkpoint, checkpoint.parent / ".epoch3.1@host.part")  # 还在写
    SPOILT[how](beside)
    if not has_checksums:
        (beside / CHECKSUMS_NAME).unlink()
    for _ in flips(checkpoint / "vocab.txt", number=1):
        assert find_offered(checkpoint) == []


def test_the_newest_five_of_the_whole_checkpoints_are_offered(checkpoint):
    names = [f"epoch{number}" for number in range(2, 14)]
    for number, name in enumerate(names):
        folder = checkpoint.parent / name
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        if number > 5:
            SPOILT["cut"](folder)
        os.utime(folder, (number, number))
    for _ in flips(checkpoint / "vocab.txt", number=1):
        assert find_offered(checkpoint) == names[5:0:-1]


@pytest.mark.parametrize("content", ["{", "[]", '{"config.json": 1}', ""])
def test_damaged_checksums_are_explained(content, checkpoint):
    (checkpoint / CHECKSUMS_NAME).write_text(content)
    with pytest.raises(UserError, match=f"删去 .*{CHECKSUMS_NAME}"):
        load_model(str(checkpoint))


def write_state(path: Path, value: float) -> dict:
    names = ("progress", "model", "updater", "random_states")
    state = {name: {"values": torch.full((500,), value)} for name in names}
    torch.save({**state, "identity": {"seed": 0}}, path)
    return state


def test_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    write_state(tmp_path / PREVIOUS_NAME, 1.0)
    write_state(tmp_path / STATE_NAME, 2.0)
    found = []
    size = (tmp_path / STATE_NAME).stat().st_size
    ends = range(size - 22, size)  # zip 的结尾：读它时 zipfile 抛出的是 OSError
    for _ in flips(tmp_path / STATE_NAME, number=150, places=[*ends]):
        values = find_state(tmp_path, {"seed": 0}, Processes())["model"]["values"]
        found.append(values.unique().item())
    assert set(found) <= {1.0, 2.0}  # 翻转的若是 zip 里无关紧要的一位，读出的仍是原样
    assert found.count(1.0) > 100
    message = capsys.readouterr().err
    sentence = f"已损坏，改名为 {DAMAGED_NAME}；从前一次存下的 {tmp_path / PREVIOUS_NAME} 接着训练"
    assert message.count(sentence) == found.count(1.0)


def test_only_the_previous_state_is_left(tmp_path, capsys):
    write_state(tmp_path / PREVIOUS_NAME, 1.0)
    state = find_state(tmp_path, {"seed": 0}, Processes())
    assert state["model"]["values"][0] == 1.0
    assert f"没有 {tmp_path / STATE_NAME}，从前一次" in capsys.readouterr().err


def test_two_damaged_states_are_one_sentence(tmp_path):
    for name in (STATE_NAME, PREVIOUS_NAME):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"训练状态 .*、.* 已损坏.*--pretrained_model"):
        find_state(tmp_path, {"seed": 0}, Processes())
