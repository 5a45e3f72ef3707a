"""聊天记录：一个聊天写成各种工具的样子，都读出手算的那些对话；怪处也一样。"""

from __future__ import annotations

import json
import random
import time
import zipfile
from pathlib import Path

import pytest
from layouts import (
    ACCOUNTS,
    CHAT,
    LAYOUTS,
    NAMES,
    QCE_HEADER,
    WITHOUT_ME,
    WITHOUT_NAMES,
    WITHOUT_SECONDS,
    Said,
    expected,
    memotrace,
    qce_message,
    qq_txt,
    telegram_messages,
    weclone_msg,
    weflow_json,
    whatsapp,
)

from chitchat.corpus.formats.base import ReadOptions
from chitchat.corpus.reader import read_source
from chitchat.corpus.sources import find_sources
from chitchat.corpus.tally import Tally


def read(path: Path, tally: Tally | None = None, **options: object) -> list[list[str]]:
    return [
        dialogue.utterances
        for source in find_sources([path])
        for dialogue in read_source(source, ReadOptions(**options), tally)
    ]


def write(folder: Path, layout: str, chat: list[Said]) -> Path:
    name, render = LAYOUTS[layout]
    path = folder / name
    path.write_text(render(chat), encoding="utf-8", newline="")
    return path


def to_minute(chat: list[Said], layout: str) -> list[Said]:
    """这种写法没有秒时，时刻只到分。"""
    if layout not in WITHOUT_SECONDS:
        return chat
    return [said._replace(minutes=int(said.minutes + 0.5) - 0.5) for said in chat]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_dialogues(layout, tmp_path):
    tally = Tally()
    path = write(tmp_path, layout, CHAT)
    assert read(path, tally) == expected(to_minute(CHAT, layout))
    kept = sum(said.kind == "text" for said in CHAT)
    assert tally.num_messages - tally.left_out.total() == kept
    assert tally.left_out.total() >= len(CHAT) - kept  # WhatsApp 另有一行提示


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("who", ["me", "a"])
def test_replies_are_those_of_the_chosen_speaker(layout, who, tmp_path):
    names = [NAMES[who]] if layout not in WITHOUT_NAMES else []
    if layout.startswith("weclone"):  # 只有账号；旧版里两个人的账号都写成对方的
        names = [ACCOUNTS[who]] if layout == "weclone_msg" else []
    names += ["me"] if who == "me" and layout not in WITHOUT_ME else []
    sides = []  # 另算：去掉开头他自己的、结尾别人的
    for dialogue, first in zip(expected(to_minute(CHAT, layout)), ("a", "me"), strict=True):
        start = int(first == who)
        end = len(dialogue) - (len(dialogue) - start) % 2
        sides += [dialogue[start:end]] if end - start > 1 else []
    path = write(tmp_path, layout, CHAT)
    for name in names:
        assert read(path, reply_speaker=name) == sides


@pytest.mark.parametrize("layout", ["weclone_msg", "weflow_json", "qce_json", "chatlab_jsonl"])
def test_in_a_group_everybody_else_is_the_other_side(layout, tmp_path):
    chat = [
        Said(0, "me", "text", "早"),
        Said(1, "a", "text", "早啊"),
        Said(2, "b", "text", "都早"),
        Said(3, "me", "text", "吃了吗"),
        Said(4, "b", "text", "吃了"),
    ]
    path = write(tmp_path, layout, chat)
    assert read(path) == [["早", "早啊", "都早", "吃了吗", "吃了"]]
    assert read(path, reply_speaker="me") == [["早啊，都早", "吃了吗"]]
    assert read(path, reply_speaker="没有这个人") == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_out_of_order_are_put_in_order(layout, tmp_path):
    if layout.startswith("line"):
        pytest.skip("日期独占一行，次序由行定")
    shuffled = random.Random(1).sample(CHAT, len(CHAT))
    for chat in (CHAT[::-1], shuffled):
        path = write(tmp_path, layout, [said for said in chat if said.minutes != 259.5])
        wanted = [said for said in to_minute(CHAT, layout) if said.text != "第一行"]
        assert read(path) == expected(wanted)


def test_chats_in_one_file_never_mix(tmp_path):
    other = [Said(0.5, "me", "text", "另一个聊天"), Said(1.5, "a", "text", "是的")]
    rows = weclone_msg(CHAT).splitlines()
    more = [row.replace(",room,", ",别处,") for row in weclone_msg(other).splitlines()[1:]]
    path = tmp_path / "a.csv"
    mixed = [row for pair in zip(rows[1:], more, strict=False) for row in pair]
    path.write_text("\n".join([rows[0], *mixed, *rows[3:]]), encoding="utf-8")
    wanted = [*expected(to_minute(CHAT, "weclone_msg")), ["另一个聊天", "是的"]]
    assert sorted(read(path)) == sorted(wanted)


def test_chunks_of_one_export_are_one_chat(tmp_path):
    folder = tmp_path / "导出[1]"
    (folder / "chunks").mkdir(parents=True)
    manifest = {**QCE_HEADER, "chunked": {"format": "chunked-jsonl", "chunksDir": "chunks"}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "avatars.json").write_text('{"u_a": "data:image/png;base64,AAAA"}')
    for number, part in enumerate((CHAT[:4], CHAT[4:])):
        lines = [json.dumps(qce_message(i, s), ensure_ascii=False) for i, s in enumerate(part)]
        path = folder / "chunks" / f"c{number:06}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
    for path in (folder, folder / "manifest.json", folder / "*.json"):
        found = [d for d in read(path) if d[0] != "avatars"] if path.name != "*.json" else None
        assert found in (None, expected(CHAT))
    assert read(folder, reply_speaker="me")[0][0] == "在吗"


def test_excel_sheet_with_lines_above_the_header_is_read(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["会话信息"])
    sheet.append(["微信ID", "wxid_a", "", "昵称", "小明"])
    sheet.append(["序号", "时间", "发送者", "微信ID", "消息类型", "消息内容"])
    kinds = {"text": "文本消息", "recall": "系统消息"}
    for i, said in enumerate(CHAT):
        kind = kinds.get(said.kind, "图片消息")
        sheet.append([i, said.time, NAMES[said.who], said.who, kind, said.text])
    path = tmp_path / "小明.xlsx"
    book.save(path)
    assert read(path) == expected(CHAT)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(path, "小明.txt")


@pytest.mark.parametrize(
    ("kind", "content", "kept"),
    [
        ("引用消息", "记得带伞[引用 阿花：在的]", "记得带伞"),
        ("引用消息", "[引用消息]", ""),
        ("文本消息", "wxid_abc123:\n大家好", "大家好"),
        ("文本消息", "「小明：在吗」\n- - - - - - - - - - - - - - -\n好的", "好的"),
        ("文本消息", '"小明" 拍了拍我', ""),
        ("文本消息", "我通过了你的朋友验证请求，现在我们可以开始聊天了", ""),
        ("文本消息", "看这个 https://a.b/c 好笑吗", "看这个 好笑吗"),
        ("文本消息", "我的电话是13800138000", "我的电话是某个号码"),
        ("红包卡片", "恭喜发财", ""),
        ("聊天记录合并转发", "群聊的聊天记录", ""),
        ("通话消息", "通话时长 01:02", ""),
        ("未知类型(318767153)", "x", ""),
    ],
)
def test_what_is_a_message_in_wechat(kind, content, kept, tmp_path):
    messages = json.loads(weflow_json([Said(0, "a", "text", "一"), Said(1, "me", "text", "二")]))
    messages["messages"][1] |= {"type": kind, "content": content}
    messages["messages"].append({**messages["messages"][0], "createTime": CHAT[3].epoch})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    assert read(path) == ([["一", kept, "一"]] if kept else [])


def test_multi_line_messages_and_unnamed_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("2026/1/2 20:15 - 张三 创建了群组\n2026/1/2 20:15 - 张三: 第一行\n第二行\n"
                    "2026/1/2 20:16 - 李四: <附件：a.jpg>\n好看吗\n"
                    "2026/1/2 20:17 - +86 138 0013 8000: 好\u200e<此消息已编辑>\n",
                    encoding="utf-8")  # fmt: skip
    assert read(path) == [["第一行 第二行", "好看吗", "好"]]
    path.write_text('[LINE] 与小明的聊天记录\n2026/1/2(金)\n'
                    '20:15\t甲\t"第一行\n2026/1/3\n""引""号"\n'
                    "20:16\t乙\t好\n20:17\t\t乙加入群聊\n", encoding="utf-8")  # fmt: skip
    assert read(path) == [['第一行 2026/1/3 "引"号', "好"]]


def test_whatsapp_day_and_month_are_told_by_the_evidence(tmp_path):
    """前十二天里日与月分不清：由后面的日期、由时间是否向前认定。"""
    chat = [Said(60 * 24 * day + minute, who, "text", f"{day}{who}")
            for day in range(0, 40, 3) for minute, who in ((0, "a"), (1, "me"))]  # fmt: skip
    for form in ("%d/%m/%Y, %H:%M - ", "%m/%d/%Y, %H:%M - "):
        path = tmp_path / "a.txt"
        path.write_text(whatsapp(chat, form), encoding="utf-8")
        tally = Tally()
        assert read(path, tally) == expected(chat)
        assert abs(tally.last - chat[-1].epoch) < 60


def test_saved_messages_and_unreliable_ids(tmp_path):
    path = tmp_path / "result.json"
    chats = [{"name": n, "type": "personal_chat", "id": 7, "messages": telegram_messages(CHAT)}
             for n in ("x", "y")]  # fmt: skip
    path.write_text(json.dumps({"about": "", "chats": {"list": chats}}), encoding="utf-8")
    assert read(path) == 2 * expected(CHAT)
    rows = memotrace(CHAT).splitlines()
    rows[2:] = [row.replace(",1,", f",{i % 3},", 1) for i, row in enumerate(rows[2:])]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(rows), encoding="utf-8")
    assert read(path) == expected(CHAT)


def test_nothing_is_explained_by_the_step_that_lost_it(tmp_path):
    for chat, words in (
        ([], "没有一条消息"),
        ([Said(0, "a", "image", "")], "都不是话"),
        ([Said(0, "a", "text", "一"), Said(1, "a", "text", "二")], "一个人说的"),
        ([Said(0, "a", "text", "一"), Said(90, "me", "text", "二")], "--gap_minutes"),
    ):
        tally = Tally()
        path = write(tmp_path, "weflow_json", chat)
        assert read(path, tally) == []
        assert words in tally.explain_nothing()
    path = tmp_path / "a.csv"
    path.write_text(memotrace([Said(i, "a", "text", "一") for i in range(9)], short=True))
    tally = Tally()
    assert read(path, tally) == []
    assert "9 条消息，都没有说话人" in tally.explain_nothing()


def test_join_seconds_parts_what_came_too_late(tmp_path):
    chat = [Said(0, "a", "text", "一"), Said(3, "a", "text", "二"), Said(3.5, "me", "text", "三")]
    path = tmp_path / "a.txt"
    path.write_text(qq_txt(chat), encoding="utf-8")
    assert read(path) == [["一，二", "三"]]
    assert read(path, join_seconds=60) == [["二", "三"]]


def test_private_chats_in_one_file_never_mix(tmp_path):
    """留痕：除自己以外不止一人时看 TalkerId；旧版 PyWxDump 没有 room_name，talker 就是对方。"""
    rows = ["localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime,Remark,"
            "NickName,Sender"]  # fmt: skip
    old = ["id,MsgSvrID,type_name,is_sender,talker,msg,src,CreateTime"]
    for i, (chat, who, text) in enumerate(
        [(1, "a", "甲问"), (2, "b", "乙问"), (1, "me", "答甲"), (2, "me", "答乙")]
    ):
        name = f"wxid_{who}"
        rows.append(
            f"{i},{chat},1,0,{int(who == 'me')},{1700000000 + i},,{text},,{who},{who},{name}"
        )
        partner = "wxid_a" if chat == 1 else "wxid_b"
        old.append(f"{i},{i},文本,{int(who == 'me')},{partner},{text},,2026-01-02 20:15:{i:02}")
    for lines in (rows, old):
        path = tmp_path / "a.csv"
        path.write_text("\n".join(lines), encoding="utf-8")
        assert read(path) == [["甲问", "答甲"], ["乙问", "答乙"]]
        assert len(read(path, reply_speaker="me")) == 2


def test_tables_with_a_session_column_or_a_date_column_are_logs(tmp_path):
    path = tmp_path / "a.csv"
    for header, rows in (
        ("会话,发送人,时间,内容", ("x,甲,2026-01-02 20:15:30,电话13800138000",
                            "x,乙,2026-01-02 20:16:30,好", "x,甲,2026-02-02 20:16:30,在")),
        ("日期,时间,发送人,内容", ("2026-01-02,20:15:30,甲,电话13800138000",
                            "2026-01-02,20:16:30,乙,好", "2026-02-02,20:16:30,甲,在")),
    ):  # fmt: skip
        path.write_text("\n".join([header, *rows]), encoding="utf-8")
        assert read(path) == [["电话某个号码", "好"]]


def test_conversations_in_json_rows_never_mix(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [(1, "甲问"), (2, "乙问"), (1, "答甲"), (2, "答乙")]
    for fields in (
        lambda i: {"sender": f"s{i // 2}", "time": f"2026-01-02 20:{i:02}",
                   "content": turns[i][1], "session_id": turns[i][0]},
        lambda i: {"conversation_id": turns[i][0], "speaker": "x", "text": turns[i][1]},
    ):  # fmt: skip
        lines = [json.dumps(fields(i), ensure_ascii=False) for i in range(4)]
        path.write_text("\n".join(lines), encoding="utf-8")
        assert read(path) == [["甲问", "答甲"], ["乙问", "答乙"]]


def test_body_that_looks_like_a_border_stays_and_a_nameless_header_parts(tmp_path):
    path = tmp_path / "a.txt"
    chat = [Said(0, "a", "text", "=====\n消息对象:谁"), Said(1, "me", "text", "在")]
    nameless = "2026-01-02 20:17:30 \n名字是空的\n\n"
    path.write_text(qq_txt(chat) + nameless, encoding="utf-8")
    assert read(path) == [["===== 消息对象:谁", "在", "名字是空的"]]


def test_calls_and_other_languages_are_left_out(tmp_path):
    path = tmp_path / "a.txt"
    lines = [
        "02.01.26, 20:15 - Anna: Hallo",
        "02.01.26, 20:16 - Ben: <Medien ausgeschlossen>",
        "02.01.26, 20:16 - Ben: Diese Nachricht wurde gelöscht.",
        '02.01.26, 20:17 - Anna änderte den Betreff von "a: b" zu "c: d"',
        "02.01.26, 20:18 - Ben: Hi \u200e<attached: a.jpg>",
        "02.01.26, 20:19 - Anna: null",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read(path) == [["Hallo", "Hi"]]
    lines = ["[LINE] x", "2026/1/2(金)", "20:15\t甲\t☎ 通話時間 1:23", "20:16\t甲\t在",
             "20:17\t乙\t☎ 未接來電", "20:18\t乙\t好"]  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read(path) == [["在", "好"]]


def test_a_notice_of_two_lines_in_line_is_left_out(tmp_path):
    lines = ["[LINE] x", "2026/1/2(金)", "20:14\t甲加入了群组", "请大家欢迎", "20:15\t甲\t在吗",
             "20:16\t乙\t在"]  # fmt: skip
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read(path) == [["在吗", "在"]]


def test_long_lines_take_no_longer_than_their_length(tmp_path):
    """二十万字的一条消息，各种反复的字符：每种都在几秒之内。"""
    for piece in ("1", "QUJD", " ", "[引用 ", "<title>", "\u200e", "> ", "「甲：", "@a."):
        text = piece * (200_000 // len(piece)) + "x"
        chat = [Said(0, "a", "text", text), Said(1, "me", "text", "好")]
        path = write(tmp_path, "whatsapp_ios", chat)
        started = time.monotonic()
        read(path)
        assert time.monotonic() - started < 5, piece
