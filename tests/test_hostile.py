"""有意捣乱的输入：一句话说清楚，时间和内存都有限；终端和日志不被它带坏。"""

from __future__ import annotations

import fnmatch
import gzip
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import preprocess
from chitchat import cli
from chitchat.chat.transcript import Transcript
from chitchat.chat.whole_files.partial_replies import PartialReplies
from chitchat.checkpoint import load_model, load_model_tokenizer, save_checkpoint
from chitchat.corpus import sources
from chitchat.corpus.reader import read_dialogues
from chitchat.errors import UserError
from chitchat.files import atomic_file
from chitchat.tokens.token_table import load_token_table
from chitchat.tokens.tokenizer import load_tokenizer
from chitchat.visible import one_visible_line, visible


def read(path: Path) -> list[list[str]]:
    return list(read_dialogues(path))


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1"])
@pytest.mark.parametrize("before", ["", '[["你好","好"],'])
def test_deep_json_takes_little_memory(content, before, tmp_path):
    path = tmp_path / "deep.json"
    path.write_text(before + content, encoding="utf-8")
    tracemalloc.start()
    with pytest.raises(UserError, match="JSON 套了"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "checksums.json"])
def test_deep_json_in_a_model_folder_is_one_sentence(name, make_model, tokenizer, tmp_path):
    save_checkpoint(tmp_path / "model", make_model(), tokenizer)
    (tmp_path / "model" / name).write_text("[" * 100_000)
    read = load_model_tokenizer if name == "tokenizer.json" else lambda path, _: load_model(path)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read(str(tmp_path / "model"), None)


def test_deep_json_beside_the_data_is_one_sentence(tmp_path):
    for name in ("tokens", "offsets"):
        np.save(tmp_path / f"{name}.npy", np.arange(3))
    (tmp_path / "meta.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"meta\.json"):
        load_token_table(tmp_path, 13317)
    (tmp_path / "out.part").write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"out\.part"):
        PartialReplies(tmp_path / "out.part", {"input_path": "x"}, 0)


def test_brackets_in_messages_are_not_depth(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text('[["' + "[" * 5000 + '","\\"' + "{" * 5000 + '"]]', encoding="utf-8")
    assert read(path) == [["[" * 5000, '"' + "{" * 5000]]


def test_brackets_in_strings_across_blocks_are_not_depth(tmp_path):
    path = tmp_path / "talk.json"
    dialogues = [["区间 [0,5) 呢", "是 [1,5)"], ["字" * 65_600 + "[" * 600, "好\\"]] * 3000
    path.write_text(json.dumps(dialogues[:1] * 5000 + dialogues[:20]), encoding="utf-8")
    assert read(path) == dialogues[:1] * 5000 + dialogues[:20]
    path.write_text(("[" * 300 + '"字"' * 0 + " " * 70_000) * 3, encoding="utf-8")
    with pytest.raises(UserError, match="JSON 套了"):
        read(path)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write("你好\n好\n\n".encode())
        for _ in range(64):
            file.write(b"a" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb.txt.gz：有一行超过 1 MB"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("newline", ["\n", "\r", "\r\n"])
def test_long_files_of_short_lines_are_read(newline, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "train.txt"
    path.write_bytes(newline.join(["你好" * 100, "好", ""] * 2000).encode())
    assert read(path) == [["你好" * 100, "好"]] * 2000


def test_one_line_of_json_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 18)
    path = tmp_path / "talk.json"
    path.write_text("[" + ",".join(['["你好","好"]'] * 50_000) + "]", encoding="utf-8")
    assert path.stat().st_size > 2 * sources.MAX_LINE_BYTES
    assert len(read(path)) == 50_000


@pytest.mark.parametrize("place", [10, 11, 30])
def test_damage_inside_a_gz_is_one_sentence(place, tmp_path):
    data = bytearray(gzip.compress(("你好\n好\n\n" * 50).encode()))
    data[place] ^= 0xFF
    path = tmp_path / "talk.txt.gz"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"talk\.txt\.gz"):
        read(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("talk.txt.zst", "cut"), ("talk.txt.zst", "flipped"), ("talk.txt.zst", "second cut")),
        *(("talk.tar.zst", "cut"), ("talk.tar.zst", "flipped")),
    ],
)
def test_damage_inside_a_zst_is_one_sentence(name, damage, tmp_path):
    """断了的 zst，zstandard 照样读出前一半；坏了的，它抛出的异常不是 OSError。"""
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"你好{i}\n好{i * i}\n\n" for i in range(3000)).encode()
    if ".tar" in name:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            info = tarfile.TarInfo("a.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
        text = packed.getvalue()
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(text))
    if damage == "flipped":
        data[-1] ^= 1  # 校验和
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        data += data[:20]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"talk\.\w+\.zst.* 读不出来（.*请重新下载"):
        read(path)


def test_a_zst_that_unpacks_to_gigabytes_takes_little_memory(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "bomb.txt.zst"
    path.write_bytes(zstandard.compress("你好\n好\n\n".encode() + b"a" * (1 << 27)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb.txt.zst：有一行超过 1 MB"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


def test_a_zip_whose_names_are_damaged_is_one_sentence(tmp_path):
    path = tmp_path / "talk.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("聊天.txt", "你好\n好\n")
    path.write_bytes(path.read_bytes().replace("聊".encode(), b"\xfe\xfe\xfe"))
    with pytest.raises(UserError, match=r"talk\.zip"):
        read(path)


@pytest.mark.parametrize("encoding", ["auto", "utf-8"])
@pytest.mark.parametrize("place", ["offset of the directory", "flags", "version"])
def test_a_zip_whose_directory_is_damaged_is_one_sentence(place, encoding, tmp_path):
    """目录记错了文件从哪里开始，或像有密码、要不认得的版本；指定了编码也一样。"""
    path = tmp_path / "talk.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "你好\n好\n")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    if place == "offset of the directory":
        data[data.index(b"PK\5\6") + 16] += 4  # zipfile 由它推算，会去读 -4
    elif place == "flags":
        data[directory + 8] |= 0x20  # 打补丁的数据
    else:
        data[directory + 6] = 99
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"talk\.zip"):
        preprocess.main(["--train_path", str(path), "--encoding", encoding, "--check"])


def test_a_bad_byte_before_a_damaged_end_is_one_sentence(tmp_path):
    path = tmp_path / "talk.csv.gz"
    text = "时间,昵称,内容\n".encode() + b"2024,\xff\xfe,\xe4\n" + bytes(range(48, 123)) * 4000
    path.write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(UserError, match=r"talk\.csv\.gz"):
        read(path)


def test_an_utterance_as_long_as_a_book_is_refused(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([["你好", "好"], ["长" * 1_000_001, "好"]]), encoding="utf-8")
    with pytest.raises(UserError, match=r"talk.json：第 2 段对话里有一句长 1,000,001 个字"):
        read(path)


LOAD_TABLE = """
import resource, sys
from pathlib import Path
from chitchat.errors import UserError
from chitchat.tokens.token_table import load_token_table
path, limit = sys.argv[1:]
if limit:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + int(limit)
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
before = resource.getrlimit(resource.RLIMIT_AS)
try:
    load_token_table(Path(path), 13317)
except UserError as error:
    print(error)
assert resource.getrlimit(resource.RLIMIT_AS) == before
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def load_table(path: Path, limit: str = "") -> tuple[str, int]:
    """在另一个进程里读 train.pkl，limit 是至多再用多少字节；给出说的话，和占过多少 KB。"""
    ended = subprocess.run(
        [sys.executable, "-c", LOAD_TABLE, str(path), limit],
        cwd=Path(preprocess.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    sentence, peak = ended.stdout.splitlines()
    return sentence, int(peak)


SHORT_OF_MEMORY = (
    "读不进内存：内存不够，或文件被改坏了；请重新运行 python preprocess.py，--save_path"
)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_pickle_that_asks_for_gigabytes_takes_little_memory(tmp_path):
    """LONG_BINPUT 把一项存到第五亿格：C 的 unpickler 会先把两倍的格都造出来，八 GB。"""
    path = tmp_path / "train.pkl"
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\x1f(]r\x01\0\0\0(KeK\x05Kfee.")
    sentence, peak = load_table(path)
    assert sentence.startswith(f"{path} {SHORT_OF_MEMORY}")
    assert peak < 1_500_000  # KB，包括本来就有的


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_good_pickle_under_a_memory_limit_is_not_called_untrusted(tmp_path):
    path = tmp_path / "train.pkl"
    path.write_bytes(pickle.dumps([[*range(300, 1300)] for _ in range(3000)]))
    sentence, _ = load_table(path, limit=str(50 << 20))
    assert sentence.startswith(f"{path} {SHORT_OF_MEMORY}")
    assert "--save_path 不以 .pkl 结尾" in sentence
    assert "ulimit -v" in sentence


def test_offsets_whose_differences_overflow_are_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(9, dtype=np.uint16))
    huge = 2**63 - 1
    np.save(tmp_path / "offsets.npy", np.array([0, huge, -2, 9]))  # 相减全是正的
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="两个数组对不上"):
        load_token_table(tmp_path, 13317)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "sample.txt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"sample\.txt"):
        Transcript(tmp_path).add("user", "你好")
    with pytest.raises(OSError, match=r"train\.pkl"), atomic_file(tmp_path / "train.pkl"):
        Path("/dev/full").write_text("满")
    replies = PartialReplies(tmp_path / "out.part", {"input_path": "x"}, 0)
    replies.add([(0, "好")])
    replies._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"out\.part"):
        replies.add([(1, "在")])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("shell", "named"),
    [
        ("{} --train_path ../a.txt --check > /dev/full", "标准输出"),
        ("export PYTHONUNBUFFERED=1; {} --train_path ../a.txt --check > /dev/full", "标准输出"),
        ("ulimit -f 512; cat ../big.txt | {} --train_path - --check", "*/stdin"),
        ("{} --train_path - --check < /proc/self/mem", "标准输入"),
        ("rmdir $PWD; {} --train_path ../a.txt --save_path b.pkl", "当前文件夹（已经被删去）"),
    ],
)
def test_errors_without_a_name_say_what_they_are_about(shell, named, tmp_path):
    (tmp_path / "a.txt").write_text("你好\n好\n", encoding="utf-8")
    (tmp_path / "here").mkdir()
    script = f"{sys.executable} {Path(preprocess.__file__).resolve()}"
    (tmp_path / "big.txt").write_text("你好\n好\n\n" * 80_000, encoding="utf-8")
    command = shell.format(script).replace("../", f"{tmp_path}/")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert fnmatch.fnmatch(done.stderr.splitlines()[-1], f"错误：读写 {named} 失败：*")


@pytest.mark.skipif(sys.platform == "win32", reason="没有这种限制")
def test_a_full_temporary_folder_is_one_sentence(tmp_path):
    """排序用的临时库超出 16 MB 的缓存就要写盘，而文件不许超过 1 MB。"""
    code = """
import resource, signal
from chitchat.corpus.sorting import group_rows
from chitchat.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    list(group_rows((str(number), "字" * 200, number) for number in range(60_000)))
except UserError as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(preprocess.__file__).parent,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    start = f"临时文件夹 {tmp_path} 写不下（disk I/O error）：请清出空间，或用环境变量 TMPDIR"
    assert ended.stdout.startswith(start), ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_in_a_zip_are_refused(tmp_path):
    path = tmp_path / "talk.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for text in ("第一份\n好\n", "第二份\n好\n"):
            archive.writestr("a.txt", text)
    with pytest.raises(UserError, match=r"2 个都叫 a.txt 的文件"):
        read(path)


def test_shared_lists_in_a_pickle_are_refused(tmp_path):
    path = tmp_path / "train.pkl"
    row = [101, *range(200, 300), 102]
    path.write_bytes(pickle.dumps([list(row) for _ in range(20)] * 4))  # 过采样，无妨
    assert len(load_token_table(path, 13317)) == 80
    path.write_bytes(pickle.dumps([row * 10] * 100_000))
    with pytest.raises(UserError, match="反复引用"):
        load_token_table(path, 13317)
    path.write_bytes(pickle.dumps([list(row) for _ in range(100)]))
    assert len(load_token_table(path, 13317)) == 100


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="没有这个设备")
def test_a_device_is_no_vocabulary():
    with pytest.raises(UserError, match="/dev/zero 不是普通文件"):
        load_tokenizer(Path("/dev/zero"))


@pytest.mark.skipif(sys.platform == "win32", reason="没有这种 shell")
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(closed, tmp_path):
    root = Path(preprocess.__file__).parent
    (tmp_path / "train.txt").write_text("你好\n好\n", encoding="utf-8")
    command = (
        f'"{sys.executable}" "{root / "preprocess.py"}" --vocab_path "{root / "vocab/vocab.txt"}" '
        "--train_path {} --save_path a.pkl --log_path log " + closed
    )
    codes = [
        subprocess.run(command.format(name), shell=True, cwd=tmp_path, check=False).returncode
        for name in ("train.txt", "nothing.txt")
    ]
    assert codes == [0, 2]
    assert len(pickle.loads((tmp_path / "a.pkl").read_bytes())) == 1


@pytest.mark.parametrize("text", ["9" * 30, "-" + "9" * 30, "1e30", "0x" + "f" * 30])
def test_absurd_integers_are_refused(text):
    with pytest.raises(Exception, match=r"应为.*整数") as error:
        cli.bounded(int, minimum=0)(text)
    assert type(error.value).__name__ == "ArgumentTypeError"


def test_control_and_bidi_characters_are_shown():
    text = "红\x1b[31m\x07\x9b名\u202e倒\u2066字\u200f好👍🏽❤️\n\t"
    shown = "红\\x1b[31m\\x07\\x9b名\\u202e倒\\u2066字\\u200f好👍🏽❤️"
    assert visible(text) == shown + "\n\t"
    assert one_visible_line(text) == shown + "\\x0a\\x09"
    assert one_visible_line("一\u2028二\r三") == "一\\u2028二\\x0d三"


def test_names_of_others_cannot_drive_the_terminal(tmp_path, capsys, caplog):
    path = tmp_path / "红\x1b[31m\u202e.csv"
    path.write_text("列\x1b[2J,\u202e列\n1,2\n3,4\n", encoding="utf-8")
    arguments = ["--train_path", str(path), "--log_path", str(tmp_path / "log")]
    arguments += ["--save_path", str(tmp_path / "a.pkl")]
    with pytest.raises(SystemExit) as stopped:
        cli.run_cli(lambda: preprocess.main(arguments))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "\\x1b[2J" in message
    assert "\\u202e" in message
    assert not {"\x1b", "\u202e"} & set(message)


def test_a_log_record_is_one_line(tmp_path):
    cli.configure_logging(tmp_path / "log", console=False)
    logging.getLogger("chitchat.test").info("name=%s", "a\nb\x1b[31m")
    cli.configure_logging(None, console=False)
    lines = (tmp_path / "log").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 2
    assert lines[0].endswith("INFO name=a\\x0ab\\x1b[31m")
