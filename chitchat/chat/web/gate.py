"""谁可以进来：Host、Origin、钥匙、请求体的大小；每个请求一行日志。都是 ASGI 的外层。"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse

from chitchat.chat.web.errors import ApiError, shown

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, object]
Receive = Callable[[], Awaitable[MutableMapping[str, object]]]
Send = Callable[[MutableMapping[str, object]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 1_000_000  # 字节
MAX_DRAINED = 8 * MAX_BODY  # 太大的请求体，读到这么多还没有完就关掉连接
LOOPBACK = ("127.0.0.1", "localhost", "::1")
RETRY_SECONDS = 2
CLIENT_CLOSED = 499  # 对方没等完就走了；日志里的写法与 nginx 相同


def is_loopback(host: str) -> bool:
    """是不是本机的名字或地址：只有本机连得上。"""
    return host.lower() in LOOPBACK or re.fullmatch(r"127(\.\d{1,3}){1,3}", host) is not None


def busy(message: str, code: str) -> ApiError:
    """忙不过来，状态 503，过一会儿再来。"""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def error_response(error: ApiError) -> JSONResponse:
    """错误的响应。"""
    return JSONResponse(error.body, error.status, headers=error.headers)


class RequestLog:
    """每个请求一行日志：地址、状态、秒数，以及里面的人写进 ``scope["notes"]`` 的。"""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """转交里层，看着它的状态；对方没等到最后就走了，就是 499。"""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, notes = time.perf_counter(), 500, {}
        is_gone = is_complete = False
        scope["notes"] = notes

        async def listen() -> MutableMapping[str, object]:
            nonlocal is_gone
            message = await receive()
            is_gone |= message["type"] == "http.disconnect" and not is_complete
            return message

        async def watch(message: MutableMapping[str, object]) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                is_complete = True
            await send(message)

        try:
            await self._app(scope, listen, watch)
        except Exception:
            logger.exception("request failed")
        finally:
            client = (scope.get("client") or ("-",))[0]
            extra = "".join(f" {name}={value}" for name, value in notes.items())
            path = str(scope["path"]).encode("unicode_escape").decode()[:200].replace(" ", "%20")
            logger.info(
                "client=%s method=%s path=%s status=%d seconds=%.3f%s",
                client, scope["method"], path, CLIENT_CLOSED if is_gone else status,
                time.perf_counter() - start, extra,
            )  # fmt: skip


class Gate:
    """不该进来的，在门口就说清楚。"""

    def __init__(
        self, app: App, *, hosts: frozenset[str] | None, api_key: str | None, cors: str | None
    ) -> None:
        """准备检查。

        Args:
            app: 里层。
            hosts: Host 里可以有的名字；None 表示不限（不在本机，由钥匙把关）。
            api_key: 钥匙；None 表示不要。
            cors: 哪个网站的网页可以用，``*`` 是全部；None 表示只有自己的网页。
        """
        self._app = app
        self._hosts = hosts
        self._api_key = api_key
        self._cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """检查过了才转交里层。"""
        if scope["type"] == "http":
            try:
                if scope.get("state", {}).get("is_refused"):  # 由 Connection 写上
                    raise busy("连接太多，请稍后再试", "too_many_connections")
                self._check(Request(scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        headers = request.headers
        host = _host_of(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts and not is_loopback(host):
            message = (
                f"Host 是 {shown(host or '空的')}：这里只接受 {'、'.join(sorted(self._hosts))}"
            )
            raise ApiError(421, message, code="wrong_host")
        self._check_origin(headers)
        # 不用 request.url：旧的 starlette 由 Host 拼出它，写坏的 Host 会让路径变空。
        path = request.scope["path"]
        if self._api_key is not None and path.startswith("/v1/"):
            given = headers.get("authorization", "")
            wanted = f"Bearer {self._api_key}"
            if not secrets.compare_digest(given.encode("latin-1", "replace"), wanted.encode()):
                found = "不对" if given else "没有给"
                raise ApiError(
                    401, f"钥匙{found}：请在 Authorization 里写 Bearer 加上 --api_key 的值",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or self._cors in ("*", origin):
            return
        if _netloc_of(origin) != headers.get("host"):
            message = f"别处的网页不能用这个服务器：要让它用，启动时加 --cors {shown(origin)}"
            raise ApiError(403, message, code="wrong_origin")


def _netloc_of(origin: str) -> str:
    """Origin 里的主机和端口；写坏了是空串。"""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _host_of(header: str) -> str:
    """Host 里的名字，没有端口和方括号，小写。"""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def read_body(request: Request) -> bytes:
    """读 JSON 的请求体。

    太大的也读一段再拒绝，只是不留着：客户端多半要写完才肯读回答，不读就关会让它只见到连接断了。

    Raises:
        ApiError: 类型不对，或太大。
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type 应为 application/json，得到 {shown(kind or '空的')}"
        raise ApiError(415, message, code="unsupported_media_type")
    body, num_bytes = b"", 0
    async for part in request.stream():
        num_bytes += len(part)
        body = body + part if num_bytes <= MAX_BODY else b""
        if num_bytes > MAX_DRAINED:
            break
    if num_bytes <= MAX_BODY:
        return body
    message = f"请求体最多 {MAX_BODY} 字节"
    raise ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
