"""整批编码：与 BertTokenizerFast 逐句编码的 id 完全相同；写出的 pickle 与 pickle 模块写的等价。"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from chitchat.errors import UserError
from chitchat.tokens.batch_encoder import DialogueEncoder, EncodedBatch
from chitchat.tokens.token_writer import pickle_rows
from chitchat.tokens.tokenizer import load_tokenizer

VOCAB_PATH = ROOT / "vocab" / "vocab.txt"
ENCODER = DialogueEncoder(load_tokenizer(VOCAB_PATH))
VOCAB = VOCAB_PATH.read_text(encoding="utf-8").split("\n")[:-1]
BERT = BertTokenizerFast(vocab={token: i for i, token in enumerate(VOCAB)}, do_lower_case=True)
BERT.backend_tokenizer.encode_special_tokens = True

TRICKY = (
    "a1好，。 \t\n\r\0\x85\u200b\u200d\u3000\ufeff\u0301\u0327\u0344가ㄱ豈ﬁﬀİßσςΣ"  # noqa: RUF001
    "…—“”[]#é≠😂👩🏽か゛ガ\u2028"
)
CHARS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(TRICKY))
TEXTS = st.one_of(
    st.text(CHARS, max_size=30),
    st.text(st.sampled_from(TRICKY), max_size=30),
    st.lists(st.sampled_from(["[SEP]", "[CLS]", "##", "hello", "你好", "e\u0301", "x" * 120, " "]))
    .map("".join),
)  # fmt: skip


def expected_rows(dialogues: list[list[str]]) -> list[list[int]]:
    rows = []
    for dialogue in dialogues:
        rows.append([101])
        for text in dialogue:
            rows[-1] += [*BERT.backend_tokenizer.encode(text, add_special_tokens=False).ids, 102]
    return rows


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=5))
def test_ids_equal_those_of_bert_tokenizer_fast(dialogues):
    assert ENCODER.encode(dialogues).rows() == expected_rows(dialogues)


def test_every_character_of_the_basic_plane_between_letters_and_hanzi():
    chars = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    dialogues = [[f"a{char}b{char}好{char}{char}1"] for char in chars[::3]]
    assert ENCODER.encode(dialogues).rows() == expected_rows(dialogues)


def test_huge_line():
    dialogues = [["好a1，" * 50_000, "x" * 200_000]]
    assert ENCODER.encode(dialogues).rows() == expected_rows(dialogues)


def test_lone_surrogate_is_refused():
    with pytest.raises(UserError, match=r"U\+D800"):
        ENCODER.encode([["你好\ud800"]])


@given(
    st.lists(st.lists(st.sampled_from([0, 255, 256, 65535, 65536, 2**31 - 1]), min_size=1)),
)
def test_written_opcodes_are_a_pickle_of_the_rows(rows):
    batch = EncodedBatch(
        np.array([token for row in rows for token in row], np.int32),
        np.array([len(row) for row in rows], np.int64),
    )
    content = b"\x80\x04]" + pickle_rows(batch) + pickle_rows(batch) + b"."
    assert pickle.loads(content) == rows * 2
