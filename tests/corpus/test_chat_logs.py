"""聊天记录：QQ 与微信的导出变成对话，各种杂项都不留下。"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from chitchat.corpus.formats.base import ReadOptions
from chitchat.corpus.reader import read_source
from chitchat.corpus.sources import find_sources

QQ = """消息记录（此消息记录为文本格式，不支持重新导入）

================================================================
消息分组:我的好友
================================================================
消息对象:小明
================================================================

2023-01-01 9:00:00 小明(12345)
在吗
还在睡？

2023-01-01 9:00:05 小明改名了(12345)
[图片]

2023-01-01 9:01:00 我(67890)
醒了[表情]

2023-01-01 9:01:10 我(67890)
what's up

2023-01-01 9:01:20 系统消息(10000)
对方撤回了一条消息

2023-01-01 9:02:00 小明(12345)
出来玩

2023-01-01 9:32:01 我(67890)
刚看到

2023-01-01 20:00:00 小明(12345)
晚上呢

2023-01-01 20:29:59 我(67890)
好

================================================================
消息对象:群
================================================================
2023-01-01 20:30:00 甲<a@qq.com>
谁去

2023-01-01 20:30:01 乙<b@qq.com>
我

2023-01-01 20:30:02 丙<c@qq.com>
[视频]

2023-01-01 20:30:03 甲<a@qq.com>
走
"""
QQ_DIALOGUES = [
    ["在吗 还在睡？", "醒了，what's up", "出来玩"],
    ["晚上呢", "好"],
    ["谁去", "我", "走"],
]


def read(path: Path, **options: object) -> list[list[str]]:
    source = find_sources([path])[0]
    return [dialogue.utterances for dialogue in read_source(source, ReadOptions(**options))]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16"])
def test_qq_export_gives_the_dialogues_written_by_hand(tmp_path, encoding):
    path = tmp_path / "小明.txt"
    path.write_bytes(QQ.replace("\n", "\r\n").encode(encoding))
    assert read(path) == QQ_DIALOGUES  # “刚看到”前后都是半小时以上的沉默，只有一个人


def test_longer_gap_joins_dialogues(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(QQ, encoding="utf-8")
    assert read(path, gap_minutes=24 * 60)[0] == [*QQ_DIALOGUES[0], "刚看到", "晚上呢", "好"]


def test_wechat_export_gives_the_dialogues_written_by_hand(tmp_path):
    """两个聊天交错；图片、表情包、语音、系统消息由 Type 认出。"""
    path = tmp_path / "messages.csv"
    names = ["localId", "TalkerId", "Type", "SubType", "IsSender", "CreateTime", "StrContent"]
    start = 1_700_000_000
    rows = [
        (1, 0, 0, "你好"),
        (2, 0, 3, '周末,来吗"哈"'),
        (1, 0, 5, "吃了吗"),
        (1, 1, 9, "吃了"),
        (3, 1, 10, "<msg>image</msg>"),
        (47, 1, 11, "<emoji/>"),
        (34, 1, 12, ""),
        (10000, 0, 13, "对方撤回了一条消息"),
        (1, 1, 14, "你呢\n[捂脸]"),
        (1, 1, 15, '"小明" 拍了拍我'),
        (1, 0, 16, "也吃了"),
        (1, 1, 16 + 1801, "在吗"),
        (1, 0, 16 + 1802, "[图片]"),
    ]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for number, (kind, is_sender, seconds, text) in enumerate(rows, 1):
            chat, kind = ("群", 1) if kind == 2 else ("小明", kind)
            writer.writerow([number, chat, kind, 0, is_sender, start + seconds, text])
        writer.writerow([99, "群", 1, 0, 1, start + 20, "wxid_abc:\n来"])
    expected = [["你好，吃了吗", "吃了，你呢 [捂脸]", "也吃了"], ['周末,来吗"哈"', "来"]]
    assert sorted(read(path)) == sorted(expected)


def test_named_columns_are_used(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "谁,何时,说\n甲,2024/1/2 3:04,早\n乙,2024-01-02 03:05:00,早啊\n", encoding="gb18030"
    )
    options = {"text_column": "说", "speaker_column": "谁", "time_column": "何时"}
    assert read(path, **options) == [["早", "早啊"]]
