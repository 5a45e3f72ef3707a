"""训练途中的示例回复：用现在的权重回答几段对话的第一句。"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import Engine
from chitchat.chat.options import SamplingOptions
from chitchat.tokens.tokenizer import decode_response


def sample_replies(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, dialogues: Sequence[Sequence[int]]
) -> str:
    """用现在的模型回答每段对话的第一句，写成 Markdown；不动用全局随机数。"""
    engine = Engine(model.config.to_dict(), model.state_dict(), device=model.device)
    bot = Chatbot(engine, tokenizer, seed=0)
    room = model.config.n_positions // 2
    options = SamplingOptions(max_len=max(1, min(SamplingOptions.max_len, room)))
    lines = []
    for dialogue in dialogues:
        opening = list(itertools.takewhile(lambda token: token != bot.ids.sep, dialogue[1:]))
        reply, _ = bot.reply([opening], options)
        lines += [decode_response(tokenizer, opening), f"→ {decode_response(tokenizer, reply)}"]
    return "\n\n".join(f"- {line}" for line in lines)
