"""检查点里的 tokenizer：包成 transformers 的，带上聊天模板，别的工具直接可用。"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from chitchat.tokens.vocabulary import (
    CLS_TOKEN,
    MASK_TOKEN,
    PAD_TOKEN,
    SEP_TOKEN,
    SPECIAL_TOKENS,
    UNK_TOKEN,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# 把 messages 写成 [CLS]u1[SEP]u2[SEP]。消息里的 [SEP] 之类拆成“[ sep ]”，
# 与训练时把它当普通文字的编码逐个 id 相同，用户因此不能伪造特殊 token。
CHAT_TEMPLATE = (
    CLS_TOKEN
    + "{% for message in messages %}{{ message['content']"
    + "".join(f" | replace('{token}', '[ {token[1:-1].lower()} ]')" for token in SPECIAL_TOKENS)
    + " }}"
    + SEP_TOKEN
    + "{% endfor %}"
)


def wrap_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """包成 transformers 的 tokenizer，带上聊天模板；不修改入参。

    Args:
        tokenizer: chitchat.tokens.vocabulary 建立的 tokenizer。
        max_length: 模型的位置数。
    """
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(tokenizer)
    backend.encode_special_tokens = False  # 模板里的 [CLS]、[SEP] 要认作特殊 token
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        cls_token=CLS_TOKEN,
        sep_token=SEP_TOKEN,
        mask_token=MASK_TOKEN if tokenizer.token_to_id(MASK_TOKEN) is not None else None,
        bos_token=CLS_TOKEN,
        eos_token=SEP_TOKEN,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],  # GPT-2 会误用 token_type_ids
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
