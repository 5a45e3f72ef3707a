"""由语料学一份 WordPiece 词表。"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece

from chitchat.errors import UserError
from chitchat.files import atomic_file
from chitchat.tokens.vocabulary import (
    CLS_TOKEN,
    MASK_TOKEN,
    NUM_UNUSED,
    PAD_TOKEN,
    SEP_TOKEN,
    SPECIAL_TOKENS,
    UNK_TOKEN,
)

_UNUSED = [f"[unused{number}]" for number in range(1, NUM_UNUSED + 1)]
# 总是保留：特殊 token（id 与默认词表相同）、ASCII 字符，以及拼出任何英文词和数的词片。
KEPT_TOKENS = (
    *(PAD_TOKEN, *_UNUSED, UNK_TOKEN, CLS_TOKEN, SEP_TOKEN, MASK_TOKEN),
    *(chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()),
    *(f"##{char}" for char in string.ascii_lowercase + string.digits),
)


def learn_vocab(utterances: Iterable[str], size: int) -> list[str]:
    """由语料学一份词表，下标就是 token id。

    先是 KEPT_TOKENS，再按 tokenizers 的 WordPiece 训练给出的次序补满：先字、后词片。

    Args:
        utterances: 语料的各句，只读一遍。
        size: 词表的项数，语料太小时会少一些。
    """
    learner = Tokenizer(WordPiece(unk_token=UNK_TOKEN))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = [token for token in KEPT_TOKENS if len(token) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=2 * size,
        initial_alphabet=letters,  # 总在字母表里，占去的名额因此要补上
        limit_alphabet=size - len(KEPT_TOKENS) + len(letters),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    learner.train_from_iterator(utterances, trainer)
    ids = learner.get_vocab()
    return list(dict.fromkeys([*KEPT_TOKENS, *sorted(ids, key=ids.__getitem__)]))[:size]


def check_new_vocab(path: Path) -> None:
    """确认要写的词表还不存在：不换掉已有的词表，随项目来的那份尤其不能换。"""
    if path.exists():
        raise UserError(
            f"--vocab_path {path} 已经存在，没有改写：请用 --vocab_path 指定一个新文件"
            "（如 vocab/my_vocab.txt），确实不要旧的就先删去它"
        )


def save_vocab(path: Path, vocab: Iterable[str]) -> None:
    """写 vocab.txt，一行一项，整个出现或不出现。"""
    with atomic_file(path) as partial:
        partial.write_bytes("".join(f"{token}\n" for token in vocab).encode())
