"""词表：生成默认的 vocab/vocab.txt，或由 BERT 的词表得到参考实现所用的那一份。

重新生成: ``python -m chitchat.tokens.vocabulary > vocab/vocab.txt``
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from chitchat.errors import UserError

PAD_TOKEN = "[PAD]"
UNK_TOKEN = "[UNK]"
CLS_TOKEN = "[CLS]"
SEP_TOKEN = "[SEP]"
MASK_TOKEN = "[MASK]"
REQUIRED_TOKENS = (PAD_TOKEN, UNK_TOKEN, CLS_TOKEN, SEP_TOKEN)
SPECIAL_TOKENS = (*REQUIRED_TOKENS, MASK_TOKEN)  # [MASK] 从来用不到，词表里可以没有
VOCAB_SIZE = 13317

NUM_UNUSED = 99  # BERT 的惯例：[PAD] 与 [UNK] 之间留 99 个空位
REFERENCE_QUOTES = "“”’‘"  # 原项目的词表用它们占去 [unused1] 至 [unused4]
ENGLISH_PATH = Path(__file__).resolve().parents[2] / "vocab" / "english.txt"

# GB 2312 的区号与 Big5 的首字节，均含两端；字由 Python 的编解码器给出。
GB2312_SYMBOL_ROWS = (1, 3, 4, 5, 6, 8)  # 符号、全角 ASCII、两种假名、希腊字母、注音
GB2312_HANZI_ROWS = range(16, 88)
BIG5_SYMBOL_LEADS = (0xA1,)
BIG5_HANZI_LEADS = range(0xA4, 0xC7)  # 第一级：常用字
BIG5_TRAILS = (*range(0x40, 0x7F), *range(0xA1, 0xFF))

# 网络用语、人名、粤语与日语里常见，而两个标准都没有的汉字。
MORE_HANZI = (
    "囧槑怼嘚啰祎喆堃玥翀堉弢骉犇焱燚赟瞓冇嘅咗哋嚟啲唔咁佢嗰喺攞睇嘢嘥乜啱啫嬲巭孖嫲囍劵欸跶旻垚偲嬛屇暐齁焗"
    "湉琤蹚磡旸嗞瘆嚒伱髙茍眞埗瑄璟玹琲洺暻龑鋆镕頔邨栢峯仝囡夃炆卌芈褔覅喵楽県辻畑円気図広売読対単応実経験転"
    "駅沢浜渋桜栄拝圏黒歩毎発戦関悪変辺続覚観権様総薬譲豊雑竜霊択峠込働"
)
# 颜文字与聊天里常见的其他字符。
MORE_SYMBOLS = (
    "¡¢£¥©«®²³´¶¸¹º»¼½¾¿ßæøþđłŋəɔʔʕˊˋ˘˙—–•․‧‿₂€№™ⅰⅱⅲⅳⅴ↔⇒∀∃∇∆−∼≈⋯①②③④⑤⑥⑦⑧⑨⑩⃣─│┌┐└┘├┤┬┴┼━┻╭╮╯╰"  # noqa: RUF001
    "╥╬╱╲▁▂▃▄▅▆▇█▔░▒▓▪▫▬▶►◀▷▽▼◕◔◠◡◢◣◤◥◦☉♁✦✧㊗㊙㊣ꈍᴗᵕᴥಠლღ๑ฅツ༎།｡｢｣､･ｯｰﾉﾐﾍﾟﾞㅂㅅㅇㅋㅎㅜㅠㅡㅣ〜〝〞ヽー々дшъяжи"  # noqa: RUF001
)
# 手机键盘上常用的 emoji 与符号；“甲-乙”是一段码位，含两端。
EMOJI_RANGES = """
    231A-231B 23F0 23F3 2600-2606 260E 2611 2614-2615 261C-261F 2620 2622 2639-263B 2640 2642
    2648-2653 2660-2668 266A-266D 267B 2693-2694 26A0-26A1 26BD-26BE 26C4-26C5 26D4 26EA 26FA 26FD
    2702 2705 2708-270D 270F 2712 2714 2716 2728 2733-2734 273F-2740 2744 2747 274C 274E 2753-2755
    2757 2763-2765 2795-2797 27A1 27B0 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 1F004 1F0CF 1F192-1F197
    1F1E6-1F1FF 1F308-1F30A 1F30D-1F31F 1F32D-1F37F 1F380-1F393 1F3A4-1F3B8 1F3C0-1F3C6 1F3E0-1F3E8
    1F3F3 1F3FB-1F43E 1F440-1F4B0 1F4B3-1F4B8 1F4BB-1F4BC 1F4C5 1F4C8-1F4C9 1F4CC-1F4CD 1F4D6 1F4DA
    1F4DD-1F4DE 1F4E2-1F4E3 1F4E6-1F4E7 1F4F1 1F4F7 1F4FA 1F50D-1F50E 1F511-1F514 1F51E 1F525-1F526
    1F528 1F52A-1F52B 1F52E 1F534-1F535 1F54A 1F5A4 1F5FB-1F64F 1F680-1F684 1F687 1F689 1F68C
    1F691-1F697 1F6A2 1F6A4-1F6A8 1F6AB-1F6AC 1F6B2 1F6B6 1F6BD 1F6BF-1F6C0 1F6CD 1F6D2 1F6F5
    1F90C-1F93A 1F942-1F943 1F947 1F950-1F962 1F970-1F97A 1F980-1F98E 1F9C0 1F9CB 1F9D0-1F9D1
    1F9E0-1F9E1 1F9E7-1F9E8 1F9F8 1FA77 1FAE0-1FAE7 1FAF0-1FAF6
"""


def generate_vocab() -> list[str]:
    """生成默认词表，共 VOCAB_SIZE 项，下标就是 token id；每次、每个 Python 版本结果都相同。

    次序：特殊 token、ASCII、标点与符号、汉字、emoji、``##`` 开头的单字符，最后用
    vocab/english.txt 里的英文词与词片补满。汉字和标点自成一词，不需要 ``##`` 形式。
    """
    unused = [f"[unused{number}]" for number in range(1, NUM_UNUSED + 1)]
    specials = [PAD_TOKEN, *unused, UNK_TOKEN, CLS_TOKEN, SEP_TOKEN, MASK_TOKEN]
    ascii_chars = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    symbols = [
        *_gb2312_chars(GB2312_SYMBOL_ROWS),
        *_codec_chars("big5", BIG5_SYMBOL_LEADS, BIG5_TRAILS),
        *MORE_SYMBOLS,
        *_expand_ranges(EMOJI_RANGES),
    ]
    symbols = [char for char in symbols if _is_kept_by_normalizer(char)]
    hanzi = [
        *_gb2312_chars(GB2312_HANZI_ROWS),
        *_codec_chars("big5", BIG5_HANZI_LEADS, BIG5_TRAILS),
        *MORE_HANZI,
    ]
    hanzi = [char for char in hanzi if _is_hanzi(char)]  # Big5 常用字之后还排着假名
    inside_words = [
        f"##{char}"
        for char in [*string.ascii_lowercase, *string.digits, *symbols]
        if not unicodedata.category(char).startswith("P") and not _is_hanzi(char)
    ]
    english = ENGLISH_PATH.read_text(encoding="utf-8").split()
    entries = [*specials, *ascii_chars, *symbols, *hanzi, *inside_words, *english]
    return list(dict.fromkeys(entries))[:VOCAB_SIZE]


def _gb2312_chars(rows: Iterable[int]) -> list[str]:
    """GB 2312 若干区里的字符。"""
    return _codec_chars("gb2312", [0xA0 + row for row in rows], range(0xA1, 0xFF))


def _codec_chars(codec: str, leads: Iterable[int], trails: Iterable[int]) -> list[str]:
    """双字节编码里，首字节与次字节各种组合所代表的字符；没有定义的组合略过。"""
    pairs = (bytes((lead, trail)).decode(codec, "ignore") for lead in leads for trail in trails)
    return [char for char in pairs if len(char) == 1]


def _expand_ranges(ranges: str) -> list[str]:
    """把 ``2600-2606 260E`` 这样的十六进制码位展开成字符。"""
    bounds = [part.partition("-") for part in ranges.split()]
    return [chr(c) for a, _, b in bounds for c in range(int(a, 16), int(b or a, 16) + 1)]


def _is_kept_by_normalizer(char: str) -> bool:
    """BERT 的规范化（小写、NFD）是否原样保留这个非 ASCII 字符；不保留的永远用不上。"""
    return (
        char > "\x7f" and not char.isspace() and unicodedata.normalize("NFD", char.lower()) == char
    )


def _is_hanzi(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"


def derive_reference_vocab(bert_vocab: Sequence[str]) -> list[str]:
    """由 bert-base-chinese 的词表得到原项目公开权重所用的词表。

    那份 21128 项的词表以一段 ``##`` 加单个字符（绝大多数是汉字）结尾；去掉这一段，
    再用 “ ” ’ ‘ 依次换下 [unused1] 至 [unused4]。其余各项的次序不变。不修改入参。

    Args:
        bert_vocab: bert-base-chinese 的 vocab.txt，每行一项，按 id 排列。

    Returns:
        VOCAB_SIZE 项，下标就是 token id。

    Raises:
        UserError: 结果不是 VOCAB_SIZE 项，说明传入的不是那份词表。
    """
    end = len(bert_vocab)
    # U+2028 也在那一段里，有些工具会把它当空白删去，只剩下 ##。
    while end and bert_vocab[end - 1].startswith("##") and len(bert_vocab[end - 1]) <= 3:
        end -= 1
    quotes = {f"[unused{i}]": quote for i, quote in enumerate(REFERENCE_QUOTES, start=1)}
    entries = [quotes.get(token, token) for token in bert_vocab[:end]]
    if len(entries) != VOCAB_SIZE or not set(REFERENCE_QUOTES) <= set(entries):
        raise UserError(
            f"这份词表有 {len(bert_vocab)} 项，去掉末尾的 ## 加单字后剩 {len(entries)} 项，"
            f"而原项目的词表是 {VOCAB_SIZE} 项：请改用 bert-base-chinese 的 vocab.txt（21128 项）。"
        )
    return entries


if __name__ == "__main__":
    import sys

    sys.stdout.buffer.write("".join(f"{token}\n" for token in generate_vocab()).encode())
