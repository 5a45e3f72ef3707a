"""网页的细处：几个标签页、没有发成的话、存储、焦点、滚动；没有浏览器就跳过。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from web_browser import (
    REPLY,
    say,
    texts,
    wait_until,
    wait_until_said,
)

from chitchat.corpus.reader import read_dialogues

pytest_plugins = ["web_server", "web_browser"]
PUT = """text => {
  sessionStorage.clear(); localStorage.clear(); localStorage.setItem("chitchat.v1", text);
}"""
FILL = """() => {
  for (let size = 1 << 22; size >= 1; size >>= 1)
    try { for (let i = 0; ; i++) localStorage.setItem(`x${size}.${i}`, "x".repeat(size)); }
    catch { continue; }
}"""
TURNS = [{"role": "user", "text": "你好"}, {"role": "assistant", "text": REPLY}]


def old_store(page, **fields):
    chats = [
        {"id": "1-1", "name": "新的", "messages": TURNS[:1]},
        {"id": "1-2", "name": "旧的", "messages": TURNS},
    ]
    state = {
        "chats": chats,
        "current": "1-2",
        "knobs": {},
        "seed": "",
        "key": "",
        "theme": "",
        **fields,
    }
    page.evaluate(PUT, json.dumps(state, ensure_ascii=False, separators=(",", ":")))


def talk(page, *lines):
    for line in lines:
        say(page, line)
        wait_until_said(page)


def names(page):
    return page.locator("#chats .name").all_text_contents()


def test_old_current_chat_is_still_the_current_one(page):
    old_store(page)
    page.reload()
    assert texts(page) == ["你好", REPLY]


def test_old_chats_are_seen_when_the_storage_is_full(page):
    old_store(page)
    page.evaluate(FILL)
    page.reload()
    assert names(page) == ["新的", "旧的"]


def test_old_entries_that_cannot_be_read_are_kept(page):
    old_store(
        page,
        chats=[
            {"id": "1", "name": "好的", "messages": TURNS},
            {"id": "2", "name": "坏的", "messages": 3},
        ],
    )
    page.reload()
    assert page.evaluate("Object.values(localStorage).some((text) => text.includes('坏的'))")


def test_a_tab_stays_in_its_chat_after_a_reload(page, url):
    talk(page, "你好")
    other = page.context.new_page()
    other.goto(url)
    page.locator("#new-button").click()
    talk(page, "晚安")
    other.reload()
    assert texts(other) == ["你好", REPLY]


def test_an_empty_new_chat_is_still_current_after_a_reload(page):
    talk(page, "你好")
    page.locator("#new-button").click()
    page.reload()
    assert texts(page) == []


def test_a_chat_deleted_in_another_tab_does_not_come_back(page, url, pace):
    talk(page, "你好")
    other = page.context.new_page()
    other.goto(url)
    pace["seconds"] = 0.15
    say(page, "早上好")
    page.get_by_role("button", name="停止").wait_for()
    other.once("dialog", lambda dialog: dialog.accept())
    other.get_by_role("button", name="删除“你好”").click()
    wait_until_said(page)
    other.reload()
    assert "你好" not in names(other)


def test_renaming_while_a_retry_waits_stores_the_whole_chat(page, pace):
    talk(page, "你好", "晚安")
    pace["seconds"] = 1
    page.get_by_role("button", name="重新回答").first.click()
    page.once("dialog", lambda dialog: dialog.accept("改了名"))
    page.get_by_role("button", name="给“你好”改名").click()
    page.reload()
    assert texts(page) == ["你好", REPLY, "晚安", REPLY]


def test_a_retry_that_breaks_off_keeps_the_old_words(page):
    talk(page, "你好", "晚安")
    body = 'data: {"choices": [{"index": 0, "delta": {"content": "早"}}]}\n\n'
    page.route(
        "**/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    page.get_by_role("button", name="重新回答").first.click()
    wait_until_said(page)
    assert texts(page) == ["你好", REPLY, "晚安", REPLY]


def test_a_reload_keeps_the_half_written_reply(page, pace):
    pace["seconds"] = 0.15
    say(page, "你好")
    wait_until(page, "document.querySelectorAll('.bubble')[1]?.textContent.length > 1")
    page.reload()
    assert len(texts(page)) == 2


def test_a_question_without_an_answer_can_be_answered(page, pace):
    pace["seconds"] = 1
    say(page, "你好")
    page.get_by_role("button", name="停止").click()
    wait_until_said(page)
    assert page.get_by_role("button", name="重新回答").count() == 1


def test_an_empty_reply_is_explained(page):
    page.route(
        "**/completions",
        lambda route: route.fulfill(body="data: [DONE]\n\n", content_type="text/event-stream"),
    )
    say(page, "你好")
    wait_until_said(page)
    assert page.locator("#log .error").count() == 1


@pytest.mark.parametrize(
    "blank", ["\u200b", "\u2060", "\ufe0f", "\x00", "\u2028", "\x85", "\ud800"]
)
def test_invisible_messages_do_not_break_the_corpus(blank, page, tmp_path: Path):
    messages = [
        *TURNS,
        {"role": "user", "text": blank},
        {"role": "assistant", "text": "晚安"},
        *TURNS,
    ]
    (tmp_path / "in.json").write_text(json.dumps({"chats": [{"name": "x", "messages": messages}]}))
    page.set_input_files("#import-file", tmp_path / "in.json")
    page.get_by_text("导入了").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="下载为语料").click()
    download.value.save_as(tmp_path / "corpus.txt")
    assert all(len(d) % 2 == 0 for d in read_dialogues(tmp_path / "corpus.txt"))


def test_a_stored_chinese_key_is_explained_in_chinese(page):
    old_store(page, key="钥匙")
    page.reload()
    say(page, "你好")
    wait_until_said(page)
    shown = page.locator("main").inner_text()
    assert "钥匙" in shown
    assert "Failed" not in shown


def test_escape_while_composing_does_not_cancel_the_edit(page):
    talk(page, "你好")
    page.get_by_role("button", name="编辑这句话").click()
    page.get_by_label("改这句话").fill("zaijian")
    page.evaluate(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: 'Escape', isComposing: true, bubbles: true }))"
    )
    assert page.get_by_label("改这句话").count() == 1


def test_reading_above_is_not_pulled_down(page, pace):
    page.set_viewport_size({"width": 390, "height": 500})
    talk(page, *["你好"] * 5)
    pace["seconds"] = 0.15
    say(page, "晚安")
    wait_until(page, "[...document.querySelectorAll('.bubble')].at(-1).textContent.length > 1")
    page.evaluate("document.getElementById('log').scrollTop = 0")
    wait_until_said(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0


def test_cancelling_an_edit_does_not_jump_to_the_end(page):
    page.set_viewport_size({"width": 390, "height": 500})
    talk(page, *["你好"] * 5)
    page.get_by_role("button", name="编辑这句话").first.click()
    page.get_by_role("button", name="取消编辑").click()
    assert page.evaluate("document.getElementById('log').scrollTop") < 100


def test_the_last_message_is_seen_above_a_tall_input(page):
    page.set_viewport_size({"width": 390, "height": 500})
    talk(page, *["你好"] * 5)
    page.get_by_label("要说的话").fill("第一行\n" * 6)
    page.wait_for_timeout(100)
    assert (
        page.evaluate(
            "(l => l.scrollHeight - l.scrollTop - l.clientHeight)(document.getElementById('log'))"
        )
        < 5
    )


def test_renaming_does_not_lose_what_is_being_edited(page):
    talk(page, "你好")
    page.get_by_role("button", name="编辑这句话").click()
    page.get_by_label("改这句话").fill("再见")
    page.once("dialog", lambda dialog: dialog.accept("改了名"))
    page.get_by_role("button", name="给“你好”改名").click()
    assert page.get_by_label("改这句话").input_value() == "再见"


@pytest.mark.parametrize("name", ["重新回答", "给“你好”改名"])
def test_focus_is_not_lost(name, page):
    talk(page, "你好")
    page.on("dialog", lambda dialog: dialog.accept("你好"))
    page.get_by_role("button", name=name).focus()
    page.keyboard.press("Enter")
    wait_until_said(page)
    assert page.evaluate("document.activeElement !== document.body")


def test_the_settings_button_is_seen_without_scrolling(page):
    page.set_viewport_size({"width": 390, "height": 700})
    page.get_by_role("button", name="设置").click()
    box = page.get_by_role("button", name="好", exact=True).bounding_box()
    assert box["y"] + box["height"] <= 0.95 * 700


def test_an_imported_failure_is_still_a_failure(page, tmp_path: Path):
    messages = [TURNS[0], {"role": "assistant", "text": "", "error": "连不上服务器"}]
    (tmp_path / "in.json").write_text(json.dumps({"chats": [{"name": "x", "messages": messages}]}))
    page.set_input_files("#import-file", tmp_path / "in.json")
    page.get_by_text("导入了").wait_for()
    assert page.locator("#log .error").text_content() == "连不上服务器"
    assert not page.locator(".assistant .bubble").is_visible()
