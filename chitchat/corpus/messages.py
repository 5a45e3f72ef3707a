"""消息：聊天记录里的一条，以及哪些不是人说的话。

先看导出工具给的类型；类型之外只认各工具固定的写法，不看话里有没有某个词：
“订单已取消”“他拍了拍我的肩膀”是话，``"小明" 拍了拍我`` 不是。
"""

from __future__ import annotations

import functools
import itertools
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
        is_cut: 一个 chat 就是一段对话，没有时间也分得开。
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
    is_cut: bool = False


_KINDS = {
    "图片": "图片 照片 写真 闪照 自拍 image photo picture pic 圖片",
    "表情包": "动画表情 表情 表情包 自定义表情 商城表情 gif表情 贴纸 贴图 貼圖 スタンプ 動畫表情"
    " 骰子 猜拳 sticker emoji gif market_face marketface mface",
    "语音": "语音 语音信息 語音訊息 ボイスメッセージ audio voice record ptt voice_message",
    "视频": "视频 短视频 小视频 影片 動画 video video_message video_file",
    "文件": "文件 檔案 ファイル file document animation",
    "位置": "位置 地理位置 位置分享 位置信息 位置情報 实时位置共享 location geo",
    "通话": "通话 语音通话 视频通话 音视频通话 通话记录 call voip",
    "红包转账": "红包 微信红包 qq红包 红包卡片 红包封面 转账 转账卡片 red_packet wallet transfer",
    "链接卡片": "链接 分享 分享链接 卡片 卡片式链接 (分享)卡片式链接 图文 小程序 小程序分享"
    " 音乐 音乐分享 音乐与音频 名片 个人名片 个人/公众号名片 公众号名片 视频号"
    " 视频号直播 视频号直播卡片 视频号名片 群公告 笔记 接龙 记事本 記事本 notes"
    " ノート 相册 相簿 アルバム album 日历 link card ark json share contact"
    " music miniapp app xml",
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


def _any_of(kinds: str) -> str:
    """这几种的各个名字，正则表达式里的“或”；长的在前。"""
    words = [word for kind in kinds.split() for word in _KINDS[kind].split()]
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


# 卡片之后跟着的标题、金额、文件名不是话；语音和视频之后的是时长。
_CARD = re.compile(
    rf"\[(?P<word>{_any_of('链接卡片 红包转账 转发 位置 通话 文件')})(?:\|[^\]]*)?\].*"
    rf"|[\[【](?P<word2>{_any_of(' '.join(_KINDS))})[\]】](?:\s*[\d:.]+\s?(?:秒|s|''|\"|″)?)?"
    r"|Type: \d+ Content.*",
    re.IGNORECASE | re.DOTALL,
)
_ALL = _any_of(" ".join(_KINDS))
_PLACEHOLDER = re.compile(
    rf"!?\[(?P<word>{_ALL})\]\(\S*?\)"
    rf"|\[(?P<word2>{_ALL})(?:\d{{0,6}}|\s?(?:消息|讯息|message))(?:[:：|][^\[\]\n]{{0,300}})?\]"
    r"|\[(?:(?:卡片|回复|长|空|JSON|Markdown|推荐|置顶|\w{1,12}、\w{1,12})消息)(?:[:：][^\[\]\n]{0,300})?\]"
    r"|<(?P<word3>img|image)\b[^<>]{0,500}>",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(r"!?\[(?P<word>[^\]|\n]{1,20})(?:\|[^\n]*)?\]\(\S*\)")
_LINKS = re.compile(r"(?:(?:https?://|www\.)\S+\s*)+", re.IGNORECASE)
_XML = re.compile(r"\s*<(?:\?xml|msg|appmsg|sysmsg)\b", re.IGNORECASE)
_WHO = r'(?:"[^"\n]{1,60}"|“[^”\n]{1,60}”|我|你)'
_NOTICES = re.compile(
    rf'(?=.*["“]|我拍了拍自己){_WHO}\s?拍了拍\s?(?:{_WHO}|自己)(?:[的并][^，。！？\n]{{0,30}})?'
    rf"|{_WHO}(?:将|邀请)\s?{_WHO}\s?(?:移出了?群聊|加入了群聊)"
    r"|我通过了你的朋友验证请求，现在我们可以开始聊天了"
    r"|你已添加了.{1,40}，现在可以开始聊天了。?|以上是打招呼的(?:内容|消息)。?"
    r"|消息已发出，但被对方拒收了。?|.{1,40}开启了朋友验证，你还不是他（她）朋友。.{0,60}"
    r"|\[?收到一条(?:视频/语音|视频|语音)聊天消息，请在手机(?:端|上)?查看\]?"
    r"|.{0,60}请使用最新版(?:手机|本)?(?:QQ|微信)?(?:查看|体验新功能|后查看).{0,10}",
    re.DOTALL,
)
_NAME = r"[^，,。！？!?；;\n]{1,40}?"
_GUESSED_NOTICES = re.compile(
    rf"\[?(?:(?:{_NAME})?(?:[撤收]回了|已[撤收]回了?)(?:一[条則则])?(?:成员)?的?(?:消息|訊息|讯息)"
    r"(?:\s*重新编辑)?"
    rf"|{_NAME} recalled a message|{_NAME} unsent a message\.?|Message unsent\."
    rf"|{_NAME}领取了{_NAME}的?红包(?:，.{{0,20}})?"
    rf"|{_NAME}(?:已?加入了?|已?退出了?|已?离开了?)(?:本群|该群|群聊|群组)"
    rf"|{_NAME}邀请{_NAME}加入了?(?:本群|群聊)|{_NAME}被{_NAME}移[出除]了?(?:本群|群聊)"
    rf"|{_NAME}修改(?:了)?群名(?:称)?为.{{1,40}}"
    rf"|(?:{_NAME})?(?:向|给){_NAME}发送了?一个窗口抖动"
    r"|(?:通话时长|聊天时长)[ :：]?[\d: 分秒时]{1,20}|对方(?:已取消|已拒绝|无应答|忙线中)"
    r"|☎.{0,60}|(?:未接來電|不在着信|未接来电)"
    r")[。.]?\]?",
)
# 多数消息里这些一个也没有，不必逐条规则去试。
_MAYBE = re.compile(
    r'[\[<>"“「【☎{]|拍了拍|https?:|www\.|[撤收]回|红包|群|聊|窗口抖动|通话时长|对方|朋友|招呼|请使用|引用'
    r"|recalled|unsent|Type: |未接|不在着信",
    re.IGNORECASE,
)
_QUOTES = (
    re.compile(r"\A「[^」]{1,40}[：:].*?」\s*\n\s*(?:- ?){3,}-*\s*\n", re.DOTALL),
    re.compile(r"\A(?:>[^\n]*\n)+"),
    re.compile(r"\A\[(?:引用|回复)[^\[\]\n]{0,500}(?:\[[^\[\]\n]{0,80}\][^\[\]\n]{0,500}){0,9}\]"),
    re.compile(r"\[引用[^\[\]\n]{0,500}(?:\[[^\[\]\n]{0,80}\][^\[\]\n]{0,500}){0,9}\]\Z"),
    re.compile(r"\n\[引用\].*\Z|\n引用[:：][^\n:：]{1,40}[:：].*\Z", re.DOTALL),
)
_INVISIBLE = dict.fromkeys(
    [0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)


@functools.lru_cache(maxsize=256)
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
    text = text.strip()
    if not text.isprintable():  # 多数消息里没有看不见的字符，不必逐字去换
        text = text.translate(_INVISIBLE).strip()
    if not text:
        return "", "空"
    if not _MAYBE.search(text):
        return " ".join(text.split()), ""
    if _XML.match(text) or text.startswith('{"app":'):
        return "", "链接卡片"
    if _NOTICES.fullmatch(text) or (not has_type and _GUESSED_NOTICES.fullmatch(text)):
        return "", "撤回" if "回" in text else "系统提示"
    if match := _CARD.fullmatch(text) or _MARKDOWN.fullmatch(text):
        return "", _kind_in(match)
    if _LINKS.fullmatch(text):
        return "", "链接卡片"
    for quote in _QUOTES:
        text, num_quotes = quote.subn("", text, count=1)
        if num_quotes and not text.strip():
            return "", "引用"
    kinds: list[str] = []

    def note(match: re.Match) -> str:
        kinds.append(_kind_in(match))
        return " "

    rest = " ".join(_PLACEHOLDER.sub(note, text).split())
    return rest, "" if rest else (kinds[0] if kinds else "空")


def _kind_in(match: re.Match) -> str:
    """匹配到的是哪一种占位。"""
    words = (word for name, word in match.groupdict().items() if name.startswith("word") and word)
    return KIND_OF.get(next(words, "").lower(), "其他")


def join_messages(messages: list[str]) -> str:
    """把一个人接连发的几条消息接成一句：汉字之后加逗号，其余加空格。"""
    parts = messages[:1]
    for before, message in itertools.pairwise(messages):
        parts += ["，" if "\u4e00" <= before[-1] <= "\u9fff" else " ", message]
    return "".join(parts)
