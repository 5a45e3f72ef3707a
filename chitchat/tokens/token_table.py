"""token 表：全部对话的 token id，由 train.pkl 读入，或由文件夹映射进内存。

形状记号: D 对话总数   N token 总数
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chitchat.checksums import find_damage, is_same_size
from chitchat.errors import UserError
from chitchat.files import parse_json
from chitchat.tokens.token_writer import META_NAME, OFFSETS_NAME, TOKENS_NAME, meta_path

# 每个 token 在文件里至少一字节；反复引用同一个列表的，展开来至多是文件的这么多倍。
MAX_SHARING = 100
SPARE_BYTES = 1 << 28  # 很小的文件也要这么多才读得动


@dataclass(frozen=True)
class TokenTable:
    """全部对话的 token，首尾相接存成一个数组，比 list[list[int]] 省内存几十倍。

    Attributes:
        tokens: 形状 (N,)，无符号整数。
        offsets: 形状 (D+1,)，int64；第 i 段对话是 ``tokens[offsets[i]:offsets[i+1]]``。
        folder: 由这个文件夹映射来；None 表示在内存里。
        stamp: 映射时各文件的大小和修改时间；文件夹后来换了内容就对不上。
    """

    tokens: np.ndarray
    offsets: np.ndarray
    folder: Path | None = None
    stamp: tuple[tuple[int, int], ...] = ()

    def __reduce__(self) -> tuple:
        """映射来的只写下路径：spawn 之下，读数据的子进程自己映射，不必收下整个语料。"""
        if self.folder is None:
            return TokenTable, (self.tokens, self.offsets)
        return _map_again, (self.folder, self.stamp)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """每段对话的 token 数，形状 (D,)，int64。"""
        return np.diff(self.offsets)

    @classmethod
    def from_dialogues(
        cls, dialogues: Iterable[Sequence[int]], dtype: np.dtype | type = np.uint32
    ) -> TokenTable:
        """由 token id 列表的列表构造，每个 id 以 dtype 存放。"""
        rows = [np.asarray(token_ids, dtype=dtype) for token_ids in dialogues]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows) if rows else np.zeros(0, dtype), offsets)


class _ListUnpickler(pickle.Unpickler):
    """只认列表和整数的 Unpickler：train.pkl 里不需要任何类，有类就拒绝，代码不会被执行。"""

    def find_class(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"{module}.{name}")


def load_token_table(path: Path, vocab_size: int, vocab_fingerprint: str = "") -> TokenTable:
    """读 train.pkl，或映射 preprocess.py 写出的文件夹，检查内容，返回 token 表。

    文件夹只映射进内存：各进程共用，多大的语料都一样。

    Args:
        path: preprocess.py 生成的 .pkl 文件或文件夹。
        vocab_size: 模型的词表大小，所有 token id 必须小于它。
        vocab_fingerprint: 训练所用词表的指纹；与语料的说明里记的不同就拒绝，空串表示不查。

    Raises:
        UserError: 不存在、已损坏、带有代码、没有对话、id 越界，或词表与预处理时的不同。
    """
    if path.is_dir() and (path / META_NAME).is_file():
        return _map_folder(path, vocab_size, vocab_fingerprint)
    if not path.is_file():
        raise UserError(
            f"找不到训练数据 {path}：请先运行 python preprocess.py，或用 --train_path 指定"
        )
    meta = _read_meta(meta_path(path)) if meta_path(path).is_file() else {}
    described = list(_files_of(meta).values())  # 只有一项；文件可以改名
    is_ours = bool(described) and _check_damage(path, described[0], meta_path(path))
    dialogues = _load_lists(path)
    smallest = min(min(row) for row in dialogues)
    largest = max(max(row) for row in dialogues)
    if smallest < 0 or largest >= vocab_size:
        raise UserError(
            f"{path} 里的 token id 从 {smallest} 到 {largest}，超出词表大小 {vocab_size}："
            "预处理和训练用的词表不同，请用同一个 --vocab_path 重新运行 python preprocess.py"
        )
    table = TokenTable.from_dialogues(dialogues, np.min_scalar_type(vocab_size - 1))
    # 数目也对不上，就是别的工具后来改写的，那份说明不是它的。
    counts = (meta.get("dialogues"), meta.get("tokens"))
    if is_ours or counts == (len(table), len(table.tokens)):
        _check_vocab(path, meta, vocab_fingerprint)
    return table


def is_encoded_with(path: Path, vocab_fingerprint: str) -> bool:
    """训练数据的说明里是否记着它用这份词表编码；没有说明时是 False。"""
    if not meta_path(path).is_file():
        return False
    return _read_meta(meta_path(path)).get("vocab_fingerprint") == vocab_fingerprint


def _load_lists(path: Path) -> list[list[int]]:
    """读 train.pkl 里不空的对话，只认列表和整数。"""
    advice = "请重新运行 python preprocess.py"
    try:
        with path.open("rb") as file, _bounded_memory(MAX_SHARING * path.stat().st_size):
            dialogues = _ListUnpickler(file).load()
    except MemoryError as error:
        raise UserError(
            f"{path} 读不进内存：内存不够，或文件被改坏了；{advice}，"
            "--save_path 不以 .pkl 结尾就写成文件夹，读它不占内存；或放宽 ulimit -v"
        ) from error
    except Exception as error:  # 损坏的 pickle 可以抛出任何异常
        if str(error).startswith("invalid load key"):  # 第一个字节就不是 pickle
            raise UserError(
                f"{path} 不是训练数据，像是语料：请先用 python preprocess.py --train_path {path} "
                "--save_path data/train.pkl 编码，再用 --train_path data/train.pkl 训练"
            ) from error
        raise UserError(
            f"{path} 不是可信的 train.pkl，没有读取：应当只含列表和整数，"
            f"发现 {str(error) or type(error).__name__}；{advice}"
        ) from error
    if isinstance(dialogues, list) and _count_tokens(dialogues) > MAX_SHARING * path.stat().st_size:
        raise UserError(
            f"{path} 里反复引用同一个列表，展开来会撑爆内存：{advice}，"
            "或用 [list(row) for row in rows] 展开之后再存"
        )
    is_nested_list = isinstance(dialogues, list) and all(isinstance(row, list) for row in dialogues)
    if not is_nested_list or not all(type(token) is int for row in dialogues for token in row):
        raise UserError(f"{path} 的内容不是 list[list[int]]；{advice}")
    if all(len(row) < 2 for row in dialogues):  # 只有 [CLS]，没有要预测的 token
        raise UserError(f"{path} 里没有对话；请检查 preprocess.py 的 --train_path 指向的语料")
    return [row for row in dialogues if row]


@contextlib.contextmanager
def _bounded_memory(num_bytes: int) -> Iterator[None]:
    """至多再用这么多字节和 SPARE_BYTES，超出就是 MemoryError；没有 /proc 的系统上不限。

    pickle 里一条几个字节的指令就能让它先要下几十 GB，那时还没有内容可以检查。
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + num_bytes + SPARE_BYTES
    lower = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _count_tokens(dialogues: list) -> int:
    return sum(len(row) for row in dialogues if isinstance(row, list))


def _map_folder(path: Path, vocab_size: int, vocab_fingerprint: str) -> TokenTable:
    """映射文件夹里的两个数组；编码时用的词表不大于模型的，id 就不会越界。"""
    meta = _read_meta(path / META_NAME)
    _check_vocab(path, meta, vocab_fingerprint)
    advice = "请重新运行 python preprocess.py"
    try:
        table = _map_arrays(path)
    except Exception as error:  # 损坏的文件头可以让 numpy 抛出各种异常
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"训练数据 {path} 已损坏（{reason}）；{advice}") from error
    tokens, offsets = table.tokens, table.offsets
    is_whole = (
        tokens.ndim == offsets.ndim == 1
        and tokens.dtype.kind == "u"
        and offsets.dtype == np.int64
        and len(offsets) > 1
        and offsets[0] == 0
        and offsets[-1] == len(tokens)
        and offsets.min() >= 0  # 不然几个极大的数相减会溢出，看起来也是递增的
        and bool(np.all(np.diff(offsets) > 0))
    )
    if not is_whole:
        raise UserError(f"训练数据 {path} 已损坏（两个数组对不上）；{advice}")
    for name in (TOKENS_NAME, OFFSETS_NAME):
        _check_damage(path / name, _files_of(meta).get(name), path / META_NAME)
    claimed = meta.get("vocab_size")
    largest = max(claimed if isinstance(claimed, int) else 0, int(tokens.max()) + 1)
    if largest > vocab_size:
        raise UserError(
            f"{path} 是用 {largest} 项的词表编码的，超出模型的词表大小 {vocab_size}："
            "请用同一个 --vocab_path 重新运行 python preprocess.py"
        )
    return table


def _files_of(meta: dict) -> dict:
    files = meta.get("files")
    return files if isinstance(files, dict) else {}


def _check_damage(path: Path, described: object, note: Path) -> bool:
    """核对 note 里记下的校验和；返回这个文件是不是它说的那一个，还没有被别的工具改写。

    Raises:
        UserError: 已损坏。
    """
    if not isinstance(described, dict) or not is_same_size(path, described):
        return False
    if damage := find_damage(path, described):
        raise UserError(
            f"训练数据 {path} 已损坏（{damage}）：请重新运行 python preprocess.py；"
            f"要是你自己改的，就删去 {note} 里的 files 一项"
        )
    return True


def _map_arrays(folder: Path) -> TokenTable:
    paths = [folder.absolute() / name for name in (TOKENS_NAME, OFFSETS_NAME)]
    tokens, offsets = (np.load(path, mmap_mode="r") for path in paths)
    stats = [path.stat() for path in paths]
    stamp = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    return TokenTable(tokens, offsets, folder.absolute(), stamp)


def _map_again(folder: Path, stamp: tuple[tuple[int, int], ...]) -> TokenTable:
    """在另一个进程里映射同一个文件夹。"""
    table = _map_arrays(folder)
    if table.stamp != stamp:
        raise UserError(
            f"训练数据 {folder} 在训练途中被改写了：请放回原来的再用 --resume，或重新训练"
        )
    return table


def _read_meta(path: Path) -> dict:
    try:
        meta = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"训练数据的说明 {path} 已损坏（{error}）；请重新运行 python preprocess.py"
        ) from error
    return meta if isinstance(meta, dict) else {}


def _check_vocab(path: Path, meta: dict, vocab_fingerprint: str) -> None:
    saved = meta.get("vocab_fingerprint", "")
    if vocab_fingerprint and saved and saved != vocab_fingerprint:
        raise UserError(
            f"{path} 是用另一份词表编码的（{meta.get('vocab_path', '未记下')}，"
            f"{meta.get('vocab_size', '?')} 项）：请把 --vocab_path 换成那一份，"
            "或用现在的词表重新运行 python preprocess.py"
        )
