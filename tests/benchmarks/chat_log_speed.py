"""聊天记录的读取速度和内存：同一段造出来的三年聊天，写成三种导出格式。

python tests/benchmarks/chat_log_speed.py data/train.txt [--messages 300000 --avatars_mb 200]
每一格是 preprocess.py 一个新进程的用时和内存峰值；三个 .pkl 应当相同。
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import gmtime, strftime
from typing import NamedTuple

from preprocess_speed import ROOT, measure

YEARS = 3
PICTURE = 0.1  # 图片消息的比例
COLUMNS = ("id", "MsgSvrID", "type_name", "is_sender", "talker", "room_name", "msg", "CreateTime")


class Sent(NamedTuple):
    """造出来的一条消息。"""

    number: int
    seconds: int
    is_me: bool
    is_picture: bool
    text: str


def make_messages(corpus: Path, num: int) -> Iterator[Sent]:
    """num 条消息铺满三年：多数紧接着上一条，少数隔几小时。"""
    rng = random.Random(1)
    texts = [line for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    mean = YEARS * 365 * 86400 / num
    long_gap = 4 * 3600
    share = max(0.0, (mean - 66) / (long_gap - 66))
    seconds = 1_690_000_000
    for number in range(1, num + 1):
        seconds += long_gap if rng.random() < share else rng.choice((10, 20, 40, 60, 200))
        yield Sent(number, seconds, rng.random() < 0.5, rng.random() < PICTURE, rng.choice(texts))


def write_weflow_json(messages: list[Sent], path: Path, avatars_mb: int) -> None:
    """WeFlow 的详细 JSON，头像附在末尾。"""
    rows = [
        {
            "localId": sent.number,
            "createTime": sent.seconds,
            "formattedTime": strftime("%Y-%m-%d %H:%M:%S", gmtime(sent.seconds)),
            "type": "图片消息" if sent.is_picture else "文本消息",
            "localType": 3 if sent.is_picture else 1,
            "content": "[图片]" if sent.is_picture else sent.text,
            "isSend": int(sent.is_me),
            "senderUsername": "wxid_me" if sent.is_me else "wxid_a",
            "senderDisplayName": "我" if sent.is_me else "小明",
            "source": "",
        }
        for sent in messages
    ]
    avatars = {f"wxid_{i}": "data:image/jpeg;base64," + "A" * (1 << 20) for i in range(avatars_mb)}
    value = {"weflow": {"version": "1"}, "session": {"wxid": "wxid_a", "type": "私聊"}}
    value |= {"messages": rows, "avatars": avatars}
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


def write_csv(messages: list[Sent], path: Path) -> None:
    """PyWxDump 一类的 CSV。"""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for sent in messages:
            kind, text = ("图片", "") if sent.is_picture else ("文本", sent.text)
            talker = "wxid_me" if sent.is_me else "wxid_a"
            moment = strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(sent.seconds))
            row = (sent.number, sent.number, kind, int(sent.is_me), talker, "wxid_a", text, moment)
            writer.writerow(row)


def write_chatlab(messages: list[Sent], path: Path) -> None:
    """ChatLab 的 JSONL。"""
    with path.open("w", encoding="utf-8") as file:
        header = {"_type": "header", "chatlab": {"version": "0.0.2"}, "meta": {"name": "小明"}}
        file.write(json.dumps(header, ensure_ascii=False) + "\n")
        for sent in messages:
            row = {
                "_type": "message",
                "sender": "1" if sent.is_me else "2",
                "timestamp": sent.seconds,
                "type": 1 if sent.is_picture else 0,
                "content": None if sent.is_picture else sent.text,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="从这里面抽句子")
    parser.add_argument("--messages", type=int, default=300_000)
    parser.add_argument("--avatars_mb", type=int, default=200)
    args = parser.parse_args()
    messages = list(make_messages(args.corpus, args.messages))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weflow_json(messages, folder / "weflow.json", args.avatars_mb)
        write_csv(messages, folder / "wechat.csv")
        write_chatlab(messages, folder / "chatlab.jsonl")
        print("| 格式 | 大小 MB | 秒 | 内存峰值 MB |\n| --- | --- | --- | --- |", flush=True)
        results = []
        for path in (folder / "weflow.json", folder / "wechat.csv", folder / "chatlab.jsonl"):
            out = path.with_suffix(".pkl")
            command = [sys.executable, str(ROOT / "preprocess.py"), "--train_path", str(path)]
            command += ["--save_path", str(out), "--log_path", str(folder / "log")]
            seconds, memory = measure(command)
            size = path.stat().st_size / 1e6
            print(f"| {path.name} | {size:.0f} | {seconds:.1f} | {memory:.0f} |", flush=True)
            results.append(out.read_bytes())
        print(f"| 三个 .pkl 相同 | | {len(set(results)) == 1} | |")


if __name__ == "__main__":
    main()
