"""训练途中的示例回复：用现在的权重回答几段对话的第一句。"""

from __future__ import annotations

import itertools
import random
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
    bot, rng = Chatbot(engine, tokenizer), random.Random(0)
    room = model.config.n_positions // 2
    options = SamplingOptions(max_len=max(1, min(SamplingOptions.max_len, room)))
    lines = []
    for dialogue in dialogues:
        opening = list(itertools.takewhile(lambda token: token != bot.ids.sep, dialogue[1:]))
        reply = "".join(bot.reply([opening], options, rng))
        lines += [decode_response(tokenizer, opening), f"→ {reply}"]
    return "\n\n".join(f"- {line}" for line in lines)
