"""请求的毛病：OpenAI 格式的错误和它的 HTTP 状态。"""

from __future__ import annotations

import json

MAX_SHOWN = 80  # 错误里最多照抄对方几个字


class ApiError(Exception):
    """要告诉对方的错误。"""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """准备错误。

        Args:
            status: HTTP 状态。
            message: 一句话：哪里、得到什么、应该怎样。
            param: 请求里的哪个字段。
            code: 给程序看的代号。
            headers: 另外的响应头。
        """
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(value: object) -> str:
    """错误里照抄的值，JSON 的写法，太长的截去。"""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:  # 勉强读得进来的深度，写不出去
        text = "……"
    # JSON 里可以写出半个 emoji，它不是文字，发不出去
    text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
    return text.encode("utf-8", "replace").decode()


def invalid(param: str | None, message: str) -> ApiError:
    """某个字段不对，状态 400。"""
    where = f"{param}：" if param else ""
    return ApiError(400, f"{where}{message}", param=param, code="invalid_value")
