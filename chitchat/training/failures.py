"""训练时会碰到的两种失败：内存放不下，--compile 编译不了；都变成一句话。"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from chitchat.errors import UserError

# CPU 和 cuBLAS 申请不到内存时，抛出的只是 RuntimeError，由文字认出
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """GPU 显存不足，或 CPU 上申请不到内存。"""
    is_sign = any(sign in str(error) for sign in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or is_sign


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """把放不下模型、编译不了变成用户看得懂的一句话。

    Raises:
        UserError: 上面两种；别的异常原样抛出。
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        if is_out_of_memory(error):
            raise UserError(
                f"放不下模型和优化器（{reason}）：请换小一些的模型，或关掉占用内存、显存的别的程序"
            ) from error
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        raise UserError(
            f"--compile 编译不了模型（{reason}）：它要用 C++ 编译器，请装上 g++，或去掉 --compile"
        ) from error
