"""测试共用的零件：离线、每个测试固定种子，以及几十个词的词表和两层的模型。"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from chitchat.tokens.tokenizer import load_tokenizer

# 在后台启动的（&、nohup）不理会 Ctrl+C，各脚本也跟着不理会；测试要它理会
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # 几十个数的模型，多线程只会互相等待

ROOT = Path(__file__).resolve().parent.parent
UNUSED = [f"[unused{i}]" for i in range(1, 100)]
WORDS = [
    *"，。？！…,.?!'",
    *"你好吗我很早上晚安再见吃饭了天气真不错是谁小柚在",
    *"abcdefghijklmnopqrstuvwxyz0123456789",
    *(f"##{char}" for char in "abcdefghijklmnopqrstuvwxyz0123456789😂"),
    *["hello", "😂"],
]
TINY_VOCAB = ["[PAD]", *UNUSED, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """不许联网，固定种子，在临时文件夹里运行：写到默认路径的文件不会落进仓库。"""

    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        is_local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not is_local:
            raise OSError("tests must not use the network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def vocab_path(tmp_path: Path) -> Path:
    """小词表，与真词表的布局相同。"""
    path = tmp_path / "tiny_vocab.txt"
    path.write_text("\n".join(TINY_VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(vocab_path: Path) -> Tokenizer:
    """小词表的 tokenizer。"""
    return load_tokenizer(vocab_path)


TINY_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": len(TINY_VOCAB),
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "pad_token_id": 0,
}


@pytest.fixture
def make_model():
    """建立两层 16 维、没有 dropout 的模型；关键字参数覆盖 GPT2Config 的字段。"""

    def make(**fields: object) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**{**TINY_CONFIG, **fields}))

    return make


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """小模型的 config.json。"""
    path = tmp_path / "tiny_config.json"
    path.write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
    return path


@pytest.fixture
def make_bigram_model(make_model, tokenizer):
    """建立只看上一个 token 的模型，每个 token 的下一个由测试指定，因此可以手算。

    词向量是 one-hot，各层什么也不加，输出层就是转移表；没有指定的 logits 接近 0。
    """

    def make(next_logits: dict[str, dict[str, float]], **fields: object) -> GPT2LMHeadModel:
        width = len(TINY_VOCAB) + len(TINY_VOCAB) % 2
        model = make_model(n_embd=width, n_layer=1, tie_word_embeddings=False, **fields)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "ln_" not in name:
                    param.zero_()
            model.transformer.wte.weight[:, : len(TINY_VOCAB)] = torch.eye(len(TINY_VOCAB))
            peak = torch.nn.functional.layer_norm(torch.eye(1, width), (width,)).max()
            for token, logits in next_logits.items():
                for next_token, logit in logits.items():
                    row, column = map(tokenizer.token_to_id, (next_token, token))
                    model.lm_head.weight[row, column] = logit / peak
        return model.eval()

    return make


@pytest.fixture
def make_parrot(make_bigram_model):
    """建立总是回同一句话的模型；各字互不相同。"""

    def make(reply: str, **fields: object) -> GPT2LMHeadModel:
        chain = ["[SEP]", *reply, "[SEP]"]
        pairs = itertools.pairwise(chain)
        return make_bigram_model({token: {after: 80.0} for token, after in pairs}, **fields)

    return make
