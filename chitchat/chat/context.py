"""历史 → 上下文的 token，回复的 token → 文字。"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from chitchat.tokens.tokenizer import SpecialIds, decode_response, encode_utterances

CHARS_PER_TOKEN = 8  # 一个 token 平均不会比这更长：英文连空格五六个字，汉字一个


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
    utterances: list[list[int]] = []
    size = 1
    is_truncated = False
    for utterance in reversed(history[-max_history_len:]):
        size += len(utterance) + 1
        if utterances and size > max_tokens:
            is_truncated = True
            break
        utterances.insert(0, list(utterance))
    room = max_tokens - 2
    if len(utterances) == 1 and len(utterances[0]) > room:
        utterances[0] = utterances[0][-room:]
        is_truncated = True
    context = [ids.cls]
    for utterance in utterances:
        context += [*utterance, ids.sep]
    return context, is_truncated


def encode_recent(
    tokenizer: Tokenizer, utterances: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """编码最近的几句，够 max_tokens 个 token 就不再往前；很长的句子只编码它的末尾。

    上下文与全部编码的相同，只有平均一个 token 超过 CHARS_PER_TOKEN 个字（例如大片空白）时会短些：
    几兆字节的话因此也只花几十毫秒。

    Args:
        tokenizer: 分词器。
        utterances: 各句，最新的在最后。
        max_tokens: 上下文最多的 token 数。
    """
    encoded: list[list[int]] = []
    room = max_tokens
    for text in reversed(utterances):
        if room <= 0:
            break
        encoded += encode_utterances(tokenizer, [text[-CHARS_PER_TOKEN * max_tokens :]])
        room -= len(encoded[-1]) + 1
    return encoded[::-1]


class TextStream:
    """逐个收下回复的 token，给出新确定的文字。

    末尾的拉丁词还可能接上 ``##`` 片段，它前面的空格也可能被去掉（``3. 1`` → ``3.14``），
    所以连同空格等它写完再交出，其余的立刻交出。
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._num_given = 0

    def put(self, token_id: int) -> str:
        """收下一个新的 token，给出新确定的文字，可能是空的。"""
        self._token_ids.append(token_id)
        settled = decode_response(self._tokenizer, self._token_ids)
        while settled and settled[-1].isascii() and settled[-1].isalnum():
            settled = settled[:-1]
        return self._take(settled.rstrip(" "))

    def end(self) -> str:
        """不再有 token：给出末尾剩下的文字，可能是空的。"""
        return self._take(decode_response(self._tokenizer, self._token_ids))

    def _take(self, text: str) -> str:
        piece = text[self._num_given :]
        self._num_given = max(self._num_given, len(text))
        return piece
