"""hub 上的模型：认出它的名字，取不到时说清什么毛病。"""

from __future__ import annotations

from pathlib import Path


def is_hub_name(name: str) -> bool:
    """像 ``用户/模型`` 那样，而且本地没有这样的路径。"""
    path = Path(name)
    return name.count("/") == 1 and not path.exists() and not path.parent.is_dir()


def explain_hub_error(name: str, error: BaseException) -> str:
    """把取 hub 上的模型时的异常变成一句话：什么毛病，怎样改。"""
    kinds = set()
    cause: BaseException | None = error
    while cause is not None:
        kinds.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if kinds & {"GatedRepoError"}:
        reason = "它要先申请：请在它的网页上同意条款，再用 hf auth login 登录"
    elif kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        reason = "hub 上没有它，或它是私有的：请改正名字，私有的先用 hf auth login 登录"
    elif kinds & {"EntryNotFoundError", "RemoteEntryNotFoundError"}:
        reason = "hub 上的它缺少 config.json 或权重：请换一个 GPT-2 模型"
    else:
        reason = (
            "又没能从 hub 取到：请检查名字、网络和磁盘，去掉 HF_HUB_OFFLINE，连不上时可设 "
            "HF_ENDPOINT 换镜像，或在别处下载好整个文件夹再给出它的路径"
        )
    return f"没有文件夹 {name}，{reason}"
