"""词表与分词器：与 transformers 的 BERT 分词器逐个 id 比较，并检查解码与报错。"""

# ruff: noqa: RUF001  相近的字符正是这里要测的

import random
import string
import unicodedata
from pathlib import Path

import pytest

from chitchat.errors import UserError
from chitchat.tokens.tokenizer import (
    build_tokenizer,
    decode_response,
    encode_utterances,
    load_tokenizer,
    special_ids,
    vocab_text,
)
from chitchat.tokens.vocabulary import (
    ENGLISH_PATH,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    derive_reference_vocab,
    generate_vocab,
)

VOCAB_PATH = Path(__file__).resolve().parents[2] / "vocab" / "vocab.txt"
UNK_ID = 100

TEXTS = [
    "你好，今天天气怎么样？",
    "Hello World! I'm fine, thanks.",
    "哈哈😂😂😂，👨\u200d👩\u200d👧 ❤\ufe0f 👍🏻 🇨🇳 1\ufe0f⃣",
    "ＡＢＣ１２３～￥％……——“引号”‘单’《书》【注】",
    "café naïve ÜBER ß Ωμέγα Привет",
    "がぎぐげご パピプペポ ｶﾞ ヴ",
    "한국어 ㅋㅋㅋ ไทย العربية",
    "line\nbreak\ttab\r\n\u3000全角 \u00a0\u200b\u2028\x85\x00\ufffd\ufeff",
    "𠮷野家 龘 囧 ﾟДﾟ ≠ ㊙ ① Ⅳ",
    "a" * 100 + " " + "a" * 101 + " " + "9" * 150,
    "## ##ing [unused1] [ PAD ]",
    "",
    "   ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(VOCAB_PATH)


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    return transformers.BertTokenizerFast(vocab=str(VOCAB_PATH))


def encode(tokenizer, text):
    return encode_utterances(tokenizer, [text])[0]


def random_texts(count):
    """一半是常用字符区，一半是任意 Unicode；种子固定。"""
    rng = random.Random(7)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x4FF), (0x2000, 0x2BFF), (0x3000, 0x30FF)]
    ranges += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFFEF), (0x1F000, 0x1FAFF)]
    for number in range(count):
        low, high = rng.choice(ranges) if number % 2 else (0, 0x10FFFF)
        codes = [rng.randint(low, high) for _ in range(rng.randint(1, 30))]
        yield "".join(chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF)


def test_committed_file_is_exactly_what_the_generator_makes():
    assert VOCAB_PATH.read_bytes() == "".join(f"{token}\n" for token in generate_vocab()).encode()


def test_size_ids_and_distinct_entries():
    entries = generate_vocab()
    assert len(entries) == len(set(entries)) == VOCAB_SIZE == 13317
    assert entries[0] == "[PAD]"
    assert entries[1:100] == [f"[unused{number}]" for number in range(1, 100)]
    assert entries[100:104] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert all(entry and entry == entry.strip() for entry in entries)


def test_english_list_is_long_enough_and_none_but_ascii():
    words = ENGLISH_PATH.read_text(encoding="utf-8").split()
    assert len(words) == len(set(words))
    assert all(set(word.removeprefix("##")) <= set(string.ascii_lowercase) for word in words)
    assert generate_vocab()[-1] in words[1000:]


def test_vocabulary_covers_the_two_character_standards():
    entries = set(generate_vocab())
    hanzi = [chr(code) for code in range(0x4E00, 0xA000)]
    gb2312 = {char for char in hanzi if char.encode("gb2312", "ignore")}
    big5_frequent = {
        char for char in hanzi if b"\xa4\x40" <= char.encode("big5", "ignore") < b"\xc6\x7f"
    }
    assert (len(gb2312), len(big5_frequent)) == (6763, 5401)
    assert gb2312 | big5_frequent <= entries


def test_every_entry_can_be_produced_by_some_text(tokenizer):
    for token_id, entry in enumerate(generate_vocab()[104:], start=104):
        if len(entry) == 3 and entry.startswith("##"):
            assert encode(tokenizer, f"☆{entry[2]}") == [tokenizer.token_to_id("☆"), token_id], (
                entry
            )
        elif not entry.startswith("##"):
            assert encode(tokenizer, entry) == [token_id], entry


@pytest.mark.parametrize(
    "text",
    [
        "😂😂😂 🙏🙏 👍🏻👌🏿 ❤\ufe0f❤ 💔🥺🥰🤣🤔🤷\u200d♀\ufe0f",
        "🐶🐱🐷 🌹🎂🎉 🍻🍉 🧧 🇨🇳🇺🇸 ☀\ufe0f☔\ufe0f ✅❌ 1\ufe0f⃣2\ufe0f⃣ 🫡🥹",
        "“双引号”‘单引号’……——～·《书》〈〉【】「」『』、。！？；：（）￥％＠＃",
        "(╯‵□′)╯︵┻━┻ Σ(°△°|||)︴ (๑•̀ㅂ•́)✧",
        "o(╯□╰)o ^_^ T_T (´･ω･`) ヽ(✿ﾟ▽ﾟ)ノ (｡♥‿♥｡) ㄟ(▔▽▔)ㄏ",
        "これはテストです。ガッツポーズ",
        "你好嗎？謝謝您，台灣、囧、怼、槑、祎、喵",
        "1234567890 3.14 50% 12:30 ＋８６ ① Ⅱ ℃ ° → ★",
        string.printable,
    ],
)
def test_what_people_type_has_no_unk(tokenizer, text):
    assert UNK_ID not in encode(tokenizer, text)


def test_no_ascii_word_up_to_100_characters_is_unk(tokenizer):
    rng = random.Random(0)
    alphabet = string.ascii_letters + string.digits
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, 100))) for _ in range(2000)]
    for word, token_ids in zip(words, encode_utterances(tokenizer, words), strict=True):
        assert UNK_ID not in token_ids, word
        assert decode_response(tokenizer, token_ids) == word.lower()


def test_ids_equal_transformers_bert_tokenizer(tokenizer, bert):
    texts = [*TEXTS, *random_texts(2000)]
    expected = bert(texts, add_special_tokens=False)["input_ids"]
    for text, ours, theirs in zip(
        texts, encode_utterances(tokenizer, texts), expected, strict=True
    ):
        assert ours == theirs, ascii(text)


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "[unused1]"])
def test_literal_special_token_is_text(tokenizer, bert, token):
    text = f"你好{token}x {token}"
    spaced = text.replace("[", " [ ").replace("]", " ] ")  # BERT 眼里的普通文字
    token_ids = encode(tokenizer, text)
    assert token_ids == bert(spaced, add_special_tokens=False)["input_ids"]
    assert not set(token_ids) & {0, 101, 102, 103}
    assert decode_response(tokenizer, token_ids) == f"你好{token.lower()} x {token.lower()}"


@pytest.mark.parametrize(
    "text",
    [
        "i'm fine, thanks. ok?",
        "3.14",
        "at 12:30 now",
        "50% off",
        "(a) b",
        "a (b), c [d] {e}!",
        "1,000,000 dollars",
        "wait... what?!",
        "it's 5 o'clock; don't we'll they've he'd",
        'she said "hello world" and "bye".',
        "well-known a/b c_d 1+1=2",
        "$5 and rock & roll",
        "www.baidu.com is a website",
        "好的ok吗，iphone 15 pro不错。",
        "他说“好的”，然后走了……",
        "哈哈😂😂ok",
        "これはテストてす。",
        "wonderful unbelievable antidisestablishmentarianism",
        "(*￣▽￣*)！",
        "αβγ abc",
    ],
)
def test_natural_text_survives_a_round_trip(tokenizer, text):
    assert decode_response(tokenizer, encode(tokenizer, text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你 好 hello 世界 world 123", "你好hello世界world 123"),
        ("Hello   WORLD", "hello world"),
        ("hello 😂 world 。", "hello😂world。"),
        ("sad :( happy :)", "sad:(happy:)"),
        ("", ""),
    ],
)
def test_spaces_only_between_latin_words(tokenizer, text, expected):
    assert decode_response(tokenizer, encode(tokenizer, text)) == expected


def test_response_that_starts_with_a_piece_shows_no_hashes(tokenizer):
    token_ids = [tokenizer.token_to_id(token) for token in ("##ing", "你", "##s", "[SEP]")]
    assert decode_response(tokenizer, token_ids) == "ing你s"


def test_decoding_a_prefix_gives_a_prefix(tokenizer):
    texts = [
        'he said "i\'m ok", 3.14 (yes) 你好 hello😂 world... www.a.com: 12:30',
        *random_texts(200),
    ]
    for token_ids in encode_utterances(tokenizer, texts):
        whole = decode_response(tokenizer, token_ids)
        for end in range(len(token_ids)):
            prefix = decode_response(tokenizer, token_ids[:end])
            assert whole.startswith(prefix), (ascii(whole), ascii(prefix))


def test_random_tokens_decode_to_prefixes_up_to_the_last_word(tokenizer):
    rng = random.Random(3)
    for _ in range(200):
        token_ids = [rng.randrange(104, VOCAB_SIZE) for _ in range(20)]
        pieces = [tokenizer.id_to_token(token_id).startswith("##") for token_id in token_ids]
        whole = decode_response(tokenizer, token_ids)
        for end in range(1, 20):
            if not pieces[end]:
                assert whole.startswith(decode_response(tokenizer, token_ids[:end]))


def test_special_ids_and_vocab_text(tokenizer):
    assert special_ids(tokenizer) == (0, 100, 101, 102)
    assert special_ids(tokenizer).sep == 102
    assert vocab_text(tokenizer).encode() == VOCAB_PATH.read_bytes()


def test_default_encoding_adds_cls_and_sep(tokenizer):
    assert tokenizer.encode("你").tokens == ["[CLS]", "你", "[SEP]"]


SMALL = [*SPECIAL_TOKENS, "你", "\u2028", "\x85", "好", "a", "##b"]


@pytest.mark.parametrize(
    "data",
    [
        "\n".join(SMALL).encode(),
        ("\n".join(SMALL) + "\n").encode(),
        ("\r\n".join(SMALL) + "\r\n\r\n").encode("utf-8-sig"),
    ],
    ids=["no final newline", "LF", "CRLF and BOM"],
)
def test_vocab_file_layouts_give_the_same_ids(tmp_path, data):
    path = tmp_path / "vocab.txt"
    path.write_bytes(data)
    tokenizer = load_tokenizer(path)
    assert [tokenizer.token_to_id(token) for token in SMALL] == list(range(len(SMALL)))
    assert encode(tokenizer, "你好ab") == [5, 8, 9, 10]


def test_folder_prefers_tokenizer_json_and_keeps_our_behaviour(tmp_path):
    saved = build_tokenizer([*SPECIAL_TOKENS, "好", "你", "[", "]", "sep"])
    saved.enable_truncation(1)
    saved.enable_padding()
    saved.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(SMALL), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert encode_utterances(tokenizer, ["好你好", "[SEP]"]) == [[5, 6, 5], [7, 9, 8]]
    assert decode_response(tokenizer, [5, 6, 3]) == "好你"
    (tmp_path / "tokenizer.json").unlink()
    assert encode(load_tokenizer(tmp_path), "好") == [8]


GOOD = "\n".join(SMALL)


@pytest.mark.parametrize(
    ("name", "content", "argument", "fragments"),
    [
        (None, b"", "none.txt", ["none.txt", "--vocab_path"]),
        (None, b"", "", ["tokenizer.json", "vocab.txt", "--vocab_path"]),
        ("vocab.txt", "你好".encode("gbk"), "vocab.txt", ["UTF-8", "vocab.txt"]),
        ("vocab.txt", b"", "vocab.txt", ["[PAD]、[UNK]、[CLS]、[SEP]"]),
        (
            "vocab.txt",
            GOOD.replace("[SEP]\n", "").encode(),
            "",
            ["缺少特殊 token [SEP]：", "vocab.txt"],
        ),
        ("vocab.txt", f"{GOOD}\n你\n".encode(), "vocab.txt", ["第 12 行", "第 6 行", "“你”"]),
        ("tokenizer.json", b'{"version": ', "", ["JSON", "tokenizer.json"]),
        ("tokenizer.json", b"\xff{}", "", ["UTF-8", "tokenizer.json"]),
        ("tokenizer.json", b'{"a": 1}', "", ["tokenizers", "tokenizer.json"]),
    ],
)
def test_unusable_vocabulary_is_one_sentence(tmp_path, name, content, argument, fragments):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / argument)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message
    assert message.endswith("。")


def test_tokenizer_json_without_special_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece

    Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match=r"缺少特殊 token \[PAD\]、\[CLS\]"):
        load_tokenizer(tmp_path)


def make_bert_vocab():
    """形状与 bert-base-chinese 相同的 21128 项：13317 项之后全是 ## 加单个字符。"""
    head = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), *SPECIAL_TOKENS[1:], "<S>", "<T>"]
    body = ["##a", "##1", *(chr(0x4E00 + i) for i in range(7000))]
    filler = [f"word{i}" for i in range(VOCAB_SIZE - len(head) - len(body) - 1)]
    tail = ["##!", "##\u2028", *(f"##{chr(0x4E00 + i)}" for i in range(7807)), "##￥", "##👍"]
    return [*head, *body, *filler, "fishbase", *tail]


def test_reference_vocab_is_the_bert_one_without_its_tail():
    bert_vocab = make_bert_vocab()
    untouched = list(bert_vocab)
    assert len(bert_vocab) == 21128
    derived = derive_reference_vocab(bert_vocab)
    assert bert_vocab == untouched
    assert len(derived) == len(set(derived)) == VOCAB_SIZE
    assert derived[:6] == ["[PAD]", "“", "”", "’", "‘", "[unused5]"]
    assert derived[5:] == bert_vocab[5:VOCAB_SIZE]
    assert derived[-1] == "fishbase"
    assert UNK_ID not in encode(build_tokenizer(derived), "“你一”")


@pytest.mark.parametrize(
    "vocab_lines", [[], ["[PAD]"] * 13317, [*make_bert_vocab()[:-3], "好", "##啊"]]
)
def test_other_vocabularies_are_refused_as_reference(vocab_lines):
    with pytest.raises(UserError, match="21128"):
        derive_reference_vocab(vocab_lines)


def test_no_piece_form_for_characters_that_stand_alone():
    for entry in generate_vocab():
        if len(entry) == 3 and entry.startswith("##"):
            assert not unicodedata.category(entry[2]).startswith("P")
            assert not "\u4e00" <= entry[2] <= "\u9fff"
