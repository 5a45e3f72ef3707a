"""WhatsApp 导出的 TXT。

- iOS：``[2026/1/2 20:15:30] 名字: 文字``，不是人说的话之前有一个看不见的 U+200E；
- Android：``2026/1/2 20:15 - 名字: 文字``，没有“名字:”的是系统提示。

日期的次序、12 小时制的写法随手机的语言而变（空格可以是 U+202F）；一条消息可以有好几行。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.messages import Message
from chitchat.corpus.times import parse_times

_TIME = (
    r"\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4},?\s[^\]\n]{0,8}?\d{1,2}[:.]\d{2}(?:[:.]\d{2})?[^\]\n]{0,8}?"
)
HEADER = re.compile(
    rf"[\u200e\u200f\ufeff]*(?:\[(?P<time>{_TIME})\]\s|(?P<android>{_TIME})\s-\s)(?P<rest>.*)",
    re.DOTALL,
)
_SENDER = re.compile(r"(?P<name>[^:：\n]{1,60}?):\s(?P<text>.*)", re.DOTALL)
_MEDIA = re.compile(
    r"<[^<>\n]*(?:省略|忽略|略去|omitted|omis|omitid|weggelassen|附件|附加|attached)[^<>\n]*>"
    r"|(?:image|video|audio|sticker|GIF|document|Contact card)(?: message)? omitted"
    r"|(?:图片|圖片|照片|视频|影片|影像|音频|音訊|语音|贴图|貼圖|文件|檔案|文档|GIF|联系人名片|聯絡人名片)"
    r"(?:已)?(?:略去|忽略|省略)"
    r"|\S+\.\w{2,5} ?[(（](?:file attached|文件附件|附件檔案|檔案附件|附件)[)）]",
    re.IGNORECASE,
)
_DELETED = re.compile(
    r"(?:这条|此|该)(?:消息|訊息|讯息)已(?:被)?(?:删除|刪除)。?|(?:您|你)(?:已)?(?:删除了此|刪除了此|已刪除此)(?:消息|訊息)。?"
    r"|你已刪除此訊息。?|This message was deleted\.?|You deleted this message\.?"
    r"|(?:未接|已错过的?)(?:语音|視訊|视频|語音)(?:通话|來電|来电).*|Missed (?:voice|video) call.*"
)
_EDITED = re.compile(r"\s*\u200e?<[^<>\n]*(?:已编辑|已編輯|edited)[^<>\n]*>\s*\Z")


def _recognise(head: Head) -> str:
    headers = [line for line in head.lines[:60] if HEADER.fullmatch(line)]
    named = [line for line in headers if _SENDER.fullmatch(HEADER.fullmatch(line)["rest"])]
    if named and 2 * len(headers) > min(len(head.lines), 60) / 2:
        return f"有 {named[0][:40]!r} 这样的行"
    return ""


def read_whatsapp(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """逐条给出消息。"""
    header, number = None, 0
    rest = ""
    for line_number, line in enumerate(file, 1):
        match = HEADER.fullmatch(line.rstrip("\r\n"))
        if match and parse_times(match["time"] or match["android"]):
            if header:
                yield _message(header, rest, number)
            header, rest, number = match, match["rest"], line_number
        elif header:
            rest += "\n" + line.rstrip("\r\n")
    if header:
        yield _message(header, rest, number)


def _message(header: re.Match, rest: str, line: int) -> Message:
    times = parse_times(header["time"] or header["android"])
    match = _SENDER.fullmatch(rest.lstrip("\u200e"))
    if match is None:
        return Message("", times, "", left_out="系统提示", line=line)
    name, text = match["name"].strip("\u202a\u202c\u200e ~"), _EDITED.sub("", match["text"])
    plain = text.strip("\u200e\u200f \n")
    left_out = ""
    if _DELETED.fullmatch(plain):
        left_out = "撤回"
    elif _MEDIA.fullmatch(plain):
        left_out = "图片、语音等"
    elif text.startswith("\u200e"):
        left_out = "系统提示"
    elif match := _MEDIA.match(plain):  # 图片之后是说明文字
        text = plain[match.end() :]
    return Message(name, times, text, name=name, left_out=left_out, line=line, has_type=True)


WHATSAPP = Format("WhatsApp 的 TXT", _recognise, read_whatsapp, is_log=True)
