"""整批编码：对话变成 token id，与 tokenizers 逐条编码的结果完全相同，但快得多。

BERT 的切分里，汉字、标点和空白总是自成一段，与左右无关，所以每个这样的字符的 id 只需问一次
tokenizers，之后整批查表；其余字符（外文、数字、emoji……）的连续片段整个交给 tokenizers，结果记下来。

形状记号: C 一批的字符数   D 一批的对话数   N 一批的 token 数
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from chitchat.errors import UserError
from chitchat.tokens.tokenizer import encode_dialogues, encode_utterances, special_ids

MAX_CACHED_WORDS = 200_000
DIALOGUE_START, UTTERANCE_END = "\0", "\n"  # 整批文字里的记号，查表得 [CLS] 与 [SEP]

# 字符表里小于 0 的值
SKIPPED = -1  # 空白：隔开左右，自己没有 token
IN_WORD = -2  # 与左右相邻的同类字符连成片段
UNSEEN = -3  # 还没有问过 tokenizers


class EncodedBatch(NamedTuple):
    """一批编码好的对话，首尾相接。"""

    tokens: np.ndarray  # (N,)，int32；每段 [CLS] u1 [SEP] u2 [SEP] …
    lengths: np.ndarray  # (D,)，int64，每段的 token 数

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> EncodedBatch:
        """由每段的 token id 建立。"""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = itertools.chain.from_iterable(rows)
        return cls(np.fromiter(flat, np.int32, lengths.sum()), lengths)

    def rows(self) -> list[list[int]]:
        """每段的 token id。"""
        tokens = iter(self.tokens.tolist())
        return [list(itertools.islice(tokens, length)) for length in self.lengths.tolist()]


class DialogueEncoder:
    """把对话整批变成 token id。"""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = special_ids(tokenizer)
        self._words: dict[str, list[int]] = {}
        self._char_ids = np.full(0x110000, UNSEEN, dtype=np.int32)
        self._char_ids[ord(DIALOGUE_START)] = self._ids.cls
        self._char_ids[ord(UTTERANCE_END)] = self._ids.sep
        added = tokenizer.get_added_tokens_decoder().values()
        self._is_bert = (
            isinstance(tokenizer.model, WordPiece)
            and isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and all(token.special for token in added)
        )

    def encode(self, dialogues: Sequence[Sequence[str]]) -> EncodedBatch:
        r"""编码一批对话；不修改入参。

        Raises:
            UserError: 文字里有不成对的 surrogate（只可能来自 JSON 的 ``\ud800`` 一类写法）。
        """
        text = "".join(f"\0{UTTERANCE_END.join(d)}\n" for d in dialogues)
        num_utterances = sum(map(len, dialogues))
        if text.count("\0") != len(dialogues) or text.count("\n") != num_utterances:
            # 句子里的记号：BERT 本来就删去 NUL，把换行当空格。
            dialogues = [[u.replace("\0", "").replace("\n", " ") for u in d] for d in dialogues]
            text = "".join(f"\0{UTTERANCE_END.join(d)}\n" for d in dialogues)
        try:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)  # (C,)
        except UnicodeEncodeError as error:
            excerpt = text[max(0, error.start - 10) : error.start].strip("\0\n")
            raise UserError(
                f"语料里“{excerpt}”之后有不成对的 surrogate U+{ord(text[error.start]):04X}，"
                "不是合法的文字：请删去或改正这个字符"
            ) from error
        if not self._is_bert:
            return self._encode_with_library(dialogues)
        return self._encode_codes(text, codes)

    def _encode_codes(self, text: str, codes: np.ndarray) -> EncodedBatch:
        """查表得到孤立字符的 id，片段查字典，再按次序拼好。"""
        ids = self._char_ids[codes]  # (C,)
        if (unseen := ids == UNSEEN).any():
            self._learn_chars(np.unique(codes[unseen]))
            ids = self._char_ids[codes]
        in_word = np.concatenate([[False], ids == IN_WORD, [False]])
        edges = np.flatnonzero(in_word[1:] != in_word[:-1])
        starts, ends = edges[::2], edges[1::2]
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        pieces = self._lookup([text[start:end] for start, end in spans])
        counts = (ids >= 0).astype(np.int64)  # 每个位置产生几个 token
        counts[starts] = [len(piece) for piece in pieces]
        first = np.cumsum(counts) - counts  # 每个位置的第一个 token 在结果里的下标
        tokens = np.empty(int(counts.sum()), dtype=np.int32)
        is_char = ids >= 0
        tokens[first[is_char]] = ids[is_char]
        num_pieces = counts[starts]
        offsets = np.arange(num_pieces.sum()) - np.repeat(
            np.cumsum(num_pieces) - num_pieces, num_pieces
        )
        flat = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, len(offsets))
        tokens[np.repeat(first[starts], num_pieces) + offsets] = flat
        dialogue_starts = first[codes == ord(DIALOGUE_START)]
        return EncodedBatch(tokens, np.diff(dialogue_starts, append=len(tokens)))

    def _learn_chars(self, codes: np.ndarray) -> None:
        """向 tokenizers 问这些字符的 id，夹在两个字母之间仍自成一段的才算孤立。"""
        chars = [chr(code) for code in codes.tolist()]
        alone = encode_utterances(self._tokenizer, chars)
        between = encode_utterances(self._tokenizer, [f"a{char}a" for char in chars])
        letter = encode_utterances(self._tokenizer, ["a"])[0]
        for code, ids, sandwich in zip(codes.tolist(), alone, between, strict=True):
            is_isolated = len(ids) <= 1 and sandwich == [*letter, *ids, *letter]
            self._char_ids[code] = (ids[0] if ids else SKIPPED) if is_isolated else IN_WORD

    def _lookup(self, words: list[str]) -> list[list[int]]:
        """各片段的 token id；没见过的成批交给 tokenizers。"""
        if len(self._words) > MAX_CACHED_WORDS:
            self._words.clear()
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        self._words.update(zip(new, encode_utterances(self._tokenizer, new), strict=True))
        return [self._words[word] for word in words]

    def _encode_with_library(self, dialogues: Sequence[Sequence[str]]) -> EncodedBatch:
        """逐句交给 tokenizers：用于切分规则不是 BERT 的 tokenizer.json。"""
        return EncodedBatch.from_rows(
            [
                [self._ids.cls, *(i for utterance in dialogue for i in (*utterance, self._ids.sep))]
                for dialogue in encode_dialogues(self._tokenizer, dialogues)
            ]
        )
