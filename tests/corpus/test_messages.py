"""消息、时刻、私人信息：每条规则用手写的例子说明，话与占位分得清。"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone

import pytest

from chitchat.corpus.messages import clean_message, kind_of_type
from chitchat.corpus.privacy import mask_private
from chitchat.corpus.times import parse_clock_text, parse_times

SPOKEN = (
    "订单已取消",
    "他拍了拍我的肩膀",
    "[捂脸]哈哈",
    "[强][强]",
    "已取消",
    "我把红包领取了",
    "你撤回了什么消息呀？我没看到",
    "撤回一条消息，怎么弄",
    "通话质量太差了",
    "明天加入群聊吧，我们",
    "[x] 完成了",
    "a[1]的值",
    "回复慢了点，别介意",
    "http 是什么",
    "<3",
    "群里通知说下周放假",
)
NOT_SPOKEN = {
    "图片": ("[图片]", "[图片:abc.jpg]", "![图片](http://x/y)", "[image消息]", "[Photo]"),
    "表情包": ("[动画表情]", "[表情]", "[表情123]", "[Sticker]", "[商城表情]"),
    "语音": ("[语音]", "[语音:3秒]", "[Voice message]", "[语音] 3秒"),
    "视频": ("[视频]", "[视频:a.mp4]"),
    "文件": ("[文件] 报告.docx",),
    "通话": ("[语音通话]", "[视频通话]"),
    "红包转账": ("[红包]", "[转账] ￥100.00", "[微信红包]恭喜发财"),
    "链接卡片": ("[链接] 一篇文章", "[链接|标题](https://a.b)", "https://a.b/c?d=1", "www.a.com"),
    "转发": ("[聊天记录] 群聊的聊天记录",),
    "撤回": ("张三撤回了一条消息", "[你撤回了一条消息]", "对方已撤回一条消息"),
    "系统提示": ('"小明" 拍了拍我', "我拍了拍自己", "以上是打招呼的内容", "“甲”拍了拍“乙”的头",
             "李四加入了群聊", "你领取了小明的红包", "通话时长 01:02"),
}  # fmt: skip


@pytest.mark.parametrize("text", SPOKEN)
def test_what_people_say_stays(text):
    assert clean_message(text) == (text, "")


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, ts in NOT_SPOKEN.items() for t in ts])
def test_what_nobody_said_is_left_out_with_its_kind(kind, text):
    if kind == "链接卡片" or text.startswith("[微信红包]"):
        assert clean_message(text)[0] in ("", "恭喜发财")
    else:
        assert clean_message(text) == ("", kind)


def test_a_typed_message_is_not_guessed_at():
    assert clean_message("张三撤回了一条消息", has_type=True) == ("张三撤回了一条消息", "")
    assert clean_message('"小明" 拍了拍我', has_type=True)[0] == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("看[图片]这个[表情]", "看 这个"),
        ("  第一行\n第二行 ", "第一行 第二行"),
        ("\u200e你好\ufeff", "你好"),
        ("> 小明: 在吗\n> 第二行\n好的", "好的"),
        ("好的\n\n[引用](文本)小明:在吗", "好的"),
        ("[回复 小明: 在吗]\n好的", "好的"),
        ("[回复消息]好的", "好的"),
        ("> 只有引用", "> 只有引用"),
    ],
)
def test_placeholders_and_quotes_are_taken_out(text, kept):
    assert clean_message(text)[0] == kept


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("文本", ""), ("文本消息", ""), ("Text", ""), ("引用消息", ""), ("图片消息", "图片")),
        *(("动画表情", "表情包"), ("(分享)卡片式链接", "链接卡片"), ("转账卡片", "红包转账")),
        *(("消息撤回", "撤回"), ("系统消息", "系统提示"), ("怪东西", "其他（怪东西）")),
    ],
)
def test_kind_of_a_type(name, kind):
    assert kind_of_type(name) == kind


MOMENT = datetime(2026, 1, 30, 20, 5, 9)
SPELLINGS = [
    *("2026-01-30 20:05:09", "2026/1/30 20:05:09", "2026.01.30 20:05:09", "2026年1月30日 20:05:09"),
    *("2026年1月30日 晚上8:05:09", "2026/1/30 下午 8:05:09", "2026/1/30 下午08:05:09"),
    *("2026-01-30 8:05:09 PM", "2026-01-30 8:05:09 pm", "2026-01-30 08:05:09 p.m."),
    *("2026-01-30T20:05:09", "2026/1/30 20时05分09秒", "2026-01-30 20:05:09.000"),
    *(
        "30/1/2026 20:05:09",
        "1/30/2026, 8:05:09\u202fPM",
        "1/30/26 8:05:09 PM",
        "30.01.26, 20:05:09",
    ),
    *("30 Jan 2026 20:05:09", "Jan 30, 2026 8:05:09 PM", "January 30, 2026 at 8:05:09 PM"),
    *("Fri, 1/30/2026 20:05:09", "２０２６-01-30　20：05：09", "2026/1/30(金) 20:05:09"),  # noqa: RUF001
    *("2026/1/30周五 20:05:09", "2026.01.30 Friday 20:05:09", "\u200e2026-01-30 20:05:09"),
    *("2026-01-30 星期五 20:05:09", "  2026-01-30   20:05:09 "),
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_is_the_same_moment(text):
    assert {time for time in parse_times(text) if time is not None} == {MOMENT.timestamp()}


@pytest.mark.parametrize("scale", [1, 1e3, 1e6, 1e9])
def test_epoch_in_every_unit(scale):
    text = str(int(1_700_000_000 * scale))
    assert parse_times(text) == parse_times("2023-11-14T22:13:20Z") == (1_700_000_000,)
    assert parse_times("1700000000.25") == (1_700_000_000.25,)


def test_zones_are_honoured():
    wanted = datetime(2026, 1, 2, 12, 0, tzinfo=timezone.utc).timestamp()
    for text in ("2026-01-02T12:00:00Z", "2026-01-02T20:00:00+08:00", "2026-01-02 07:00 -0500",
                 "2026-01-02 12:00 UTC", "2026-01-02T20:00:00.000+08:00"):  # fmt: skip
        assert parse_times(text) == (wanted,)


def test_what_is_no_moment_and_what_is_ambiguous():
    for text in (
        "",
        "昨天",
        "2026-13-01 10:00",
        "2026-01-02 25:00",
        "12345",
        "1:2:3",
        "2026-02-30",
    ):
        assert [time for time in parse_times(text) if time is not None] == []
    both = [datetime(2024, 1, 2).timestamp(), datetime(2024, 2, 1).timestamp()]
    assert list(parse_times("1/2/2024")) == both
    assert parse_times("13/1/2024") == (None, datetime(2024, 1, 13).timestamp())


@pytest.mark.parametrize(
    ("text", "clock"),
    [
        *(
            ("20:15", (20, 15)),
            ("下午08:15", (20, 15)),
            ("8:15PM", (20, 15)),
            ("上午12:00", (0, 0)),
        ),
        *(("12:30 AM", (0, 30)), ("中午12:10", (12, 10)), ("中午1:10", (13, 10)), ("25:00", None)),
    ],
)
def test_clock(text, clock):
    assert parse_clock_text(text) == clock


@pytest.mark.parametrize(
    ("text", "masked", "kinds"),
    [
        ("打 138 0013 8000 找我", "打 某个号码 找我", {"电话": 1}),
        ("+86-13800138000", "某个号码", {"电话": 1}),
        ("１３８００１３８０００", "某个号码", {"电话": 1}),  # noqa: RUF001
        ("座机010-12345678", "座机某个号码", {"电话": 1}),
        ("身份证11010519491231002X", "身份证某个号码", {"证件号": 1}),
        ("卡号6222 0212 3456 7890 129", None, {}),
        ("卡号4111 1111 1111 1111", "卡号某个号码", {"银行卡号": 1}),
        ("写信到 a.b+c@d-e.com 吧", "写信到 某个邮箱 吧", {"邮箱": 1}),
        ("看https://a.b/c?d=e，好笑", "看，好笑", {"网址": 1}),
        ("2026年1月2日20:15，花了1234.50元", None, {}),
        ("QQ群123456789", None, {}),
        ("@小明 来", None, {}),
        ("12345678901234567890123", None, {}),
    ],
)
def test_private_matters_are_masked(text, masked, kinds):
    counts = Counter()
    assert mask_private(text, counts) == (text if masked is None else masked)
    assert counts == kinds
