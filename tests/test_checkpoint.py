"""模型文件夹：写出来完整、标准，读回来一模一样；读不了的说清原因。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_VOCAB
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    pipeline,
)

from chitchat.architecture import build_model, check_vocab_size
from chitchat.chat.loading import load_engine
from chitchat.checkpoint import (
    load_model,
    load_model_tokenizer,
    save_checkpoint,
)
from chitchat.errors import UserError
from chitchat.hub import explain_hub_error
from chitchat.tokens.tokenizer import encode_utterances, load_tokenizer, special_ids
from chitchat.training.run_folder import remove_old_checkpoints
from chitchat.weights import gpt2_shapes

INPUT_IDS = torch.tensor([[101, 110, 111, 102, 120]])
CLS, SEP = 101, 102
CPU = torch.device("cpu")


def say(*texts: str) -> list[dict[str, str]]:
    """轮流说话的 messages，第一句是用户说的。"""
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def saved(tmp_path, make_parrot, tokenizer) -> Path:
    save_checkpoint(tmp_path / "epoch1", make_parrot("早上好，吃饭了吗"), tokenizer)
    return tmp_path / "epoch1"


def test_round_trip_is_exact(tmp_path, make_model, tokenizer):
    model = make_model()
    save_checkpoint(tmp_path / "epoch1", model, tokenizer)
    loaded = load_model(str(tmp_path / "epoch1"))
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(theirs[name], value), name
    again = load_model_tokenizer(str(tmp_path / "epoch1"), None)
    assert again.get_vocab() == {token: i for i, token in enumerate(TINY_VOCAB)}


def test_folder_has_everything_and_nothing_half_written_beside_it(saved):
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.txt"} <= names
    assert (saved / "vocab.txt").read_bytes() == ("\n".join(TINY_VOCAB) + "\n").encode()
    assert [path.name for path in saved.parent.iterdir() if path.is_dir()] == ["epoch1"]


def test_every_file_can_be_read_by_whoever_may_read_the_first(saved):
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_failed_save_leaves_the_old_folder_as_it_was(saved, make_model, tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(GenerationConfig, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(saved, make_model(), tokenizer)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir() if path.is_dir()] == ["epoch1"]


def test_vocabulary_without_mask_is_enough(tmp_path, make_model):
    vocab = [token for token in TINY_VOCAB if token != "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer.get_vocab_size() == len(vocab)
    save_checkpoint(tmp_path / "epoch1", make_model(vocab_size=len(vocab)), tokenizer)
    again = load_model_tokenizer(str(tmp_path / "epoch1"), None)
    wrapped = AutoTokenizer.from_pretrained(tmp_path / "epoch1")
    assert again.get_vocab() == wrapped.get_vocab() == {token: i for i, token in enumerate(vocab)}
    expected = [CLS, *encode_utterances(tokenizer, ["你[MASK]好"])[0], SEP]
    rendered = wrapped.apply_chat_template(say("你[MASK]好"), tokenize=True)
    assert rendered["input_ids"] == expected


def test_only_the_newest_epoch_folders_are_kept(tmp_path):
    names = ["epoch2", "epoch9", "epoch10", "epoch11", "min_ppl_model", "epochs", "runs"]
    for name in names:
        (tmp_path / name).mkdir()
    remove_old_checkpoints(tmp_path, 0, 11)
    assert {path.name for path in tmp_path.iterdir()} == {*names}
    remove_old_checkpoints(tmp_path, 2, 11)
    assert {path.name for path in tmp_path.iterdir()} == {*names} - {"epoch2", "epoch9"}


def test_old_epoch_folder_that_is_a_link_is_removed_with_what_it_points_to(tmp_path):
    (tmp_path / "disk" / "one").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "epoch1").symlink_to(tmp_path / "disk" / "one")
    remove_old_checkpoints(tmp_path / "model", 1, 2)
    assert list((tmp_path / "model").iterdir()) == list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    "texts",
    [
        ["你好"],
        ["你好", "早上好！", "吃饭了吗？"],
        ["Hello 你好 i'm 3.14", "😂😂 ok"],
        ["我说[SEP]你说[CLS]", "[PAD]", "[UNK] [MASK]x[SEP]"],
        ["[sep]", "[[SEP]]", "[unused1]", " 前后有空格 "],
    ],
)
def test_chat_template_gives_the_ids_that_training_used(texts, tmp_path, make_model):
    tokenizer = load_tokenizer(ROOT / "vocab" / "vocab.txt")
    save_checkpoint(tmp_path / "epoch1", make_model(vocab_size=13317), tokenizer)
    wrapped = AutoTokenizer.from_pretrained(tmp_path / "epoch1")
    expected = [CLS]
    for token_ids in encode_utterances(tokenizer, texts):
        expected += [*token_ids, SEP]
    rendered = wrapped.apply_chat_template(say(*texts), tokenize=True)
    assert rendered["input_ids"] == expected
    assert expected.count(SEP) == len(texts)
    assert expected.count(CLS) == 1
    assert 0 not in expected


def test_transformers_reads_the_folder_as_it_is(saved, make_parrot):
    model = AutoModelForCausalLM.from_pretrained(saved)
    generation_config = GenerationConfig.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    expected = make_parrot("早上好，吃饭了吗")(INPUT_IDS).logits
    assert torch.equal(model.eval()(INPUT_IDS).logits, expected)
    found = (generation_config.bos_token_id, generation_config.eos_token_id)
    assert (*found, generation_config.pad_token_id) == (CLS, SEP, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (CLS, SEP, 0)
    assert set(tokenizer("你好")) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == 64


def test_pipeline_replies_up_to_sep_without_special_tokens_or_blanks(saved):
    chat = pipeline("text-generation", model=str(saved))
    messages = chat(say("你好[SEP]", "早", "晚安"))[0]["generated_text"]
    assert messages[-1] == {"role": "assistant", "content": "早上好，吃饭了吗"}


def test_pipeline_never_generates_a_special_or_unused_token(tmp_path, make_bigram_model, tokenizer):
    favoured = {"[UNK]": 90.0, "[PAD]": 90.0, "[CLS]": 90.0, "[MASK]": 90.0, "[unused7]": 90.0}
    model = make_bigram_model(
        {"[SEP]": {**favoured, "早": 60.0}, "早": {**favoured, "[SEP]": 60.0}}
    )
    save_checkpoint(tmp_path / "epoch1", model, tokenizer)
    messages = pipeline("text-generation", model=str(tmp_path / "epoch1"))(say("你好"))
    assert messages[0]["generated_text"][-1]["content"] == "早"


# ---- 参考实现公开的权重 ----


@pytest.fixture
def make_published(tmp_path, make_model):
    """2019、2020 年的 transformers 存下的文件夹：旧字段、旧缓冲区、没有 tokenizer。"""

    def make(prefix: str, mask_type: torch.dtype):
        model = make_model(activation_function="gelu_new").eval()
        config = {
            **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"]},
            **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "finetuning_task": None},
            **{"gradient_checkpointing": False, "initializer_range": 0.02, "model_type": "gpt2"},
            **{"layer_norm_epsilon": 1e-5, "n_ctx": 64, "n_embd": 16, "n_head": 2, "n_layer": 2},
            **{"n_positions": 64, "n_inner": None, "num_labels": 1, "output_attentions": False},
            **{"output_hidden_states": False, "output_past": True, "pruned_heads": {}},
            **{"summary_type": "cls_index", "torchscript": False, "use_bfloat16": False},
            **{"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 400}}},
            **{"transformers_version": "4.2.0", "use_cache": True, "vocab_size": len(TINY_VOCAB)},
        }
        weights = {
            name.replace("transformer.", prefix): v for name, v in model.state_dict().items()
        }
        for layer in range(2):
            mask = torch.ones(64, 64).tril().to(mask_type)[None, None]
            weights[f"{prefix}h.{layer}.attn.bias"] = mask
            weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        directory = tmp_path / "published"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        torch.save(weights, directory / "pytorch_model.bin")
        return directory, model

    return make


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("mask_type", [torch.uint8, torch.float32])
def test_published_weights_give_equal_logits(prefix, mask_type, make_published):
    directory, model = make_published(prefix, mask_type)
    logits = load_model(str(directory)).eval()(INPUT_IDS).logits
    assert torch.equal(logits, model(INPUT_IDS).logits)


def test_published_weights_need_the_vocabulary_and_the_user_is_told(make_published, vocab_path):
    directory, _ = make_published("transformer.", torch.uint8)
    with pytest.raises(UserError) as error:
        load_model_tokenizer(str(directory), None)
    for name in (str(directory), "tokenizer.json", "vocab.txt", "--vocab_path", "token id"):
        assert name in str(error.value)
    assert load_model_tokenizer(str(directory), vocab_path).token_to_id("[SEP]") == SEP


# ---- 读不了的文件夹 ----


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")


def drop_weights(directory: Path, word: str) -> None:
    weights = load_model(str(directory)).state_dict()
    (directory / "model.safetensors").unlink()
    kept = {name: value for name, value in weights.items() if word not in name}
    torch.save(kept, directory / "pytorch_model.bin")


def lose_weights(directory: Path, word: str) -> None:
    path = directory / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if word not in name}
    save_file(kept, path, metadata={"format": "pt"})
    (directory / "checksums.json").unlink()


def rename_weights(directory: Path, prefix: str, *, as_bin: bool = False) -> None:
    path = directory / "model.safetensors"
    renamed = {f"{prefix}{name}": value for name, value in load_file(path).items()}
    path.unlink()
    (directory / "checksums.json").unlink()
    if as_bin:
        torch.save(renamed, directory / "pytorch_model.bin")
    else:
        save_file(renamed, path, metadata={"format": "pt"})


def save_bert(directory: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(TINY_VOCAB), intermediate_size=16, is_decoder=True, **sizes)
    BertLMHeadModel(config).save_pretrained(directory)


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


ADVICE = (
    "ignore_mismatched_sizes",
    "weights_only",
    "huggingface",
    "Error while",
    "You ",
    "Weights",
)


BREAKAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), ["缺少 config.json"]),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        ["没有权重", "model.safetensors", "pytorch_model.bin"],
    ),
    "corrupt config": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json"]),
    "not GPT-2": (save_bert, ["GPT-2", "bert"]),
    "other width": (lambda d: edit_config(d, n_embd=32), ["n_embd", "32", "16"]),
    "more positions": (lambda d: edit_config(d, n_positions=128), ["n_positions", "128", "64"]),
    "more positions than the bin": (
        lambda d: (drop_weights(d, "none"), edit_config(d, n_positions=128)),
        ["n_positions", "128", "64"],
    ),
    "fewer layers": (lambda d: edit_config(d, n_layer=1), ["n_layer 写的是 1", "2"]),
    "more layers": (lambda d: edit_config(d, n_layer=3), ["n_layer 写的是 3", "2"]),
    "other vocabulary": (lambda d: edit_config(d, vocab_size=99), ["vocab_size", "99", "213"]),
    "no layers": (
        lambda d: lose_weights(d, ".h."),
        ["没有 GPT-2 的层（h.0.attn.c_attn.weight 等）", "transformer.ln_f.bias 等 4 项"],
    ),
    "unknown prefix": (
        lambda d: rename_weights(d, "actor."),
        ["没有 GPT-2 的层", "actor.transformer.", "前缀", "重新下载或复制"],
    ),
    "unknown prefix in a bin": (
        lambda d: rename_weights(d, "actor.", as_bin=True),
        ["没有 GPT-2 的层", "actor.transformer.", "前缀", "重新下载或复制"],
    ),
    "no position embedding": (lambda d: lose_weights(d, "wpe"), ["缺少 transformer.wpe.weight"]),
    "no final norm": (lambda d: lose_weights(d, "ln_f"), ["缺少 transformer.ln_f"]),
    "no bias in one layer": (
        lambda d: lose_weights(d, "h.1.mlp.c_fc.bias"),
        ["缺少 transformer.h.1.mlp.c_fc.bias"],
    ),
    "LFS pointer": (
        lambda d: (d / "model.safetensors").write_text(LFS_POINTER),
        ["model.safetensors 是 Git LFS 的指针", "git lfs pull"],
    ),
    "LFS pointer as bin": (
        lambda d: (drop_weights(d, "none"), (d / "pytorch_model.bin").write_text(LFS_POINTER)),
        ["pytorch_model.bin 是 Git LFS 的指针", "git lfs pull"],
    ),
    "HTML page": (
        lambda d: (d / "model.safetensors").write_text("<!DOCTYPE html><html>login</html>"),
        ["model.safetensors 是一个网页"],
    ),
    "HTML page as bin": (
        lambda d: (drop_weights(d, "none"), (d / "pytorch_model.bin").write_text("\n<html>")),
        ["pytorch_model.bin 是一个网页"],
    ),
    "cut safetensors": (lambda d: cut(d / "model.safetensors"), ["model.safetensors 不完整"]),
    "cut bin": (
        lambda d: (drop_weights(d, "none"), cut(d / "pytorch_model.bin")),
        ["pytorch_model.bin 不完整"],
    ),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), ["是空文件"]),
    "index without shards": (
        lambda d: shard(d, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ["分成 2 片", "缺少 model-00001-of-00002.safetensors 等 2 片"],
    ),
    "damaged index": (lambda d: shard(d), ["model.safetensors.index.json 已损坏"]),
    "list as bin": (
        lambda d: (drop_weights(d, "none"), torch.save([1], d / "pytorch_model.bin")),
        ["pytorch_model.bin 里没有权重"],
    ),
    "incomplete": (lambda d: drop_weights(d, "h.0.mlp.c_fc.bias"), ["不完整", "c_fc.bias", "1 项"]),
    "truncated safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"\x10\0\0\0"),
        ["model.safetensors"],
    ),
    "corrupt bin": (
        lambda d: (drop_weights(d, "none"), (d / "pytorch_model.bin").write_bytes(b"PK junk")),
        ["pytorch_model.bin 不完整"],
    ),
}


def shard(directory: Path, *names: str) -> None:
    """只留下分片的目录；没有给名字时目录是坏的。"""
    (directory / "model.safetensors").unlink()
    text = json.dumps({"weight_map": {name: name for name in names}} if names else [])
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_folder_is_explained(breakage, tmp_path, make_model, tokenizer):
    directory = tmp_path / "epoch3"
    save_checkpoint(directory, make_model(), tokenizer)
    break_it, named = BREAKAGES[breakage]
    break_it(directory)
    with pytest.raises(UserError) as error:
        load_model(str(directory))
    for name in (str(directory), *named):
        assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not [word for word in ADVICE if word in str(error.value)]
    with pytest.raises(UserError) as again:
        load_engine(str(directory), precision="fp32", device=torch.device("cpu"))
    assert str(again.value) == str(error.value)


@pytest.mark.parametrize("as_bin", [False, True])
def test_a_config_that_transformers_refuses_is_explained(as_bin, tmp_path, make_model, tokenizer):
    directory = tmp_path / "epoch3"
    save_checkpoint(directory, make_model(), tokenizer)
    if as_bin:
        drop_weights(directory, "none")
    edit_config(directory, summary_use_proj=2000)
    with pytest.raises(UserError, match=r"config.json 建不成模型.*summary_use_proj"):
        load_model(str(directory))


@pytest.mark.parametrize("fields", [{}, {"n_inner": 40}, {"n_layer": 3, "n_positions": 9}])
def test_shapes_are_those_of_transformers(fields, make_model):
    model = make_model(**fields)
    shapes = {name: tuple(value.shape) for name, value in model.transformer.state_dict().items()}
    assert gpt2_shapes(model.config.to_dict()) == shapes


def test_a_weight_turned_round_is_explained(saved):
    """形状不对，大小一样：不能悄悄算错。"""
    path = saved / "model.safetensors"
    weights = load_file(path)
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name] = weights[name].reshape(weights[name].shape[::-1]).contiguous()
    save_file(weights, path)
    (saved / "checksums.json").unlink()
    for load in (load_model, lambda d: load_engine(d, precision="fp32", device=CPU)):
        with pytest.raises(UserError, match=str(saved)):
            load(str(saved))


WRAPPINGS = {
    "DataParallel": lambda weights: {f"module.{name}": v for name, v in weights.items()},
    "torch.compile": lambda weights: {f"_orig_mod.{name}": v for name, v in weights.items()},
    "both": lambda weights: {f"module._orig_mod.{name}": v for name, v in weights.items()},
    "without transformer.": lambda weights: {
        f"module.{name.removeprefix('transformer.')}": v for name, v in weights.items()
    },
    "model": lambda weights: {"model": weights, "epoch": 3},
    "state_dict": lambda weights: {"state_dict": WRAPPINGS["DataParallel"](weights), "lr": 0.1},
}


@pytest.mark.parametrize("is_bin", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_weights_are_read(wrapping, is_bin, saved):
    expected = load_model(str(saved))(INPUT_IDS).logits
    weights = load_file(saved / "model.safetensors")
    wrapped = WRAPPINGS[wrapping](weights)
    if is_bin:
        (saved / "model.safetensors").unlink()
        torch.save(wrapped, saved / "pytorch_model.bin")
    elif wrapping in ("model", "state_dict"):
        pytest.skip("safetensors cannot nest")
    else:
        save_file(wrapped, saved / "model.safetensors")
    model = load_model(str(saved))
    assert not model.training
    assert torch.equal(model(INPUT_IDS).logits, expected)
    engine = load_engine(str(saved), precision="fp32", device=torch.device("cpu"))
    assert engine.vocab_size == len(TINY_VOCAB)


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_config_with_a_bom_is_read(has_generation_config, saved):
    if not has_generation_config:
        (saved / "generation_config.json").unlink()
    expected = load_model(str(saved))(INPUT_IDS).logits
    path = saved / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(load_model(str(saved))(INPUT_IDS).logits, expected)
    load_engine(str(saved), precision="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["nowhere", "model/epoch9", "a/b/c", "/no/such/folder", "notes.txt"]
)
def test_missing_folder_is_named_with_the_ones_there_are(name, tmp_path, make_model, tokenizer):
    (tmp_path / "notes.txt").write_text("不是文件夹", encoding="utf-8")
    save_checkpoint(tmp_path / "model" / "epoch3", make_model(), tokenizer)
    for load in (load_model, lambda path: load_model_tokenizer(path, None)):
        with pytest.raises(UserError, match=f"找不到模型文件夹 {name}") as error:
            load(name)
        is_beside = name == "model/epoch9"
        assert ("model/epoch3" in str(error.value)) == is_beside
        assert ("python train.py" in str(error.value)) == (not is_beside)


def test_hub_name_that_cannot_be_fetched_says_how_to_mend_it():
    with pytest.raises(UserError) as error:
        load_model("someone/some-model")
    for name in ("没有文件夹 someone/some-model", "网络", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        assert name in str(error.value)
    for word in ("connect", "huggingface.co", "offline mode"):
        assert word not in str(error.value)
    with pytest.raises(UserError, match="hub 上的名字，请用 --vocab_path"):
        load_model_tokenizer("someone/some-model", None)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("GatedRepoError", "要先申请"),
        ("RepositoryNotFoundError", "hub 上没有它"),
        ("EntryNotFoundError", "缺少 config.json 或权重"),
    ],
)
def test_each_kind_of_hub_error_has_its_own_remedy(kind, named):
    error = OSError("You need to ...")
    error.__cause__ = type(kind, (OSError,), {})("401 Client Error")
    sentence = explain_hub_error("someone/some-model", error)
    assert named in sentence
    assert "You" not in sentence


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, ["找不到模型结构", "--model_config"]),
        ("{", ["不是合法的 GPT-2 结构"]),
        ("[]", ["不是合法的 GPT-2 结构"]),
        ('{"vocab_size": 99}', ["vocab_size", "99", str(len(TINY_VOCAB)), "--vocab_path"]),
        (f'{{"vocab_size": {len(TINY_VOCAB)}, "n_embd": 15, "n_head": 2}}', ["建不成模型"]),
        (f'{{"vocab_size": {len(TINY_VOCAB)}, "activation_function": "x"}}', ["建不成模型"]),
    ],
)
def test_bad_model_config_is_explained(text, named, tmp_path, tokenizer):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        build_model(path, tokenizer)
    for name in (str(path), *named):
        assert name in str(error.value)


def test_model_from_config_gets_the_special_ids_of_the_vocabulary(tmp_path, tokenizer):
    path = tmp_path / "config.json"
    fields = {"vocab_size": len(TINY_VOCAB), "n_embd": 16, "n_head": 2, "n_layer": 1}
    path.write_text(json.dumps(fields), encoding="utf-8")
    config = build_model(path, tokenizer).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (CLS, SEP, 0)


def test_a_new_model_starts_as_its_embeddings(config_path, tokenizer):
    """各层开始时什么也不改：输出只由词向量和位置向量得出，而每层的梯度都不全是零。"""
    model = build_model(config_path, tokenizer).eval()
    parts = model.transformer
    embedded = parts.wte(INPUT_IDS) + parts.wpe(torch.arange(INPUT_IDS.size(1)))
    expected = parts.ln_f(embedded) @ parts.wte.weight.T
    output = model(input_ids=INPUT_IDS, labels=INPUT_IDS)
    assert torch.allclose(output.logits, expected, atol=1e-6)
    output.loss.backward()
    for block in parts.h:
        assert block.attn.c_proj.weight.grad.abs().sum() > 0
        assert block.mlp.c_proj.weight.grad.abs().sum() > 0


def test_vocabulary_of_another_size_names_both_numbers_and_the_source(tokenizer):
    with pytest.raises(UserError) as error:
        check_vocab_size(13317, tokenizer, "model/epoch7")
    for name in ("model/epoch7", "13317", str(len(TINY_VOCAB)), "--vocab_path"):
        assert name in str(error.value)


def test_special_ids_are_those_of_the_tokenizer_wherever_the_weights_came_from(
    tmp_path, make_model, tokenizer
):
    model = make_model()
    model.config.update({"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": None})
    save_checkpoint(tmp_path / "epoch1", model, tokenizer)
    fields = json.loads((tmp_path / "epoch1" / "config.json").read_text(encoding="utf-8"))
    ids = special_ids(tokenizer)
    found = [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert found == [ids.cls, ids.sep, ids.pad]


def test_the_shipped_model_has_the_ids_of_its_vocabulary():
    folder = ROOT / "model" / "base"
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids = special_ids(load_tokenizer(folder))
    found = [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert found == [ids.cls, ids.sep, ids.pad]
