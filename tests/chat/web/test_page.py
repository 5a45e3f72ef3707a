"""网页在真的浏览器里：要 playwright 和 chromium，缺一个就跳过。"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from web_browser import (
    OPTIONS,
    REPLY,
    say,
    texts,
    wait_until,
    wait_until_said,
)

from chitchat.corpus.reader import read_dialogues

pytest_plugins = ["web_server", "web_browser"]
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>"
ARABIC = "مرحبا"


def test_typing_streams_the_reply(page, pace):
    pace["seconds"] = 0.1
    say(page, "你好")
    page.get_by_role("button", name="停止").wait_for()
    seen = set()
    while page.get_by_role("button", name="停止").is_visible():
        seen.add(texts(page)[-1])
    assert texts(page) == ["你好", REPLY]
    assert len(seen) > 3
    assert all(REPLY.startswith(text) for text in seen)
    assert page.get_by_label("要说的话").input_value() == ""
    assert page.locator("#title").text_content() == "你好"


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_keeps_what_was_said(way, page, pace):
    pace["seconds"] = 0.15
    say(page, "你好")
    wait_until(page, "document.querySelectorAll('.bubble')[1]?.textContent.length > 1")
    if way == "button":
        page.get_by_role("button", name="停止").click()
    else:
        page.keyboard.press("Escape")
    wait_until_said(page)
    question, answer = texts(page)
    assert question == "你好"
    assert REPLY.startswith(answer)
    assert answer != REPLY
    assert page.get_by_text("停在这里").is_visible()
    pace["seconds"] = 0
    page.get_by_role("button", name="重新回答").click()
    wait_until(page, "!document.querySelector('[aria-busy=true]')")
    assert texts(page) == ["你好", REPLY]


def test_retry_edit_and_copy(page):
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    for text in ("你好", "晚安"):
        say(page, text)
        wait_until_said(page)
    page.get_by_role("button", name="重新回答").last.click()
    wait_until_said(page)
    assert [m["content"] for m in sent[-1]["messages"]] == ["你好", REPLY, "晚安"]
    page.get_by_role("button", name="编辑这句话").first.click()
    page.get_by_label("改这句话").fill("再见")
    page.get_by_role("button", name="取消编辑").click()
    assert texts(page) == ["你好", REPLY, "晚安", REPLY]
    page.get_by_role("button", name="编辑这句话").first.click()
    page.get_by_label("改这句话").fill("再见")
    page.keyboard.press("Enter")
    wait_until_said(page)
    assert texts(page) == ["再见", REPLY]
    assert [m["content"] for m in sent[-1]["messages"]] == ["再见"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="复制这句话").last.click()
    page.get_by_text("已复制").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == REPLY


def test_everything_is_there_after_a_reload(page):
    say(page, "你好")
    wait_until_said(page)
    page.get_by_role("button", name="新聊天", exact=True).click()
    say(page, "晚安")
    wait_until_said(page)
    page.once("dialog", lambda dialog: dialog.accept("另一个"))
    page.get_by_role("button", name="给“晚安”改名").click()
    page.reload()
    assert page.locator("#chats .name").all_text_contents() == ["另一个", "你好"]
    assert texts(page) == ["晚安", REPLY]
    page.locator("#chats .name", has_text="你好").click()
    assert texts(page) == ["你好", REPLY]
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="删除“你好”").click()
    assert page.locator("#chats .name").all_text_contents() == ["另一个"]


def test_export_import_and_corpus(page, tmp_path: Path):
    say(page, "你好\n 早上好")
    wait_until_said(page)
    page.get_by_role("button", name="新聊天", exact=True).click()
    say(page, "晚安")
    wait_until_said(page)
    for name, label in (("chats.json", "导出 JSON"), ("corpus.txt", "下载为语料")):
        with page.expect_download() as download:
            page.get_by_role("button", name=label).click()
        download.value.save_as(tmp_path / name)
    corpus = list(read_dialogues(tmp_path / "corpus.txt"))
    assert corpus == [["晚安", REPLY], ["你好 早上好", REPLY]]
    exported = json.loads((tmp_path / "chats.json").read_text(encoding="utf-8"))
    assert len(exported["chats"]) == 2

    page.evaluate("localStorage.clear()")
    page.reload()
    assert texts(page) == []
    page.set_input_files("#import-file", tmp_path / "chats.json")
    page.get_by_text("导入了 2 个聊天").wait_for()
    assert texts(page) == ["晚安", REPLY]
    before = page.locator("#chats .name").all_text_contents()
    for content in ("{", "[]", '{"chats": [{"name": 1, "messages": []}]}', '{"chats": [3]}'):
        (tmp_path / "bad.json").write_text(content)
        page.set_input_files("#import-file", tmp_path / "bad.json")
        page.get_by_text("什么也没有变").wait_for()
        assert page.locator("#chats .name").all_text_contents() == before
        page.evaluate("tell('')")


def test_text_is_text(page):
    for text in (HOSTILE, ARABIC):
        say(page, text)
        wait_until_said(page)
    assert texts(page)[0] == HOSTILE
    assert page.locator("#log script, #log img, #chats img").count() == 0
    assert "hacked" not in page.title()
    bubble = page.locator(".bubble", has_text=ARABIC)
    assert bubble.evaluate("node => getComputedStyle(node).direction") == "rtl"
    assert page.locator(".bubble").last.evaluate("n => getComputedStyle(n).direction") == "ltr"


def test_policy_allows_only_the_page_itself(page, url):
    blocked = page.evaluate(
        """async () => {
          const caught = new Promise((resolve) => document.addEventListener(
            "securitypolicyviolation", (event) => resolve(event.effectiveDirective)));
          const script = document.createElement("script");
          script.textContent = "1";
          document.body.append(script);
          return caught;
        }"""
    )
    assert blocked.startswith("script-src")
    page.problems.clear()
    response = page.request.get(url)
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r"(?:src|href)=\"https?:|@import|url\(", response.text())


def test_sliders_have_the_defaults_of_the_server_and_are_sent_when_moved(page):
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.get_by_role("button", name="设置").click()
    temperature = page.get_by_label("采样温度")
    assert temperature.input_value() == "0.7"
    assert page.get_by_label("每句回复最多的 token 数").input_value() == "20"
    page.get_by_label("每句回复最多的 token 数").fill("3")
    page.get_by_label("随机种子").fill("7")
    page.get_by_role("button", name="好", exact=True).click()
    say(page, "你好")
    wait_until_said(page)
    assert texts(page)[-1] == REPLY[:3]
    fields = {name: value for name, value in sent[-1].items() if name != "messages"}
    assert fields == {"stream": True, "max_len": 3, "seed": 7}
    page.get_by_role("button", name="设置").click()
    page.get_by_role("button", name="恢复默认").click()
    assert page.get_by_label("每句回复最多的 token 数").input_value() == "20"
    page.keyboard.press("Escape")


def test_phone_width_has_no_sideways_scroll_and_a_drawer(page):
    page.set_viewport_size({"width": 360, "height": 640})
    say(page, "你" * 200 + "a" * 200)
    wait_until_said(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert not page.get_by_role("button", name="新聊天", exact=True).is_visible()
    menu = page.get_by_role("button", name="聊天列表")
    menu.click()
    assert menu.get_attribute("aria-expanded") == "true"
    page.keyboard.press("Escape")
    assert menu.get_attribute("aria-expanded") == "false"
    menu.click()
    page.get_by_role("button", name="新聊天", exact=True).click()
    assert not page.locator("#chats").is_visible()
    assert page.get_by_label("要说的话").evaluate("n => n === document.activeElement")


CONTRAST = """(selector) => {
  const parse = (text) => text.match(/[0-9.]+/g).map(Number);
  const node = document.querySelector(selector);
  let back = node;
  while (parse(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
  const light = (text) => parse(text).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const pair = [light(getComputedStyle(node).color), light(getComputedStyle(back).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(scheme, page):
    page.emulate_media(color_scheme=scheme)
    say(page, "你好")
    wait_until_said(page)
    assert page.locator("html").get_attribute("data-theme") == scheme
    for selector in (
        ".user .bubble",
        ".assistant .bubble",
        "#title",
        ".tools button",
        "#send-button",
    ):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    page.locator("#theme-button").click()
    page.reload()
    assert page.locator("html").get_attribute("data-theme") != scheme


def test_everything_has_a_name_and_the_keyboard_reaches_it(page):
    say(page, "你好")
    wait_until_said(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((node) => !(
          node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length
        )).length"""
    )
    assert unnamed == 0
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.textContent || document.activeElement.id")
        )
    assert {"新聊天", "导出 JSON", "下载为语料", "设置", "编辑", "重答", "发送"} <= reached
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    assert page.locator("#spoken").text_content() == REPLY  # 说完才整句念出来
    assert page.locator("html").get_attribute("lang") == "zh-CN"


def test_enter_during_composition_does_not_send(page):
    page.get_by_label("要说的话").fill("nihao")
    page.evaluate(
        """document.getElementById("input").dispatchEvent(
          new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true }))"""
    )
    assert texts(page) == []
    page.get_by_label("要说的话").press("Shift+Enter")
    assert page.get_by_label("要说的话").input_value() == "nihao\n"


def test_a_server_that_is_gone_is_said_and_retry_works_when_it_is_back(page):
    page.context.set_offline(True)
    say(page, "你好")
    page.locator("#log .error", has_text="连不上服务器").wait_for()
    page.problems.clear()
    page.context.set_offline(False)
    page.get_by_role("button", name="重新回答").click()
    wait_until(page, "document.querySelectorAll('.bubble')[1].textContent.length > 5")
    wait_until_said(page)
    assert texts(page) == ["你好", REPLY]


def fail_next_request(page) -> None:
    """下一次请求答复 503，像排满了一样。"""
    body = json.dumps({"error": {"message": "排满了"}})
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=503, content_type="application/json", body=body),
        times=1,
    )


@pytest.mark.parametrize("how", ["retry", "edit"])
def test_failed_or_stopped_retry_gives_everything_back(how, page, pace):
    """重答或改了重发，一个字也没来就失败、停下：原来后面的话都还在，重新打开也在。"""
    for text in ("你好", "晚安"):
        say(page, text)
        wait_until_said(page)
    before = ["你好", REPLY, "晚安", REPLY]

    def go() -> None:
        if how == "retry":
            page.get_by_role("button", name="重新回答").first.click()
        else:
            page.get_by_role("button", name="编辑这句话").first.click()
            page.get_by_label("改这句话").fill("再见")
            page.keyboard.press("Enter")

    fail_next_request(page)
    go()
    page.get_by_text("排满了：原来的都还在").wait_for()
    if how == "edit":  # 改过的也还在
        assert page.get_by_label("改这句话").input_value() == "再见"
        page.get_by_role("button", name="取消编辑").click()
    assert texts(page) == before
    pace["seconds"] = 5.0
    go()
    page.get_by_role("button", name="停止").wait_for()
    page.reload()  # 正等着第一个字时关掉
    assert texts(page) == before
    go()
    page.get_by_role("button", name="停止").click()
    page.get_by_text("停下了：原来的都还在").wait_for()
    if how == "edit":
        page.get_by_role("button", name="取消编辑").click()
    assert texts(page) == before
    page.problems.clear()
    pace["seconds"] = 0
    page.reload()
    assert texts(page) == before
    go()
    wait_until_said(page)
    assert texts(page) == [{"retry": "你好", "edit": "再见"}[how], REPLY]


def test_two_tabs_do_not_disturb_each_other(page, url):
    say(page, "你好")
    wait_until_said(page)
    other = page.context.new_page()
    other.goto(url)
    other.get_by_role("button", name="新聊天", exact=True).click()
    say(other, "晚安")
    wait_until_said(other)
    say(page, "早上好")  # 这边还在原来的聊天里
    wait_until_said(page)
    assert texts(page) == ["你好", REPLY, "早上好", REPLY]
    for tab, expected in ((page, ["你好", REPLY, "早上好", REPLY]), (other, ["晚安", REPLY])):
        tab.reload()
        assert texts(tab) == expected
        assert tab.locator("#chats .name").all_text_contents() == ["晚安", "你好"]
    other.locator("#chats .name", has_text="你好").click()
    other.once("dialog", lambda dialog: dialog.accept("改了名"))
    other.get_by_role("button", name="给“你好”改名").click()
    wait_until(page, "document.getElementById('title').textContent === '改了名'")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="删除“改了名”").click()
    wait_until(other, "document.querySelectorAll('#chats li').length === 1")
    assert texts(other) == ["晚安", REPLY]


def test_two_tabs_talking_in_one_chat_keep_both(page, url, pace):
    say(page, "你好")
    wait_until_said(page)
    other = page.context.new_page()
    other.goto(url)
    pace["seconds"] = 0.2
    say(page, "早上好")
    wait_until(page, "document.querySelectorAll('.bubble')[3]?.textContent.length > 1")
    say(other, "晚安")
    for tab in (page, other):
        wait_until_said(tab)
    page.reload()
    found = {}
    for name in page.locator("#chats .name").all_text_contents():
        page.locator("#chats .name").get_by_text(name, exact=True).click()
        found[name] = texts(page)
    said = [text for messages in found.values() for text in messages]
    assert len(found) == 2
    assert "早上好" in said
    assert "晚安" in said


def test_chats_of_the_earlier_version_are_moved(page):
    old = {
        "chats": [
            {"id": "1-2", "name": "旧的", "messages": [{"role": "user", "text": "你好"}]},
            {"id": "3-4", "name": "更旧的", "messages": []},
        ],
        "current": "1-2",
        "theme": "dark",
    }
    page.evaluate("old => localStorage.setItem('chitchat.v1', old)", json.dumps(old))
    page.reload()
    assert page.locator("#chats .name").all_text_contents() == ["旧的", "更旧的"]
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert texts(page) == ["你好"]
    assert page.evaluate("localStorage.getItem('chitchat.v1')") is None
    page.evaluate("localStorage.setItem('chitchat.v1', '{')")
    page.reload()
    page.get_by_text("没有动它们").wait_for()
    assert page.evaluate("localStorage.getItem('chitchat.v1')") == "{"


def test_corpus_has_only_answered_turns_one_a_line(page, tmp_path: Path):
    """没有答的、说了一半的、有换行和控制字符的：每行一句，一问一答不错位。"""
    messages = [
        ("user", "甲\n\n乙\u2028丙\x07丁"), ("assistant", "好\tの"), ("user", "没有人答"),
        ("user", "再问"), ("assistant", "答"), ("user", "问三"), ("assistant", "说了一"),
        ("user", "问四"), ("assistant", "答四"), ("user", "最后一句"),
    ]  # fmt: skip
    chat = [{"role": role, "text": text} for role, text in messages]
    chat[6]["isStopped"] = True
    (tmp_path / "in.json").write_text(json.dumps({"chats": [{"name": "x", "messages": chat}]}))
    page.set_input_files("#import-file", tmp_path / "in.json")
    page.get_by_text("导入了 1 个聊天").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="下载为语料").click()
    download.value.save_as(tmp_path / "corpus.txt")
    assert list(read_dialogues(tmp_path / "corpus.txt")) == [
        ["甲 乙 丙 丁", "好 の"],
        ["再问", "答"],
        ["问四", "答四"],
    ]


def test_input_grows_with_the_text_and_shrinks_again(page):
    box = page.get_by_label("要说的话")
    heights = [box.bounding_box()["height"]]
    for text in ("一\n二\n三\n四", "很长" * 200, ""):
        box.fill(text)
        heights.append(box.bounding_box()["height"])
    assert heights[0] < heights[1] < heights[2]
    assert heights[3] == heights[0]
    box.fill("很长" * 200)
    page.keyboard.press("Enter")
    wait_until_said(page)
    assert box.bounding_box()["height"] == heights[0]


@pytest.mark.parametrize(
    ("label", "value", "sentence"),
    [("钥匙（服务器用", "密钥", "钥匙里只能有"), ("随机种子", "1" * 16, "至多 15 位")],
)
def test_impossible_settings_are_explained(label, value, sentence, page):
    page.get_by_role("button", name="设置").click()
    page.get_by_label(label).fill(value)
    page.keyboard.press("Escape")
    page.get_by_text(sentence).wait_for()
    say(page, "你好")
    wait_until_said(page)
    assert texts(page) == ["你好", REPLY]


def test_full_storage_loses_nothing_on_the_page(page):
    page.evaluate(
        """() => { Storage.prototype.setItem = () => {
          throw new DOMException("full", "QuotaExceededError"); }; }"""
    )
    say(page, "你好")
    wait_until_said(page)
    page.get_by_text("浏览器存不下了").wait_for()
    assert texts(page) == ["你好", REPLY]


def test_key_is_asked_for_and_kept(browser, start_server, parrot):
    server = start_server(parrot, options=OPTIONS, api_key="secret")
    page = browser.new_context().new_page()
    page.goto(server.url)
    page.get_by_text("钥匙没有给").wait_for()
    page.get_by_role("button", name="设置").click()
    page.get_by_label("钥匙（服务器用").fill("secret")
    page.get_by_role("button", name="好", exact=True).click()
    say(page, "你好")
    wait_until(page, "document.querySelectorAll('.bubble')[1]?.textContent.length > 5")
    wait_until_said(page)
    assert texts(page) == ["你好", REPLY]
    page.context.close()


def test_candidates_can_be_looked_at(browser, start_server, make_bot):
    server = start_server(make_bot(num_candidates=4), options=OPTIONS)
    page = browser.new_context().new_page()
    page.goto(server.url)
    say(page, "你好")
    wait_until_said(page)
    page.get_by_text("个候选").click()
    items = page.locator(".candidates li").all_text_contents()
    assert len(items) > 1
    assert items[0].startswith(texts(page)[-1])
    page.context.close()
