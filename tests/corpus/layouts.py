"""同一个聊天，写成各种导出工具的样子；以及它应当变成的对话，另算一遍。"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

START = datetime(2026, 1, 2, 20, 15, 30)
NAMES = {"me": "我是谁", "a": "小明", "b": "阿珍: 珍"}
ACCOUNTS = {"me": "wxid_me000", "a": "wxid_aaa111", "b": "wxid_bbb222"}


class Said(NamedTuple):
    """一条消息：多少分钟之后，谁，什么种类，正文。"""

    minutes: float
    who: str
    kind: str
    text: str

    @property
    def time(self) -> datetime:
        return START + timedelta(minutes=self.minutes)

    @property
    def epoch(self) -> int:
        return int(self.time.timestamp())


CHAT = [
    Said(0, "a", "text", "在吗"),
    Said(1, "me", "text", "在的"),
    Said(2, "me", "text", "怎么啦"),
    Said(3, "a", "image", ""),
    Said(4, "a", "text", "订单已取消"),
    Said(5, "me", "text", "好可爱[捂脸]"),
    Said(6, "me", "recall", "你撤回了一条消息"),
    Said(7, "a", "text", "他拍了拍我的肩膀，我撤回了一条消息"),
    Said(20, "me", "sticker", ""),
    Said(36, "me", "text", "时间: 2点见"),
    Said(90, "a", "text", "只有我一个人说话"),
    Said(200, "me", "voice", ""),
    Said(201, "me", "text", "A: hi, “你好”"),
    Said(230, "a", "text", "ok"),
    Said(259, "me", "link", "https://example.com/a"),
    Said(259.5, "me", "text", "第一行"),
]


def expected(chat: Sequence[Said], gap_minutes: float = 30) -> list[list[str]]:
    """照 README 的规则另算一遍：只要文字，按时间，接起来，分段，一个人的不要。"""
    sessions: list[list[Said]] = []
    for said in sorted((s for s in chat if s.kind == "text"), key=lambda said: said.minutes):
        if sessions and said.minutes - sessions[-1][-1].minutes <= gap_minutes:
            sessions[-1].append(said)
        else:
            sessions.append([said])
    dialogues = []
    for session in sessions:
        turns: list[list[Said]] = []
        for said in session:
            if turns and turns[-1][-1].who == said.who:
                turns[-1].append(said)
            else:
                turns.append([said])
        if len(turns) > 1:
            dialogues.append([joined([said.text for said in turn]) for turn in turns])
    return dialogues


def joined(texts: list[str]) -> str:
    result = texts[0]
    for text in texts[1:]:
        result += ("，" if "\u4e00" <= result[-1] <= "\u9fff" else " ") + text
    return result


def to_csv(rows: list[list[object]], *, bom: bool = False, end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator=end).writerows(rows)
    return "\ufeff" * bom + out.getvalue()


WECLONE = {"text": "文本", "image": "图片", "recall": "消息撤回", "sticker": "动画表情",
           "voice": "语音", "link": "(分享)卡片式链接"}  # fmt: skip


def weclone_msg(chat: Sequence[Said]) -> str:
    header = [
        "id",
        "MsgSvrID",
        "type_name",
        "is_sender",
        "talker",
        "room_name",
        "msg",
        "src",
        "CreateTime",
    ]
    return to_csv([header, *(
        [i, 9000 + i, WECLONE[s.kind], int(s.who == "me"), ACCOUNTS[s.who], "room",
         s.text if s.kind == "text" else WECLONE[s.kind], "", f"{s.time:%Y/%-m/%-d %-H:%M}"]
        for i, s in enumerate(chat))])  # fmt: skip


def weclone_content(chat: Sequence[Said]) -> str:
    header = [
        "id",
        "MsgSvrID",
        "type_name",
        "is_sender",
        "talker",
        "room_name",
        "content",
        "CreateTime",
    ]
    return to_csv([header, *(
        [i, i, WECLONE[s.kind], int(s.who == "me"), ACCOUNTS["a"] if s.who == "me" else
         ACCOUNTS[s.who], "room", s.text or "x", f"{s.time:%Y-%m-%d %H:%M:%S}"]
        for i, s in enumerate(chat))])  # fmt: skip


def weflow_csv(chat: Sequence[Said]) -> str:
    header = ["id", "MsgSvrID", "type_name", "is_sender", "talker", "msg", "src", "CreateTime"]
    return to_csv([header, *(
        [i, i, WECLONE[s.kind], int(s.who == "me"), NAMES[s.who], s.text or f"[{WECLONE[s.kind]}]",
         "", f"{s.time.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}"]
        for i, s in enumerate(chat))], bom=True, end="\r\n")  # fmt: skip


MEMOTRACE = {"text": 1, "image": 3, "recall": 10000, "sticker": 47, "voice": 34, "link": 49}


def memotrace(chat: Sequence[Said], *, short: bool = False) -> str:
    names = "localId TalkerId Type SubType IsSender CreateTime Status StrContent StrTime"
    header = [*names.split(), "Remark", "NickName", "Sender"]
    rows = [
        [i, 1, MEMOTRACE[s.kind], 0, int(s.who == "me"), s.epoch, "",
         s.text or '<?xml version="1.0"?><msg/>', f"{s.time:%Y-%m-%d %H:%M:%S}",
         NAMES[s.who], NAMES[s.who], ACCOUNTS[s.who]]
        for i, s in enumerate(chat)]  # fmt: skip
    return to_csv([header, *([row[:9] for row in rows] if short else rows)], bom=True)


PLACEHOLDER = {"image": "[图片]", "sticker": "[动画表情]", "voice": "[语音]", "link": "[链接]",
               "recall": "[你撤回了一条消息]"}  # fmt: skip


def memotrace_txt(chat: Sequence[Said], quote: str = "") -> str:
    return "".join(f"{s.time:%Y-%m-%d %H:%M:%S} {quote}{NAMES[s.who]}{quote}\n"
                   f"{PLACEHOLDER.get(s.kind, s.text)}\n\n" for s in chat)  # fmt: skip


CHATLOG = {"image": "![图片](http://127.0.0.1:5030/image/a)", "voice": "[语音](http://x/v)",
           "sticker": "![动画表情](http://x/e)", "link": "[链接|一篇文章](https://example.com/a)",
           "recall": "[你撤回了一条消息]"}  # fmt: skip


def chatlog_csv(chat: Sequence[Said]) -> str:
    header = ["Time", "SenderName", "Sender", "TalkerName", "Talker", "Content"]
    return to_csv([header, *(
        [f"{s.time:%Y-%m-%d %H:%M:%S}", NAMES[s.who], ACCOUNTS[s.who], "小明", ACCOUNTS["a"],
         CHATLOG.get(s.kind, s.text)] for s in chat)])  # fmt: skip


def chatlog_json(chat: Sequence[Said]) -> str:
    return json.dumps([
        {"seq": i, "time": s.time.astimezone().isoformat(), "talker": ACCOUNTS["a"],
         "talkerName": "小明", "isChatRoom": False, "sender": ACCOUNTS[s.who],
         "senderName": NAMES[s.who], "isSelf": s.who == "me", "type": MEMOTRACE[s.kind],
         "subType": 5 if s.kind == "link" else 0, "content": s.text}
        for i, s in enumerate(chat)], ensure_ascii=False)  # fmt: skip


WEFLOW = {"text": "文本消息", "image": "图片消息", "recall": "系统消息", "sticker": "动画表情",
          "voice": "语音消息", "link": "卡片式链接"}  # fmt: skip


def weflow_json(chat: Sequence[Said], **header: object) -> str:
    session = {"wxid": "wxid_a", "type": "私聊", "avatar": "A" * 70_000}
    messages = [
        {"localId": i, "createTime": s.epoch, "formattedTime": f"{s.time:%Y-%m-%d %H:%M:%S}",
         "type": WEFLOW[s.kind], "localType": MEMOTRACE[s.kind], "content": s.text or None,
         "isSend": None if s.kind == "recall" else int(s.who == "me"),
         "senderUsername": ACCOUNTS[s.who], "senderDisplayName": NAMES[s.who]}
        for i, s in enumerate(chat)]  # fmt: skip
    avatars = {"wxid_a": "data:image/png;base64," + "B" * 1000}
    content = {**header, "session": session, "messages": messages, "avatars": avatars}
    return json.dumps(content, ensure_ascii=False, indent=1 if "weflow" in header else None)


def qq_txt(chat: Sequence[Said]) -> str:
    head = ("消息记录（此消息记录为文本格式，不支持重新导入）\n\n"
            + "=" * 64 + "\n消息分组:我的好友\n" + "=" * 64 + "\n消息对象:小明\n" + "=" * 64 + "\n\n")  # fmt: skip  # noqa: E501
    return head + "".join(
        f"{s.time:%Y-%m-%d %-H:%M:%S} {NAMES[s.who]}({'10000' if s.kind == 'recall' else s.who})\n"
        f"{PLACEHOLDER.get(s.kind, s.text)}\n\n" for s in chat)  # fmt: skip


def qq_mht(chat: Sequence[Said]) -> str:
    def escape(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(" ", "&nbsp;")

    rows, day = [], ""
    for s in chat:
        if day != f"{s.time:%Y/%-m/%-d}":
            day = f"{s.time:%Y/%-m/%-d}"
            rows.append(f"<tr><td style=color:#3568BB;>日期: {day}</td></tr>")
        body = "<IMG src={0}.dat>" if s.kind not in ("text", "recall") else escape(s.text)
        name = "系统消息(10000)" if s.kind == "recall" else escape(NAMES[s.who])
        rows.append(
            f"<tr><td><div style=padding-left:10px;><div style=float:left;>{name}</div>"
            f"{s.time:%-H:%M:%S}</div><div style=padding-left:20px;><font style=a>{body}</font>"
            "</div></td></tr>"
        )
    return (
        'From: <Save by Tencent MsgMgr>\nSubject: Tencent IM Message\nMIME-Version: 1.0\n'
        'Content-Type:multipart/related;\n\tboundary="x"\n\n--x\nContent-Type: text/html\n\n'
        "<html><body><table><tr><td><div>消息对象:小明</div></td></tr>\n"
        + "\n".join(rows) + "</table></body></html>\n\n--x\nContent-Type:image/gif\n\nR0lGODlh\n"
    )  # fmt: skip


def qce_txt(chat: Sequence[Said]) -> str:
    def block(s: Said) -> str:
        if s.kind == "text":
            body = f"内容: {s.text}"
        elif s.kind == "recall":
            body = "内容: [系统消息]"
        else:
            body = f"内容: [{s.kind}消息]\n资源: 1 个文件\n  - {s.kind}: a.dat"
        return f"{NAMES[s.who]}:\n时间: {s.time:%Y-%m-%d %H:%M:%S}\n{body}\n"

    head = ("[QQChatExporter V5 / https://github.com/shuakami/qq-chat-exporter]\n\n" + "=" * 47
            + "\n           QQ聊天记录导出文件\n" + "=" * 47 + "\n\n聊天名称: 小明\n"
            "时间范围: 2026-01-02 20:15:30 - 2026-01-04 05:39:30\n\n\n")  # fmt: skip
    foot = "\n\n" + "=" * 47 + "\n              导出完成\n" + "=" * 47 + "\n总计导出 16 条消息\n"
    return head + "\n\n".join(map(block, chat)) + foot


QCE = {"image": "[图片:a.jpg]", "sticker": "[表情消息]", "voice": "[语音:3秒]",
       "link": "[卡片消息]",
       "recall": "[系统消息]"}  # fmt: skip


def qce_message(i: int, s: Said, *, old: bool = False) -> dict:
    resources = [] if s.kind == "text" else [{"type": s.kind}]
    content = {"text": QCE.get(s.kind, s.text), "elements": [], "resources": resources}
    sender = {"uid": f"u_{s.who}", "uin": {"me": "10001", "a": "20002", "b": "3"}[s.who],
              "name": NAMES[s.who]}  # fmt: skip
    if old:
        stamp = f"{s.time.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}"
        return {"messageId": str(i), "timestamp": stamp, "sender": sender, "messageType": 2,
                "isSystemMessage": s.kind == "recall", "isRecalled": False, "content": content,
                "rawMessage": {"sendNickName": "昵称", "sendMemberName": NAMES[s.who]}}  # fmt: skip
    return {"id": str(i), "timestamp": 1000 * s.epoch, "sender": sender, "type": "type_1",
            "content": content, "recalled": False, "system": s.kind == "recall"}  # fmt: skip


QCE_HEADER = {
    "metadata": {"name": "QQChatExporter V5", "version": "5.5.0"},
    "chatInfo": {"name": "小明", "type": "private", "selfUid": "u_me", "selfUin": "10001"},
    "statistics": {"senders": [{"uid": "u_me", "messageCount": 3}]},
}


def qce_json(chat: Sequence[Said], *, old: bool = False) -> str:
    messages = [qce_message(i, s, old=old) for i, s in enumerate(chat)]
    return json.dumps({**QCE_HEADER, "messages": messages}, ensure_ascii=False, indent=2)


CHATLAB = {"text": 0, "image": 1, "recall": 81, "sticker": 5, "voice": 2, "link": 7}


def chatlab_messages(chat: Sequence[Said]) -> list[dict]:
    return [
        {"sender": ACCOUNTS[s.who], "accountName": NAMES[s.who], "timestamp": s.epoch,
         "type": CHATLAB[s.kind], "content": s.text or None} for s in chat]  # fmt: skip


CHATLAB_HEADER = {
    "chatlab": {"version": "0.0.2", "exportedAt": 1},
    "meta": {"name": "小明", "type": "private", "ownerId": ACCOUNTS["me"]},
}


def chatlab_json(chat: Sequence[Said]) -> str:
    members = [{"platformId": account, "avatar": "A" * 5000} for account in ACCOUNTS.values()]
    content = {**CHATLAB_HEADER, "members": members, "messages": chatlab_messages(chat)}
    return json.dumps(content, ensure_ascii=False)


def chatlab_jsonl(chat: Sequence[Said]) -> str:
    lines = [{"_type": "header", **CHATLAB_HEADER}, {"_type": "member", "platformId": "x"}]
    lines += [{"_type": "message", **message} for message in chatlab_messages(chat)]
    return "# 注释\n" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"


def telegram_messages(chat: Sequence[Said]) -> list[dict]:
    messages = []
    for i, s in enumerate(chat):
        message = {"id": i, "type": "message", "date": f"{s.time:%Y-%m-%dT%H:%M:%S}",
                   "date_unixtime": str(s.epoch), "from": NAMES[s.who], "from_id": f"user{s.who}",
                   "text": [{"type": "bold", "text": s.text[:1]}, s.text[1:]]}  # fmt: skip
        if s.kind == "recall":
            message |= {"type": "service", "actor": NAMES[s.who], "action": "pin_message"}
        elif s.kind == "link":
            message["text"] = [{"type": "link", "text": s.text}]
        elif s.kind != "text":
            message |= {"text": "", "photo": "a.jpg"}
        messages.append(message)
    return messages


def telegram_json(chat: Sequence[Said]) -> str:
    content = {
        "name": "小明",
        "type": "personal_chat",
        "id": 1,
        "messages": telegram_messages(chat),
    }
    return json.dumps(content, ensure_ascii=False, indent=1)


def telegram_account(chat: Sequence[Said]) -> str:
    saved = [Said(0, "me", "text", "记一下"), Said(1, "a", "text", "不是对话")]
    chats = [
        {"name": "收藏夹", "type": "saved_messages", "id": 9, "messages": telegram_messages(saved)},
        {"name": "小明", "type": "personal_chat", "id": 1, "messages": telegram_messages(chat)},
    ]
    content = {"about": "x", "personal_information": {"user_id": "me"}, "chats": {"list": chats}}
    return json.dumps(content, ensure_ascii=False)


WHATSAPP = {"image": "<省略影音内容>", "sticker": "贴图已略去", "voice": "audio omitted",
            "recall": "这条消息已删除"}  # fmt: skip


def whatsapp(chat: Sequence[Said], form: str) -> str:
    is_ios = form.startswith("[")
    lines = [
        (f"{START:{form}}" + ("小明: \u200e" if is_ios else "") + "消息和通话已进行端到端加密。")
    ]
    for s in chat:
        mark = "\u200e" if is_ios and s.kind != "text" else ""
        name = NAMES[s.who].replace(":", "")
        lines.append(f"{s.time:{form}}{name}: {mark}{WHATSAPP.get(s.kind, s.text)}")
    return "\r\n".join(lines) + "\r\n"


LINE = {"image": "[照片]", "sticker": "[贴图]", "voice": "[语音信息]"}


def line_txt(chat: Sequence[Said], date: str, clock: Callable[[datetime], str]) -> str:
    lines, day = ["[LINE] 与小明的聊天记录", "保存日期: 2026/01/30 22:10"], ""
    for s in chat:
        if day != f"{s.time:%Y%m%d}":
            day = f"{s.time:%Y%m%d}"
            weekday = "一二三四五六日"[s.time.weekday()]
            lines += ["", f"{s.time:{date}}".replace("周W", f"周{weekday}")]
        if s.kind == "recall":
            lines.append(f"{clock(s.time)}\t\t{NAMES[s.who]}已收回消息")
        else:
            lines.append(f"{clock(s.time)}\t{NAMES[s.who]}\t{LINE.get(s.kind, s.text)}")
    return "\n".join(lines) + "\n"


def discord(chat: Sequence[Said]) -> str:
    messages = [
        {"id": str(i), "type": "ChannelPinnedMessage" if s.kind == "recall" else "Default",
         "timestamp": s.time.astimezone().isoformat(timespec="milliseconds"),
         "content": s.text if s.kind in ("text", "link") else "",
         "author": {"id": s.who, "name": s.who, "nickname": NAMES[s.who], "isBot": False},
         "attachments": [{"url": "a.jpg"}] if s.kind == "image" else [], "embeds": []}
        for i, s in enumerate(chat)]  # fmt: skip
    content = {"guild": {"id": "0"}, "channel": {"id": "1", "name": "小明"}, "messages": messages}
    return json.dumps(content, ensure_ascii=False, indent=1)


def pm(time: datetime) -> str:
    return ("下午" if time.hour >= 12 else "上午") + f"{(time.hour - 1) % 12 + 1:02}:{time:%M}"


LAYOUTS: dict[str, tuple[str, Callable[[Sequence[Said]], str]]] = {
    "weclone_msg": ("a.csv", weclone_msg),
    "weclone_content": ("a.csv", weclone_content),
    "weflow_csv": ("a.csv", weflow_csv),
    "weflow_json": ("a.json", lambda chat: weflow_json(chat, weflow={"version": "1"})),
    "echotrace": ("a.json", weflow_json),
    "ciphertalk": ("a.json", lambda chat: weflow_json(chat, exportInfo={"generator": "Cipher"})),
    "memotrace": ("a.csv", memotrace),
    "memotrace_short": ("a.csv", lambda chat: memotrace(chat, short=True)),
    "memotrace_txt": ("a.txt", memotrace_txt),
    "weflow_txt": ("a.txt", lambda chat: memotrace_txt(chat, quote="'")),
    "chatlog_csv": ("a.csv", chatlog_csv),
    "chatlog_json": ("a.json", chatlog_json),
    "qq_txt": ("a.txt", qq_txt),
    "qq_mht": ("a.mht", qq_mht),
    "qce_txt": ("a.txt", qce_txt),
    "qce_json": ("a.json", qce_json),
    "qce_json_v4": ("a.json", lambda chat: qce_json(chat, old=True)),
    "chatlab_json": ("a.json", chatlab_json),
    "chatlab_jsonl": ("a.jsonl", chatlab_jsonl),
    "telegram": ("result.json", telegram_json),
    "telegram_account": ("result.json", telegram_account),
    "whatsapp_ios": ("a.txt", lambda chat: whatsapp(chat, "[%Y/%-m/%-d %H:%M:%S] ")),
    "whatsapp_android": ("a.txt", lambda chat: whatsapp(chat, "%Y/%-m/%-d %H:%M - ")),
    "whatsapp_us": ("a.txt", lambda chat: whatsapp(chat, "[%-m/%-d/%y, %-I:%M:%S\u202f%p] ")),
    "whatsapp_gb": ("a.txt", lambda chat: whatsapp(chat, "%d/%m/%Y, %H:%M - ")),
    "line": ("a.txt", lambda chat: line_txt(chat, "%Y/%-m/%-d周W", lambda t: f"{t:%H:%M}")),
    "line_pm": ("a.txt", lambda chat: line_txt(chat, "%Y.%m.%d %A", pm)),
    "line_en": ("a.txt", lambda chat: line_txt(chat, "%a, %-m/%-d/%Y", lambda t: f"{t:%-I:%M%p}")),
    "discord": ("a.json", discord),
}  # fmt: skip
WITHOUT_SECONDS = ("weclone_msg", "whatsapp_android", "whatsapp_gb", "line", "line_pm", "line_en")
WITHOUT_ME = ("qq_txt", "qq_mht", "whatsapp_ios", "whatsapp_android", "whatsapp_us", "whatsapp_gb",
              "line", "line_pm", "line_en", "discord", "telegram", "memotrace_txt", "weflow_txt",
              "qce_txt")  # fmt: skip
WITHOUT_NAMES = ("memotrace_short",)
