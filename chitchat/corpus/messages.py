"""消息：聊天记录里的一条，以及哪些不是人说的话。

先看导出工具给的类型；类型之外只认各工具固定的写法，不看话里有没有某个词：
“订单已取消”“他拍了拍我的肩膀”是话，``"小明" 拍了拍我`` 不是。
"""

from __future__ import annotations

import re
from typing import NamedTuple

from chitchat.corpus.times import Times


class Message(NamedTuple):
    """一条消息。

    Attributes:
        speaker: 说话人的账号，没有账号时是昵称；空串表示不知道。
        times: 发送的时刻，见 times.Times。
        text: 正文。
        chat: 属于哪个聊天；不同聊天的消息可以交错。
        name: 说话人的昵称。
        is_me: 是不是导出记录的人自己。
        left_out: 不是话的缘由，如“图片”；空串表示是话。
        line: 在文件里的行号，0 表示没有行。
        has_type: 导出工具给了类型，不必再由文字猜是不是系统提示。
    """

    speaker: str
    times: Times
    text: str
    chat: str = ""
    name: str = ""
    is_me: bool = False
    left_out: str = ""
    line: int = 0
    has_type: bool = False


_KINDS = {
    "图片": "图片 照片 写真 闪照 自拍 image photo picture pic 圖片",
    "表情包": "动画表情 表情 表情包 自定义表情 商城表情 贴纸 贴图 貼圖 スタンプ sticker emoji gif"
    " market_face marketface mface 動畫表情",
    "语音": "语音 语音信息 語音訊息 ボイスメッセージ audio voice record ptt voice_message",
    "视频": "视频 短视频 小视频 影片 動画 video video_message video_file",
    "文件": "文件 檔案 ファイル file document animation",
    "位置": "位置 地理位置 位置分享 位置信息 位置情報 location geo",
    "通话": "通话 语音通话 视频通话 音视频通话 通话记录 call voip",
    "红包转账": "红包 微信红包 qq红包 红包卡片 转账 转账卡片 red_packet wallet transfer",
    "链接卡片": "链接 分享 分享链接 卡片 卡片式链接 (分享)卡片式链接 图文 小程序 小程序分享 音乐"
    " 音乐与音频 名片 个人名片 个人/公众号名片 公众号名片 视频号 视频号直播卡片 视频号名片 群公告"
    " 记事本 記事本 notes ノート 日历 link card ark json share contact music miniapp app xml",
    "转发": "聊天记录 转发 合并转发 合并转发的聊天记录 聊天记录合并转发 (分享)聊天记录"
    " forward multiforward",
    "撤回": "撤回 消息撤回 recall revoke",
    "系统提示": "系统 系统通知 拍一拍 戳一戳 窗口抖动 system tip poke gray_tip service",
    "其他": "未知 未知类型 其他 无文本内容 unknown other null",
}
KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words.split()}
TEXT_TYPES = frozenset(
    ("", "1", "0", "text", "文本", "文字", "reply", "引用", "引用回复", "回复", "quote")
)
# 单独成一条时才算占位的，后面还可以跟着标题、文件名、金额。
_CARDS = "|".join(
    re.escape(word)
    for kind in ("链接卡片", "红包转账", "转发", "位置", "通话", "文件", "语音", "视频")
    for word in _KINDS[kind].split()
)
_CARD = re.compile(rf"\[(?P<word>{_CARDS})\](?:\s.*)?", re.IGNORECASE | re.DOTALL)
_WORDS = "|".join(sorted(map(re.escape, KIND_OF), key=len, reverse=True))
_PLACEHOLDER = re.compile(
    rf"\[(?P<word>{_WORDS}|表情(?=\d))(?:\d*|\s?(?:消息|讯息|message))(?:[:：][^\[\]\n]*)?\]"
    r"|\[[^\[\]\n]{0,20}[^\[\]\n条]消息(?:[:：][^\[\]\n]*)?\]"
    r"|<(?P<tag>img|image|IMG)[^<>]*>",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(r"!?\[(?P<word>[^\]|\n]{1,20})(?:\|[^\n]*)?\]\([^\n]*\)", re.DOTALL)
_LINKS = re.compile(r"(?:(?:https?://|www\.)\S+\s*)+", re.IGNORECASE)
_XML = re.compile(r"\s*<(?:\?xml|msg|appmsg|sysmsg)\b", re.IGNORECASE)
_NOTICES = re.compile(
    r'(?=.*["“]|我拍了拍自己)(?:"[^"\n]+"|“[^”\n]+”|我|你)\s?拍了拍\s?(?:"[^"\n]+"|“[^”\n]+”|我|自己)'
    r"(?:的[^，。！？\n]{0,20})?"
    r"|我通过了你的朋友验证请求，现在我们可以开始聊天了"
    r"|你已添加了.{1,40}，现在可以开始聊天了。?|以上是打招呼的(?:内容|消息)。?"
    r"|消息已发出，但被对方拒收了。?|.{1,40}开启了朋友验证，你还不是他（她）朋友。.*"
    r"|.*请使用最新版(?:手机|本)?(?:QQ|微信)?(?:查看|体验新功能|后查看).{0,10}",
    re.DOTALL,
)
_NAME = r"[^，,。！？!?；;\n]{1,40}?"
_GUESSED_NOTICES = re.compile(
    rf"\[?(?:(?:{_NAME})?(?:[撤收]回了|已[撤收]回了?)(?:一[条則则])?(?:成员)?的?(?:消息|訊息|讯息)"
    rf"|{_NAME} recalled a message|{_NAME} unsent a message\.?|Message unsent\."
    rf"|{_NAME}领取了{_NAME}的?红包(?:，.*)?"
    rf"|{_NAME}(?:已?加入了?|已?退出了?|已?离开了?)(?:本群|该群|群聊|群组)"
    rf"|{_NAME}邀请{_NAME}加入了?(?:本群|群聊)|{_NAME}被{_NAME}移[出除]了?(?:本群|群聊)"
    rf"|{_NAME}修改(?:了)?群名(?:称)?为.{{1,40}}"
    rf"|(?:{_NAME})?(?:向|给){_NAME}发送了?一个窗口抖动"
    r"|(?:通话时长|聊天时长)[ :：]?[\d: 分秒时]+|对方(?:已取消|已拒绝|无应答|忙线中)"
    r")[。.]?\]?",
)
_QUOTES = (
    re.compile(r"\A「[^」]{1,40}[：:].*?」\s*\n\s*(?:- ?){3,}-*\s*\n", re.DOTALL),
    re.compile(r"\A(?:>[^\n]*\n)+"),
    re.compile(r"\A\[(?:引用|回复)[^\[\]\n]*(?:\[[^\[\]\n]*\][^\[\]\n]*)*\]\s*"),
    re.compile(r"\s*\[引用[^\[\]\n]*(?:\[[^\[\]\n]*\][^\[\]\n]*)*\]\Z"),
    re.compile(r"\n+\[引用\].*\Z", re.DOTALL),
)
_EDGES = "\u200b\u200e\u200f\u2060\ufeff" + "".join(map(chr, range(0x202A, 0x202F)))


def kind_of_type(text: str) -> str:
    """导出工具写的消息类型 → 不是话的缘由；文字消息是空串。"""
    name = text.strip().lower()
    for suffix in ("消息", "訊息", "卡片"):
        if name not in KIND_OF:
            name = name.removesuffix(suffix)
    if name in TEXT_TYPES:
        return ""
    return KIND_OF.get(name, f"其他（{text.strip()[:20]}）")


def clean_message(text: str, *, has_type: bool = False) -> tuple[str, str]:
    """去掉占位的图片、引用的别人的话等等。

    Args:
        text: 正文。
        has_type: 已由导出工具的类型知道是文字，不再猜它是不是系统提示。

    Returns:
        剩下的话，换行变成空格；以及一点也不剩时的缘由（有剩下的话时是空串）。
    """
    text = text.strip().strip(_EDGES).strip()
    if not text:
        return "", "空"
    if _XML.match(text):
        return "", "链接卡片"
    if _NOTICES.fullmatch(text) or (not has_type and _GUESSED_NOTICES.fullmatch(text)):
        return "", "撤回" if "回" in text else "系统提示"
    if match := _CARD.fullmatch(text) or _MARKDOWN.fullmatch(text):
        kind = KIND_OF.get(match["word"].lower())
        if kind or match.re is _MARKDOWN:
            return "", kind or "链接卡片"
    if _LINKS.fullmatch(text):
        return "", "链接卡片"
    for quote in _QUOTES:
        text, num_quotes = quote.subn("", text, count=1)
        if num_quotes and not text.strip():
            return "", "引用"
    kinds: list[str] = []

    def note(match: re.Match) -> str:
        kinds.append(KIND_OF.get((match["word"] or match["tag"] or "").lower(), "其他"))
        return " "

    rest = " ".join(_PLACEHOLDER.sub(note, text).split()).strip(_EDGES)
    return rest, "" if rest else (kinds[0] if kinds else "空")


def join_messages(messages: list[str]) -> str:
    """把一个人接连发的几条消息接成一句：汉字之后加逗号，其余加空格。"""
    joined = messages[0]
    for message in messages[1:]:
        joined += ("，" if "\u4e00" <= joined[-1] <= "\u9fff" else " ") + message
    return joined
