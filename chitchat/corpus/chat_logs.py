"""聊天记录：把一条条带时间和说话人的消息变成对话。"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

# 不是话的消息：整条丢掉，或从话里去掉这一截。微信的 [捂脸] 之类是话的一部分，留着。
_MEDIA = re.compile(
    r"\[(?:图片|照片|动画表情|表情|自定义表情|贴纸|语音|语音通话|视频|视频通话|短视频|小视频"
    r"|文件|位置|链接"
    r"|分享"
    r"|名片|红包|QQ红包|微信红包|转账|聊天记录|闪照|卡片消息|小程序|音乐|戳一戳|窗口抖动|拍一拍|未知|Image|Photo"
    r"|Video|Voice|Sticker|File)\]"
    r"|<img[^>]*>"
)
_SYSTEM = re.compile(
    r"撤回了一条消息|撤回了一則訊息|recalled a message"
    r"|加入了?(?:本群|群聊)|退出了?(?:本群|群聊)|修改群名为"
    r"|拍了拍|领取了.*红包|以上是打招呼的内容|开启了朋友验证|你已添加了|现在可以开始聊天了|消息已发出，但被对方拒收了"
    r"|向你发送了?一个窗口抖动|请使用最新版(?:手机)?QQ|通话时长|已取消$|对方已取消|^\s*<\?xml|^\s*<msg"
)
_GROUP_PREFIX = re.compile(r"\A[\w@.-]+:\r?\n")  # 微信群消息的正文以“账号:换行”开头
_TIME_FORMATS = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d %I:%M:%S %p")


class Message(NamedTuple):
    """一条消息。

    Attributes:
        chat: 属于哪个聊天；不同聊天的消息可以交错。
        speaker: 说话人。
        time: 发送时刻；None 表示不知道。
        text: 正文。
        line: 在文件里的行号。
    """

    chat: str
    speaker: str
    time: datetime | None
    text: str
    line: int


@dataclass
class _Open:
    """还没有结束的一段对话。"""

    utterances: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    speaker: str | None = None
    time: datetime | None = None


def parse_time(text: str) -> datetime | None:
    """读出时刻：年月日时分秒，或自 1970 年起的秒数、毫秒数；读不出时返回 None。"""
    text = text.strip().replace("/", "-").replace("T", " ")
    if text.isascii() and text.isdecimal() and len(text) >= 9:
        seconds = int(text) / (1000 if len(text) >= 12 else 1)
        try:
            return datetime(1970, 1, 1) + timedelta(seconds=seconds)
        except OverflowError:
            return None
    for form in _TIME_FORMATS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    return None


def clean_message(text: str) -> str:
    """去掉图片、表情包、撤回与系统提示；什么也不剩时返回空串。"""
    text = _GROUP_PREFIX.sub("", text)
    if _SYSTEM.search(text):
        return ""
    return " ".join(_MEDIA.sub(" ", text).split())


def join_messages(messages: list[str]) -> str:
    """把一个人接连发的几条消息接成一句：汉字之后加逗号，其余加空格。"""
    joined = messages[0]
    for message in messages[1:]:
        joined += ("，" if "\u4e00" <= joined[-1] <= "\u9fff" else " ") + message
    return joined


def build_dialogues(
    messages: Iterable[Message], gap_minutes: float
) -> Iterator[tuple[list[str], list[int]]]:
    """把消息变成对话：接起同一人接连的消息，沉默太久就另起一段，只有一个人说话的不要。

    群聊里每换一个人算一句；各个聊天互不相干。

    Args:
        messages: 按时间排列。
        gap_minutes: 沉默超过这么多分钟就另起一段对话。

    Yields:
        一段对话的各句，以及它们的行号。
    """
    gap = timedelta(minutes=gap_minutes)
    open_dialogues: dict[str, _Open] = {}
    for message in messages:
        text = clean_message(message.text)
        if not text:
            continue
        current = open_dialogues.setdefault(message.chat, _Open())
        if message.time and current.time and message.time - current.time > gap:
            if len(current.utterances) > 1:
                yield current.utterances, current.lines
            current = open_dialogues[message.chat] = _Open()
        if message.speaker == current.speaker:
            current.utterances[-1] = join_messages([current.utterances[-1], text])
        else:
            current.utterances.append(text)
            current.lines.append(message.line)
        current.speaker, current.time = message.speaker, message.time or current.time
    for current in open_dialogues.values():
        if len(current.utterances) > 1:
            yield current.utterances, current.lines


QQ_HEADER = re.compile(
    r"(?P<time>\d{4}[-/]\d{1,2}[-/]\d{1,2} \d{1,2}:\d{2}(?::\d{2})?(?: [AP]M)?)\s+(?P<speaker>\S.*)"
)
_QQ_ACCOUNT = re.compile(r"[(<（]([^()<>（）]+)[)>）]\s*\Z")
_QQ_SYSTEM_ACCOUNTS = ("10000", "1000000", "系统消息")


def read_qq_messages(lines: Iterable[str]) -> Iterator[Message]:
    """QQ 导出的文本：``2023-01-02 20:15:30 昵称(号码)`` 一行，下面是正文。"""
    chat, header, number = "", None, 0
    body: list[str] = []
    for line_number, line in enumerate(lines, 1):
        match = QQ_HEADER.fullmatch(line.strip())
        is_border = line.startswith(("消息对象:", "消息对象：", "消息分组:", "消息分组：", "====="))
        if (match or is_border) and header:
            yield from _qq_message(chat, header, body, number)
            header = None
        if match:
            header, number, body = match, line_number, []
        elif is_border and line.startswith("消息对象"):
            chat = line.strip()
        elif header:
            body.append(line)
    if header:
        yield from _qq_message(chat, header, body, number)


def _qq_message(chat: str, header: re.Match, body: list[str], line: int) -> Iterator[Message]:
    """一条消息；系统消息不给出。号码比昵称可靠：人会改昵称。"""
    name = header["speaker"].strip()
    account = _QQ_ACCOUNT.search(name)
    speaker = account[1] if account else name
    if speaker not in _QQ_SYSTEM_ACCOUNTS:
        yield Message(chat, speaker, parse_time(header["time"]), "\n".join(body), line)
