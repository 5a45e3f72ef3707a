"""检查点：读写完整、标准的模型文件夹。

torch 与 transformers 用到时才导入：对话只需要这里的检查，不必等它们。
"""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from chitchat.architecture import token_id_fields
from chitchat.chat_template import wrap_tokenizer
from chitchat.checksums import check_folder, write_checksums
from chitchat.errors import UserError
from chitchat.files import atomic_directory, parse_json
from chitchat.hub import explain_hub_error, is_hub_name
from chitchat.tokens.tokenizer import load_tokenizer, unspeakable_ids, vocab_text
from chitchat.weights import check_sizes, check_weight_files, read_weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2Config, GPT2LMHeadModel


# transformers 和 torch.load 读不出文件时抛出的异常
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
)
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # 旧版本存下的，不是参数
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_LISTED = 5  # 说有哪些模型文件夹时，最多列几个


def load_model(name_or_dir: str) -> GPT2LMHeadModel:
    """从文件夹或 hub 上的名字读模型。

    Args:
        name_or_dir: 含 config.json 和权重的文件夹；不是本地路径时当作 hub 上的名字。

    Raises:
        UserError: 文件夹不完整、不是 GPT-2，或 hub 上取不到。
    """
    from safetensors import SafetensorError

    directory = Path(name_or_dir)
    if directory.is_dir():
        _check_model_dir(directory)
    elif not is_hub_name(name_or_dir):
        raise UserError(f"找不到模型文件夹 {name_or_dir}{_suggest_model(directory.parent)}")
    is_local = directory.is_dir()
    config, weights = {}, None
    if is_local:
        check_weight_files(directory)
        config = _read_valid_config(directory)
        weights = read_weights(directory)
        check_sizes(directory, config, weights)
        _check_folder(directory)
    try:
        model, missing = _build(name_or_dir, config, weights)
    except (*UNREADABLE, SafetensorError) as error:
        if not is_local:
            raise UserError(explain_hub_error(name_or_dir, error)) from error
        raise UserError(
            f"无法从 {name_or_dir} 读出 GPT-2 模型（{type(error).__name__}）："
            "config.json 与权重不是同一个模型的，或已损坏；请从原处重新复制"
        ) from error
    if missing:
        raise UserError(f"{name_or_dir} 的权重不完整：缺少 {missing[0]} 等 {len(missing)} 项")
    return model


def _build(
    name_or_dir: str, config: dict, weights: dict[str, Tensor] | None
) -> tuple[GPT2LMHeadModel, list[str]]:
    """建立模型并填入权重；给出模型和缺少的权重的名字。"""
    import torch
    from transformers import GenerationConfig, GPT2LMHeadModel

    if weights is None:
        known = {"config": _as_gpt2_config(name_or_dir, config)} if config else {}
        if config and not (Path(name_or_dir) / "generation_config.json").is_file():
            # 否则 transformers 自己再读一遍 config.json，而它读不了 BOM
            known["generation_config"] = GenerationConfig.from_model_config(known["config"])
        model, report = GPT2LMHeadModel.from_pretrained(
            name_or_dir, dtype=torch.float32, output_loading_info=True, **known
        )
        return model, sorted(set(report["missing_keys"]) - {"lm_head.weight"})
    model = GPT2LMHeadModel(_as_gpt2_config(name_or_dir, config))
    prefix = "" if any(name.startswith("transformer.") for name in weights) else "transformer."
    named = {n if n.startswith("lm_head.") else prefix + n: value for n, value in weights.items()}
    report = model.load_state_dict(named, strict=False)
    missing = [name for name in report.missing_keys if not name.endswith(MASK_BUFFERS)]
    return model.eval(), sorted(set(missing) - {"lm_head.weight"})


def _as_gpt2_config(name_or_dir: str, fields: dict) -> GPT2Config:
    """transformers 的结构。"""
    from transformers import GPT2Config

    try:
        return GPT2Config.from_dict(fields)
    except Exception as error:  # transformers 校验字段时抛出的异常各种各样
        raise UserError(
            f"{name_or_dir} 的 config.json 建不成模型（{error}）：请改正，或从原处重新复制"
        ) from error


def _read_valid_config(directory: Path) -> dict:
    """config.json 的内容，确认是 GPT-2。"""
    config = read_config(str(directory))
    if not config:
        raise UserError(f"{directory / 'config.json'} 已损坏，读不懂：请从原处重新复制")
    model_type = config.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise UserError(f"{directory} 是 {model_type} 模型，不是 GPT-2：请换一个文件夹")
    return config


def weights_stamp(model_dir: str) -> list[list]:
    """权重文件的名字、字节数和修改时间；不同就是换过了。hub 上的模型是空的。"""
    files = [file for name in WEIGHT_FILES for file in Path(model_dir).glob(f"{name}*")]
    stats = [(file.name, file.stat()) for file in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def read_config(model_dir: str) -> dict:
    """模型文件夹的 config.json；读不出时是空的字典，毛病留给读模型时去说。"""
    try:
        fields = parse_json((Path(model_dir) / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def has_tokenizer(model_dir: str) -> bool:
    """模型文件夹里有没有自带的 tokenizer。"""
    return any((Path(model_dir) / name).is_file() for name in ("tokenizer.json", "vocab.txt"))


def load_model_tokenizer(model_dir: str, vocab_path: Path | None) -> Tokenizer:
    """对话用的 tokenizer：给了 vocab_path 就用它，否则用模型文件夹自带的。

    Raises:
        UserError: 模型文件夹里没有 tokenizer，又没有给 vocab_path；或文件有误。
    """
    if vocab_path is not None:
        return load_tokenizer(vocab_path)
    directory = Path(model_dir)
    if not directory.is_dir():
        hub = "；它若是 hub 上的名字，请用 --vocab_path 给出词表" if is_hub_name(model_dir) else ""
        around = _suggest_model(directory.parent)
        raise UserError(f"找不到模型文件夹 {model_dir}{around}{hub}")
    _check_model_dir(directory)
    if not has_tokenizer(model_dir):
        raise UserError(
            f"{model_dir} 里没有 tokenizer.json 或 vocab.txt，无从知道模型的 token id 对应什么字；"
            "请用 --vocab_path 指定训练这个模型时的 vocab.txt"
        )
    return load_tokenizer(directory)


def check_same_vocab(model_dir: str, tokenizer: Tokenizer, vocab_path: Path, remedy: str) -> None:
    """确认 vocab_path 与模型自带的词表逐项相同；文件夹里没有（或读不出）词表时无从比较。

    Args:
        model_dir: 模型文件夹。
        tokenizer: 由 vocab_path 读入的。
        vocab_path: 用户指定的词表，供错误信息使用。
        remedy: 不同时怎样改的一句话。

    Raises:
        UserError: 两份词表不同。
    """
    try:
        own = load_tokenizer(Path(model_dir)) if has_tokenizer(model_dir) else tokenizer
    except UserError:
        return
    theirs, given = vocab_text(own).split("\n"), vocab_text(tokenizer).split("\n")
    if theirs == given:
        return
    pairs = itertools.zip_longest(theirs, given, fillvalue="")
    index = next(i for i, (a, b) in enumerate(pairs) if a != b)
    entries = [f"“{vocab[index]}”" if index < len(vocab) else "没有" for vocab in (theirs, given)]
    raise UserError(
        f"词表不同：模型 {model_dir} 自带的词表与 {vocab_path} 从第 {index + 1} 项起不同"
        f"（{entries[0]}与{entries[1]}），同一个 token id 会变成别的字；{remedy}"
    )


def save_checkpoint(
    directory: Path, model: GPT2LMHeadModel, tokenizer: Tokenizer, *, card: str = ""
) -> None:
    """写一个完整的模型文件夹，transformers、vLLM 等可以直接读；整个出现或不出现。

    Args:
        directory: 目标文件夹，已存在时被整个替换。
        model: 未包装的模型。
        tokenizer: 训练所用的 tokenizer。
        card: README.md 的内容，空的就不写。
    """
    from transformers import GenerationConfig

    generation_config = GenerationConfig(
        **token_id_fields(tokenizer),
        do_sample=True,
        top_k=8,
        max_new_tokens=25,
        suppress_tokens=unspeakable_ids(tokenizer),
    )
    model.config.n_ctx = model.config.n_positions  # 旧的工具读这个名字
    model.config.update(token_id_fields(tokenizer))  # 别处来的权重可以没有写，或写的是 GPT-2 的
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial)
        for weights in partial.glob("*.safetensors"):  # safetensors 写的文件别的用户读不了
            shutil.copymode(partial / "config.json", weights)
        generation_config.save_pretrained(partial)
        wrap_tokenizer(tokenizer, model.config.n_positions).save_pretrained(partial)
        (partial / "vocab.txt").write_text(vocab_text(tokenizer), encoding="utf-8", newline="\n")
        write_checksums(partial)  # 说明不算在内，用户可以随意改它
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8", newline="\n")


def _check_folder(directory: Path) -> None:
    """核对校验和；坏了的话，说出旁边还有哪些模型文件夹。"""
    try:
        check_folder(directory)
    except UserError as error:
        raise UserError(f"{error}{_list_checkpoints(directory.parent)}") from None


def _check_model_dir(directory: Path) -> None:
    """文件夹里要有 config.json 和权重。"""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} 不是模型文件夹：缺少 config.json{_suggest_model(directory)}")
    if not _has_weights(directory):
        raise UserError(f"{directory} 里没有权重：应有 {' 或 '.join(WEIGHT_FILES)}")


def _has_weights(directory: Path) -> bool:
    sharded = [f"{name}.index.json" for name in WEIGHT_FILES]
    return any((directory / name).is_file() for name in [*WEIGHT_FILES, *sharded])


def _suggest_model(parent: Path) -> str:
    """没有要找的模型时怎么办，供错误信息使用。"""
    return _list_checkpoints(parent) or "；请先用 python train.py 训练一个，或改正路径"


def _list_checkpoints(parent: Path) -> str:
    """写出附近完好的模型文件夹，新的在前，至多 MAX_LISTED 个；一个也没有时是空串。"""
    folders = {path.parent for name in WEIGHT_FILES for path in parent.glob(f"[!.]*/{name}*")}
    newest_first = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
    whole = itertools.islice(filter(_is_whole, newest_first), MAX_LISTED)
    names = "、".join(map(str, whole))
    return f"；完好的模型文件夹：{names}" if names else ""


def _is_whole(directory: Path) -> bool:
    """不必读懂权重就看得出的毛病一个也没有。"""
    try:
        _read_valid_config(directory)
        check_weight_files(directory)
        check_folder(directory)
        return _has_weights(directory)
    except (UserError, OSError):
        return False
