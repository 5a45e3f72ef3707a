"""分词器：由词表建立或从文件读入，文字与 token id 互换。

分词与 BERT 完全一致（小写、去掉重音、汉字逐个切开、WordPiece），只有一处不同：
文字里出现的 ``[SEP]`` 之类永远是普通文字，不会变成特殊 token。
本模块只依赖 tokenizers，不加载 torch 与 transformers。
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing

from chitchat.errors import UserError
from chitchat.files import parse_json
from chitchat.tokens.vocabulary import (
    CLS_TOKEN,
    REQUIRED_TOKENS,
    SEP_TOKEN,
    SPECIAL_TOKENS,
    UNK_TOKEN,
)

# 解码时仍要空格的地方：左边是外文字母、数字或收尾标点，右边是外文字母、数字或起始标点。
_WORD = r"[\p{L}\p{M}\p{Nd}&&[^\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}ー\uFF00-\uFFEF]]"
_DELETED_SPACES = (
    r'(?:\A|\G[^"]*")[^"]*"\K ',  # 左引号之后；\G 接着上一处往下找，引号因此两两成对
    r'(?:\A[^"]*|\G"[^"]*)"[^"]*?\K (?=")',  # 右引号之前
    r"(?<=[0-9] [.,:]) (?=[0-9])",  # 3.14、12:30
    r"(?<=[a-zA-Z] ') (?=(?:s|t|m|d|ll|re|ve|clock)(?![a-z]))",  # i'm、o'clock
    r"(?<=www \.) |(?<=[a-z0-9] \.) (?=(?:com|cn|net|org)(?![a-z]))",  # 网址
    rf"""(?<=[:;]) (?=\()|(?<![{_WORD},.!?:;)\]}}%'"&]) | (?![{_WORD}(\[{{$@#"&])""",
)


class SpecialIds(NamedTuple):
    """特殊 token 的 id，次序与 REQUIRED_TOKENS 相同。"""

    pad: int
    unk: int
    cls: int
    sep: int


def build_tokenizer(vocab: Sequence[str]) -> Tokenizer:
    """由词表建立分词器，切分结果与 transformers 的 ``BertTokenizerFast(vocab=...)`` 相同。

    不同之处：文字里的 ``[SEP]`` 等是普通文字；``decode`` 的结果读起来自然（``##`` 接好，
    汉字之间没有空格）。前者是运行时的开关，不写进 tokenizer.json；后者随 tokenizer.json 保存。

    Args:
        vocab: 词表，下标就是 token id；必须含全部 REQUIRED_TOKENS，且没有重复项。
    """
    ids = {token: token_id for token_id, token in enumerate(vocab)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token=UNK_TOKEN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS_TOKEN} $A {SEP_TOKEN}",
        pair=f"{CLS_TOKEN} $A {SEP_TOKEN} $B:1 {SEP_TOKEN}:1",
        special_tokens=[(CLS_TOKEN, ids[CLS_TOKEN]), (SEP_TOKEN, ids[SEP_TOKEN])],
    )
    return _prepare(tokenizer)


def _prepare(tokenizer: Tokenizer) -> Tokenizer:
    """装上自然的解码方式，关掉截断与补齐，并让特殊 token 的字面写法只是文字。"""
    present = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in present])
    deletions = [decoders.Replace(Regex(pattern), "") for pattern in _DELETED_SPACES]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r"\A##(?=\S)"), ""),  # 回复以词片开头
            *deletions,
        ]
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


MAX_VOCAB_BYTES = 256 << 20


def load_tokenizer(path: Path) -> Tokenizer:
    """读入分词器。

    Args:
        path: vocab.txt 文件；或一个文件夹，先找其中的 tokenizer.json，再找 vocab.txt。

    Raises:
        UserError: 路径不存在、文件夹里缺少文件、不是 UTF-8、JSON 损坏、缺特殊 token 或有重复项。
    """
    if not path.exists():
        raise UserError(f"找不到词表 {path}：请用 --vocab_path 指定 vocab.txt 或含有它的文件夹。")
    if path.is_dir():
        files = [path / "tokenizer.json", path / "vocab.txt"]
        found = [file for file in files if file.is_file()]
        if not found:
            raise UserError(
                f"文件夹 {path} 里没有 tokenizer.json，也没有 vocab.txt："
                "请把训练时用的 vocab.txt 放进去，或用 --vocab_path 指定它。"
            )
        path = found[0]
    text = _read_text(path)
    if path.suffix == ".json":
        return _parse_tokenizer_json(text, path)
    vocab = _split_lines(text)
    _check_special_tokens(vocab, path)
    first_lines: dict[str, int] = {}
    for line_number, token in enumerate(vocab, start=1):
        first = first_lines.setdefault(token, line_number)
        if first != line_number:
            raise UserError(
                f"词表 {path} 第 {line_number} 行的“{token}”与第 {first} 行重复："
                "每行应是一个不同的词，请删去或改掉其中一行。"
            )
    return build_tokenizer(vocab)


def read_vocab_lines(path: Path) -> list[str]:
    """读 vocab.txt，一行一项，不作检查。

    Raises:
        UserError: 文件不存在、读不出或不是 UTF-8。
    """
    return _split_lines(_read_text(path))


def _split_lines(text: str) -> list[str]:
    """只按 LF 分行：BERT 的中文词表里有 U+2028 这样的项，splitlines 会把它拆开。"""
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]


def _read_text(path: Path) -> str:
    """读 UTF-8 文件，去掉 BOM，不改动换行。"""
    if not path.is_file():  # 设备、管道没有尽头
        raise UserError(f"{path} 不是普通文件：请用 --vocab_path 指定 vocab.txt 或含有它的文件夹。")
    try:
        if path.stat().st_size > MAX_VOCAB_BYTES:
            raise UserError(
                f"{path} 有 {path.stat().st_size:,} 字节，不像词表：请用 --vocab_path 指定它。"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} 不是 UTF-8 编码（第 {error.start + 1} 个字节无法解读）：请另存为 UTF-8。"
        ) from error
    except OSError as error:
        raise UserError(f"无法读取 {path}（{error.strerror}）：请检查文件的权限。") from error


def _parse_tokenizer_json(text: str, path: Path) -> Tokenizer:
    """由 tokenizer.json 的内容建立分词器。"""
    hint = "请换一份完整的文件，或删去它并在同一文件夹放入 vocab.txt。"
    try:
        parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} 不是完整的 JSON（{error}）：{hint}") from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers 只抛这一种
        raise UserError(f"{path} 不是 tokenizers 的分词器文件（{error}）：{hint}") from error
    _check_special_tokens(tokenizer.get_vocab(), path)
    return _prepare(tokenizer)


def _check_special_tokens(vocab: Iterable[str], path: Path) -> None:
    present = set(vocab)
    missing = [token for token in REQUIRED_TOKENS if token not in present]
    if missing:
        raise UserError(
            f"词表 {path} 缺少特殊 token {'、'.join(missing)}："
            "请改用 BERT 格式的词表，例如本项目的 vocab/vocab.txt。"
        )


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """查出四个必需的特殊 token 的 id。"""
    return SpecialIds(*map(tokenizer.token_to_id, REQUIRED_TOKENS))


def unspeakable_ids(tokenizer: Tokenizer) -> list[int]:
    """从不生成的 token 的 id，升序：[SEP] 之外的特殊 token 和 [unused…]。"""
    ids = tokenizer.get_vocab()
    never = {*SPECIAL_TOKENS} - {SEP_TOKEN}
    return sorted(i for token, i in ids.items() if token in never or token.startswith("[unused"))


def vocab_text(tokenizer: Tokenizer) -> str:
    """vocab.txt 的内容：按 id 排列，每行一项，末尾有换行。"""
    ids = tokenizer.get_vocab()
    return "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__))


def vocab_fingerprint(tokenizer: Tokenizer) -> str:
    """词表的 SHA-256；训练数据的说明里记着它。"""
    return hashlib.sha256(vocab_text(tokenizer).encode()).hexdigest()


def encode_utterances(tokenizer: Tokenizer, utterances: Sequence[str]) -> list[list[int]]:
    """成批编码；每条文字得到一个 id 列表，不加 [CLS] 与 [SEP]，空文字得到空列表。"""
    encodings = tokenizer.encode_batch_fast(list(utterances), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_dialogues(
    tokenizer: Tokenizer, dialogues: Sequence[Sequence[str]]
) -> Iterator[list[list[int]]]:
    """成批编码，逐段给出各句的 id 列表；同 encode_utterances。"""
    encoded = iter(encode_utterances(tokenizer, [u for d in dialogues for u in d]))
    for dialogue in dialogues:
        yield list(itertools.islice(encoded, len(dialogue)))


def decode_response(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """把 id 变回可读的文字，略去特殊 token。

    除了结尾的外文词可能被后续的 ``##`` 词片接长，前缀的解码结果总是整体的前缀，可以边生成边显示。
    """
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)
