"""模型结构：由 config.json 建立随机初始化的模型，确认它与词表相配。

transformers 用到时才导入：对话只需要这里的检查，不必等它。
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from chitchat.errors import UserError
from chitchat.files import parse_json
from chitchat.tokens.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

logger = logging.getLogger(__name__)


def build_model(
    config_path: Path, tokenizer: Tokenizer, *, follow_vocab: bool = False
) -> GPT2LMHeadModel:
    """按 config.json 建立随机初始化的模型。

    Args:
        config_path: GPT-2 结构的 json 文件，字段与 GPT2Config 相同。
        tokenizer: 训练所用的 tokenizer。
        follow_vocab: True 时 vocab_size 取词表的大小，否则 config 里的必须与它一致。

    Raises:
        UserError: 文件不存在、不是 json、字段不合法，或词表大小不一致。
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    advice = "可参照 model/config.json"
    try:
        fields = parse_json(config_path.read_text(encoding="utf-8"))
        fields.update(token_id_fields(tokenizer))
    except FileNotFoundError:
        raise UserError(f"找不到模型结构 {config_path}：请用 --model_config 指定") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config_path} 不是合法的 GPT-2 结构：{error}；{advice}") from error
    if fields.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{config_path} 是 {fields['model_type']} 的结构，不是 GPT-2；{advice}")
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        value = fields.get(name, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"{config_path} 的 {name} 应为正整数，得到 {value!r}；{advice}")
    try:
        config = GPT2Config(**fields)
        if follow_vocab and config.vocab_size != tokenizer.get_vocab_size():
            logger.info("vocab_size=%d from the vocabulary", tokenizer.get_vocab_size())
            config.vocab_size = tokenizer.get_vocab_size()
        found, wanted = tokenizer.get_vocab_size(), config.vocab_size
        remedy = f"请把它改成 {found}，或用 --vocab_path 指定有 {wanted} 个词的词表"
        check_vocab_size(wanted, tokenizer, config_path, remedy)
        return zero_projections(GPT2LMHeadModel(config))
    except UserError:
        raise
    except Exception as error:  # transformers 校验字段时抛出的异常各种各样
        raise UserError(f"{config_path} 建不成模型：{error}；{advice}") from error


def zero_projections(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """注意力和 MLP 的最后一次投影从零开始：开始时各层什么也不改，信号和梯度直通到底。

    同样的更新次数，验证 loss 低 0.00 到 0.04（tests/benchmarks/README.md），Muon 和 AdamW 都是；
    来源: arXiv:1901.09321 §3；Muon 的作者训练 GPT-2 时也这样。
    """
    for block in model.transformer.h:
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            linear.weight.data.zero_()
    return model


def check_vocab_size(
    vocab_size: int,
    tokenizer: Tokenizer,
    source: Path | str,
    remedy: str = "请用 --vocab_path 指定训练时的词表",
) -> None:
    """确认模型与词表一样大，否则说明两者各是多少、怎样改。"""
    found = tokenizer.get_vocab_size()
    if vocab_size != found:
        raise UserError(
            f"词表大小不一致：{source} 的 vocab_size 是 {vocab_size}，词表有 {found} 个词；{remedy}"
        )


def token_id_fields(tokenizer: Tokenizer) -> dict[str, int]:
    """config.json 与 generation_config.json 里特殊 token 的 id。"""
    ids = special_ids(tokenizer)
    return {"bos_token_id": ids.cls, "eos_token_id": ids.sep, "pad_token_id": ids.pad}
