"""QQ-chat-exporter（QCE）。

- TXT：``昵称:``、``时间: …``、``内容: …`` 各一行，还可以有“资源”“提及”“回复”；
- JSON：``metadata``、``chatInfo``、``messages``，消息的 ``content`` 是对象；V4 的时间戳是字符串，
  另有 ``isSystemMessage``、``isRecalled``、``rawMessage``；
- 分块的 JSONL：清单 manifest.json 和 chunks 文件夹。
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from chitchat.corpus.formats.base import Head
from chitchat.corpus.formats.json_values import iterate_items, iterate_lines
from chitchat.corpus.messages import Message, kind_of_type
from chitchat.corpus.times import parse_times

_QCE_TIME = re.compile(r"时间[:：]\s*(?P<time>\d{4}\D.*)")
_MESSAGE_NUMBER = re.compile(r"\n\[\d+\]\s*\Z")  # 下一条的序号，在它的昵称之前
_QCE_FIELDS = ("内容", "类型", "资源", "提及", "回复")


def is_exporter_text(head: Head) -> bool:
    """开头有它的名字，或有“时间: …”紧跟着“内容: …”的两行。"""
    if any("QQ聊天记录导出文件" in line or "QQChatExporter V" in line for line in head.lines[:6]):
        return head.json is None
    lines = head.lines[:40]
    return any(
        _QCE_TIME.fullmatch(line) and after.startswith(("内容:", "类型:"))
        for line, after in itertools.pairwise(lines)
    )


def is_exporter_json(head: Head) -> bool:
    """由第一条消息的样子，或没有消息时由最外层的键认出。"""
    shape = head.json
    for record in (shape.record, shape.first.get("messages.item"), _second(head)):
        record = record if isinstance(record, dict) else {}
        if isinstance(record.get("sender"), dict) and isinstance(record.get("content"), dict):
            return True
    return {"chatInfo", "metadata"} <= set(shape.keys.get("", []))


def _second(head: Head) -> Any:
    """分块的 JSONL 第一行是清单，第二行才是消息。"""
    if not head.json.is_lines:
        return None
    with head.open_text() as file:
        values = (value for _, value in iterate_lines(file))
        first = next(values, None)
        is_manifest = isinstance(first, dict) and "chatInfo" in first
        return next(values, None) if is_manifest else None


def read_exporter_text(lines: Iterable[str]) -> Iterator[Message]:
    """``昵称:`` 一行，``时间: …`` 一行，``内容: …`` 起是正文，到下一个“昵称、时间”为止。"""
    previous, name, times, number = "", "", (), 0
    fields: dict[str, str] = {}
    field = ""
    for line_number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        match = _QCE_TIME.fullmatch(line.strip())
        if match and previous.rstrip().endswith((":", "：")):
            if name:
                fields[field] = fields.get(field, "").removesuffix(previous + "\n")
                yield _qce_text(name, times, fields, number)
            name = previous.strip()[:-1]
            times, number, fields, field = parse_times(match["time"]), line_number, {}, ""
        elif name:
            key, mark, rest = line.partition(":")
            if mark and key in _QCE_FIELDS and key not in fields and (key == "内容" or field):
                field, line = key, rest
            elif line.startswith("=====") and "导出完成" not in line:
                if name and field:
                    yield _qce_text(name, times, fields, number)
                name, field = "", ""
                continue
            fields[field] = fields.get(field, "") + line + "\n"
        previous = line
    if name:
        yield _qce_text(name, times, fields, number)


def _qce_text(name: str, times: tuple, fields: dict[str, str], line: int) -> Message:
    return Message(
        speaker=name,
        times=times,
        text=_MESSAGE_NUMBER.sub("", fields.get("内容", "")),
        name=name,
        left_out=kind_of_type("系统") if fields.get("类型", "").strip() == "system" else "",
        line=line,
    )


_QCE_KINDS = {
    "audio": "语音", "sticker": "表情包", "market_face": "表情包", "reply": "", "at": "",
    "face": "", "text": "", "recall": "撤回",
}  # fmt: skip


def read_exporter_json(file: TextIO, head: Head) -> Iterator[Message]:
    """JSON 与分块的 JSONL。"""
    shape = head.json
    me = {str(shape.scalars.get(f"chatInfo.{key}") or "") for key in ("selfUid", "selfUin")}
    if shape.is_lines:
        records = (value for _, value in iterate_lines(file))
    else:
        is_list = isinstance(shape.first.get("item"), dict)
        records = iterate_items(file, "item" if is_list else "messages.item")
    for record in records:
        if not isinstance(record, dict):
            continue
        if isinstance(info := record.get("chatInfo"), dict):  # 分块 JSONL 的第一行
            me = {str(info.get("selfUid") or ""), str(info.get("selfUin") or "")}
        elif isinstance(record.get("sender"), dict):
            yield _qce_message(record, me - {""})


def _qce_message(record: dict[str, Any], me: set[str]) -> Message:
    sender, content = record["sender"], record.get("content")
    content = content if isinstance(content, dict) else {"text": content}
    raw = record.get("rawMessage") if isinstance(record.get("rawMessage"), dict) else {}
    accounts = [str(sender[key]) for key in ("uin", "uid") if sender.get(key)]
    text = str(content.get("text") or "")
    left_out = ""
    if record.get("recalled") or record.get("isRecalled"):
        left_out = "撤回"
    elif record.get("system") or record.get("isSystemMessage"):
        left_out = "系统提示"
    elif not str(kind := record.get("type") or "").startswith("type_"):
        left_out = kind_of_type(str(kind))
    if not left_out and (resources := content.get("resources")):
        kinds = {str(item.get("type")) for item in resources if isinstance(item, dict)}
        rest = re.sub(r"\[[^\[\]]*\]", "", text).strip()
        if not rest:  # 图片之外没有话；有话的，占位的部分由 clean_message 去掉
            kind = min(kinds, default="")
            left_out = _QCE_KINDS.get(kind) or kind_of_type(kind) or "其他"
    return Message(
        speaker=accounts[0] if accounts else str(raw.get("senderUin") or sender.get("name") or ""),
        times=parse_times(str(record.get("timestamp") or record.get("time") or "")),
        text=text,
        name=str(raw.get("sendMemberName") or sender.get("name") or raw.get("sendNickName") or ""),
        is_me=bool(me & set(accounts)),
        left_out=left_out,
        has_type=True,
    )
