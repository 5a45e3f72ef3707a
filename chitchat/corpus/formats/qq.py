"""QQ，以及同形的文本：一行时刻和昵称，下面是正文。

- QQ 自己导出的 TXT：开头有“消息记录”，消息是 ``2026-01-02 20:15:30 昵称(号码)`` 一行，下面是正文；
  留痕和 WeFlow 的微信 TXT 同形，昵称之后没有号码，或括在单引号里；
- QQ 自己导出的 MHT：网页，``日期: 2026/1/2`` 一行之后，每条消息是昵称、时刻、正文；
- QQ-chat-exporter 的 TXT、JSON、分块的 JSONL，见 qq_exporter。
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from typing import TextIO

from chitchat.corpus.formats.base import Format, Head, ReadOptions
from chitchat.corpus.formats.qq_exporter import (
    is_exporter_json,
    is_exporter_text,
    read_exporter_json,
    read_exporter_text,
)
from chitchat.corpus.messages import Message
from chitchat.corpus.times import parse_times

_MARK = r"(?:上午|下午|凌晨|早上|中午|晚上|[AaPp][Mm])"
HEADER = re.compile(
    r"(?P<time>\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}日?\s+"
    rf"(?:{_MARK}\s*)?\d{{1,2}}:\d{{2}}(?::\d{{2}})?(?:\s?{_MARK})?)\s+(?P<speaker>[^\s-].*|-+[^\s-].*)"
)
_NAMELESS = re.compile(
    rf"(?P<time>\d{{4}}-\d{{2}}-\d{{2}} (?:{_MARK}\s*)?\d{{1,2}}:\d{{2}}:\d{{2}})(?P<speaker>)"
)
_ACCOUNT = re.compile(r"[(<（](?P<account>[^()<>（）]+)[)>）]\s*\Z")
_SYSTEM_ACCOUNTS = ("10000", "1000000", "系统消息", "80000000")
_BORDER = re.compile(r"={30,}")
_HEADING = ("消息对象:", "消息对象：", "消息分组:", "消息分组：")


def _recognise(head: Head) -> str:
    if is_exporter_text(head):
        return "开头有 QQChatExporter"
    if "Save by Tencent MsgMgr" in head.text[:300]:
        return "是 QQ 导出的 MHT"
    if head.json is not None:
        return "键像 QQ-chat-exporter 的 JSON" if is_exporter_json(head) else ""
    if any(line.startswith("消息记录（") for line in head.lines[:1]):
        return "开头是“消息记录”"
    headers = [line for line in head.lines[:40] if HEADER.fullmatch(line)]
    has_bodies = 3 * len(headers) <= 2 * len(head.lines[:40])
    if has_bodies and headers and (HEADER.fullmatch(head.lines[0]) or len(headers) > 2):
        return f"有 {headers[0][:40]!r} 这样的行，QQ、留痕、WeFlow 的 TXT 都是如此"
    return ""


def read_qq(file: TextIO, options: ReadOptions, head: Head) -> Iterator[Message]:
    """QQ 的各种导出。"""
    if head.json is not None:
        return read_exporter_json(file, head)
    if "Save by Tencent MsgMgr" in head.text[:300]:
        return _read_mht(file)
    if is_exporter_text(head):
        return read_exporter_text(file)
    return _read_headed(file)


def _read_headed(lines: Iterable[str]) -> Iterator[Message]:
    """``2023-01-02 20:15:30 昵称(号码)`` 一行，下面是正文。"""
    chat, header, number = "", None, 0
    body: list[str] = []
    previous, after_border = "", False
    for line_number, line in enumerate(lines, 1):
        plain = line.strip("\ufeff \t\r\n")
        match = HEADER.fullmatch(plain) or (_NAMELESS.fullmatch(plain) if not previous else None)
        is_border = bool(_BORDER.fullmatch(plain)) or (after_border and plain.startswith(_HEADING))
        if (match or is_border) and header:
            yield _headed(chat, header, body, number)
            header = None
        if match:
            header, number, body = match, line_number, []
        elif is_border and plain.startswith("消息对象"):
            chat = plain
        elif header:
            body.append(line)
        previous, after_border = plain, bool(_BORDER.fullmatch(plain))
    if header:
        yield _headed(chat, header, body, number)


def _headed(chat: str, header: re.Match, body: list[str], line: int) -> Message:
    """一条消息；号码比昵称可靠：人会改昵称。"""
    name = header["speaker"].strip()
    if len(name) > 2 and name[0] == name[-1] == "'":
        name = name[1:-1]
    found = _ACCOUNT.search(name)
    account = found["account"] if found else name
    return Message(
        speaker=account,
        times=parse_times(header["time"]),
        text="".join(body),
        chat=chat,
        name=name[: found.start()].strip() if found else name,
        is_me=name == "我",
        left_out="系统提示" if account in _SYSTEM_ACCOUNTS else "",
        line=line,
    )


class _MhtParser(HTMLParser):
    """QQ 的 MHT 里的表：每个 ``tr`` 是日期、说明或一条消息。"""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in ("tr", "table"):
            self.cells = [""]
        elif tag == "div" and self.cells:
            self.cells.append("")
        elif tag == "br" and self.cells:
            self.cells[-1] += "\n"
        elif tag == "img" and self.cells:
            self.cells[-1] += "[图片]"

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.cells:
            self.cells.append("")
        elif tag == "tr" and self.cells:
            self.rows.append([cell.strip("\xa0 \r\n") for cell in self.cells])
            self.cells = []

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def _read_mht(lines: Iterable[str]) -> Iterator[Message]:
    parser = _MhtParser()
    date = chat = ""
    is_html = False
    for number, line in enumerate(lines, 1):
        is_html = is_html or "<html" in line.lower()
        if not is_html:
            continue
        parser.feed(line)
        for cells in parser.rows:
            filled = [cell for cell in cells if cell]
            head = filled[0] if filled else ""
            if head.startswith("日期:") or head.startswith("日期："):
                date = head[3:].strip()
            elif head.startswith("消息对象"):
                chat = head
            elif len(filled) > 1 and (times := parse_times(f"{date} {filled[1]}")):
                found = _ACCOUNT.search(filled[0])
                account = found["account"] if found else filled[0]
                yield Message(
                    speaker=account,
                    times=times,
                    text="\n".join(filled[2:]),
                    chat=chat,
                    name=filled[0][: found.start()].strip() if found else filled[0],
                    is_me=filled[0] == "我",
                    left_out="系统提示" if account in _SYSTEM_ACCOUNTS else "",
                    line=number,
                )
        parser.rows = []
        if "</html>" in line.lower():
            return  # 后面是图片


QQ = Format("QQ 的 TXT、MHT，QQ-chat-exporter，留痕的 TXT", _recognise, read_qq, is_log=True)
