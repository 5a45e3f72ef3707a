"""网页：一个静态文件；只许它自己的脚本和样式，不从别处取任何东西。"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


def content_security_policy(html: str) -> str:
    """只允许页面里现有的脚本和样式，只能与自己的服务器往来。"""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [hashlib.sha256(body.encode()).digest() for body in bodies]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def load_page() -> Callable[[Request], Awaitable[Response]]:
    """读入网页，给出回答 ``/`` 的函数。"""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def show(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return show
