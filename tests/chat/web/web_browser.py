"""打开网页的浏览器：网页测试的 fixture 和动作；缺什么时，导入它的测试跳过。"""

from __future__ import annotations

import shutil
import threading
import time

import pytest
from serving import wait_for

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import Engine
from chitchat.chat.generation import Batch
from chitchat.chat.options import SamplingOptions

for package in ("starlette", "uvicorn", "playwright.sync_api"):
    pytest.importorskip(package)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("没有 chromium", allow_module_level=True)
REPLY = "早上好，吃饭了吗"
OPTIONS = SamplingOptions(max_len=20, max_history_len=5, temperature=0.7)


@pytest.fixture(scope="session")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def parrot(make_parrot, tokenizer) -> Chatbot:
    model = make_parrot(REPLY)
    return Chatbot(Engine(model.config.to_dict(), model.state_dict()), tokenizer)


@pytest.fixture
def pace(monkeypatch) -> dict[str, float]:
    """每一步等多少秒；测试里可以改。"""
    step, settings = Batch.step, {"seconds": 0.0}
    main = threading.main_thread()

    def wait_first(self):
        if threading.current_thread() is not main:
            time.sleep(settings["seconds"])
        return step(self)

    monkeypatch.setattr(Batch, "step", wait_first)
    return settings


@pytest.fixture
def url(start_server, parrot, pace) -> str:
    return start_server(parrot, options=OPTIONS).url


@pytest.fixture
def page(browser, url):
    """打开的页面；结束时不能有脚本的错误，也不能问过别的服务器。"""
    context = browser.new_context(accept_downloads=True, color_scheme="light")
    context.set_default_timeout(15_000)
    page = context.new_page()
    problems, asked = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.problems = problems
    page.goto(url)
    yield page
    context.close()
    assert problems == []
    assert all(address.startswith((url, "data:", "blob:")) for address in asked)


def say(page, text: str) -> None:
    page.get_by_label("要说的话").fill(text)
    page.keyboard.press("Enter")


def wait_until_said(page) -> None:
    page.get_by_role("button", name="发送", exact=True).wait_for()


def wait_until(page, expression: str) -> None:
    """页面的 CSP 不许 eval，所以不能用 wait_for_function。"""
    wait_for(lambda: page.evaluate(expression) or page.wait_for_timeout(20))


def texts(page) -> list[str]:
    return page.locator(".bubble").all_text_contents()
