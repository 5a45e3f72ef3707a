"""对话：由历史组成上下文，采样出回复，边生成边显示。

形状记号: B 批大小   T 已有的 token 数   V 词表大小
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from chitchat.runtime import UserError
from chitchat.tokenizer import SpecialIds, decode_response, special_ids, unspeakable_ids


@dataclass(frozen=True)
class SamplingOptions:
    """采样的旋钮，名字与命令行参数的含义相同。

    Attributes:
        temperature: 大于 0；1 为原样，越小越保守。
        top_k: 只从概率最高的这么多个 token 中采样；0 表示不限。
        top_p: 只从累计概率达到它的最可能的 token 中采样；0 表示不限。
        repetition_penalty: 大于 0；1 表示不惩罚，只看本轮回复已生成的 token。
        max_len: 回复最多的 token 数。
        max_history_len: 上下文里最多的历史句数，双方合计。
    """

    temperature: float = 1.0
    top_k: int = 8
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    max_len: int = 25
    max_history_len: int = 3


def build_context(
    history: Sequence[Sequence[int]], *, ids: SpecialIds, max_history_len: int, max_tokens: int
) -> tuple[list[int], bool]:
    """组成上下文：[CLS] 加上最近的若干句，每句后接 [SEP]。

    放不下时先去掉最早的句子，只剩一句还放不下就去掉它左边的部分。

    Args:
        history: 到目前为止每句的 token id，最新的在最后，至少一句。
        ids: 特殊 token 的 id。
        max_history_len: 最多用最近的几句，双方合计，至少 1。
        max_tokens: 上下文最多的 token 数，至少 3。

    Returns:
        上下文的 token id，以及是否因为放不下而截去了一部分。
    """
    utterances = [list(utterance) for utterance in history[-max_history_len:]]
    is_truncated = False
    while len(utterances) > 1 and 1 + sum(len(u) + 1 for u in utterances) > max_tokens:
        del utterances[0]
        is_truncated = True
    room = max_tokens - 2
    if len(utterances) == 1 and len(utterances[0]) > room:
        utterances[0] = utterances[0][-room:]
        is_truncated = True
    context = [ids.cls]
    for utterance in utterances:
        context += [*utterance, ids.sep]
    return context, is_truncated


def build_logits_processors(
    options: SamplingOptions, *, context_len: int, eos_id: int, forbidden_ids: Sequence[int]
) -> LogitsProcessorList:
    """按固定次序组成 transformers 的处理器：禁用 → 重复惩罚 → temperature → top-k → top-p。

    Args:
        options: 采样的旋钮。
        context_len: 上下文的 token 数；重复惩罚不看这一段。
        eos_id: [SEP] 的 id；回复的第一个 token 不能是它，所以回复不会为空。
        forbidden_ids: 从不生成的 token。
    """
    processors = LogitsProcessorList(
        [
            SuppressTokensLogitsProcessor(list(forbidden_ids)),
            MinNewTokensLengthLogitsProcessor(context_len, 1, eos_id),
        ]
    )
    if options.repetition_penalty != 1:
        processors.append(
            RepetitionPenaltyLogitsProcessor(
                options.repetition_penalty, prompt_ignore_length=context_len
            )
        )
    if options.temperature != 1:
        processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k > 0:
        processors.append(TopKLogitsWarper(options.top_k))
    if 0 < options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    return processors


class ResponseStreamer(BaseStreamer):
    """``generate`` 每给出一个 token 就把新确定的文字交给 write。

    末尾的拉丁词还可能接上 ``##`` 片段，等它写完再交出，其余的立刻交出。
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._token_ids: list[int] = []
        self._num_written = 0
        self._is_context = True

    def put(self, value: torch.Tensor) -> None:
        """收下新的 token；第一次收到的是上下文，不显示。"""
        if self._is_context:
            self._is_context = False
            return
        self._token_ids += value.tolist()
        text = decode_response(self._tokenizer, self._token_ids)
        settled = text
        while settled and settled[-1].isascii() and settled[-1].isalnum():
            settled = settled[:-1]
        self._emit(settled)

    def end(self) -> None:
        """把末尾剩下的文字交出。"""
        self._emit(decode_response(self._tokenizer, self._token_ids))

    def _emit(self, text: str) -> None:
        if len(text) > self._num_written:
            self._write(text[self._num_written :])
            self._num_written = len(text)


class Chatbot:
    """模型加 tokenizer：给它历史，它给出下一句。"""

    def __init__(self, model: GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
        """准备生成；model 应已放到设备上。"""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.ids = special_ids(tokenizer)
        self.forbidden_ids = unspeakable_ids(tokenizer)

    @property
    def max_positions(self) -> int:
        """上下文加回复最多的 token 数。"""
        return self.model.config.n_positions

    def check_options(self, options: SamplingOptions) -> None:
        """确认回复之外至少还放得下 [CLS]、一个 token 和 [SEP]，否则给出怎样改的一句话。"""
        most = self.max_positions - 3
        if options.max_len > most:
            raise UserError(
                f"max_len {options.max_len} 太大：模型只有 {self.max_positions} 个位置，"
                f"回复最多 {most} 个 token"
            )

    @torch.inference_mode()
    def reply(
        self,
        history: Sequence[Sequence[int]],
        options: SamplingOptions,
        write: Callable[[str], None] = lambda text: None,
    ) -> tuple[list[int], bool]:
        """生成一句回复。

        Args:
            history: 每句的 token id，最后一句是用户刚说的。
            options: 采样的旋钮。
            write: 每有新确定的文字就被调用；各次的文字连起来就是整句回复。

        Returns:
            回复的 token id（不含 [SEP]，至少一个），以及上下文是否放不下而被截短。
        """
        context, is_truncated = build_context(
            history,
            ids=self.ids,
            max_history_len=options.max_history_len,
            max_tokens=self.max_positions - options.max_len,
        )
        input_ids = torch.tensor([context], device=self.model.device)  # (1, T)
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(
                max_new_tokens=options.max_len,
                do_sample=True,
                top_k=0,
                eos_token_id=self.ids.sep,
                pad_token_id=self.ids.pad,
            ),
            logits_processor=build_logits_processors(
                options,
                context_len=len(context),
                eos_id=self.ids.sep,
                forbidden_ids=self.forbidden_ids,
            ),
            streamer=ResponseStreamer(self.tokenizer, write),
        )
        response = output[0, len(context) :].tolist()
        if response[-1] == self.ids.sep:
            del response[-1]
        return response, is_truncated
