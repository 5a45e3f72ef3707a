"""JSON 的一条记录 → 一段对话的各句，由键名的表认出；表见 json_dialogues 的说明。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from chitchat.corpus.formats.base import Dialogue, one_line
from chitchat.errors import UserError

TURN_KEYS = (
    "messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "utterances",
    "turns", "session", "chat", "content", "context", "history", "sentences",
)  # fmt: skip
TEXT_KEYS = ("content", "value", "text", "utterance", "message", "sentence", "msg", "contents")
SPEAKER_KEYS = ("role", "from", "speaker", "author", "id", "user")
NOT_SPOKEN = ("system", "tool", "function", "observation", "function_call", "developer")
_PAIRS = (
    ("input", "output"), ("human", "assistant"), ("user", "assistant"), ("user", "bot"),
    ("question", "answer"), ("q", "a"), ("query", "response"), ("prompt", "response"),
    ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("input", "target"), ("post", "response"), ("title", "reply"), ("ask", "answer"),
    ("context", "response"), ("Human", "MOSS"), ("source", "target"), ("问", "答"),
    ("问题", "回答"),
    ("prompt", "chosen"), ("question", "chosen"), ("instruction", "chosen"), ("input", "response"),
    ("inputs", "targets"), ("post", "resp"), ("question", "output"), ("human_value", "gpt_value"),
)  # fmt: skip
_ROLE_PREFIX = re.compile(
    r"\A(?:S\d+|[A-Z]|Speaker ?\d+|Human|Assistant|User|Bot|用户|机器人|助手)[:：]\s*",
    re.IGNORECASE,
)
_BELLE = re.compile(r"(?:\A|\n)\s*(?:Human|Assistant)[:：]\s?")
_MOSS_MARK = re.compile(r"<\|(?:Human|MOSS)\|>[:：]?|\[(?:Human|MOSS)\][:：]?|<eo\w+>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_record(keys: set[str]) -> bool:
    """有这些键的对象是不是一段对话。"""
    has_pair = any(set(pair) <= keys for pair in _PAIRS)
    return has_pair or bool(keys & {*TURN_KEYS, "plain_text"}) or {"u1", "b1"} <= keys


def split_dialogues(dialogues: list[list[str]]) -> Iterator[Dialogue]:
    """去掉空白，整段都带“A：”这样的前缀时去掉前缀；空的不要。"""
    for utterances in dialogues:
        texts = [text for utterance in utterances if (text := one_line(utterance))]
        if len(texts) > 1 and all(map(_ROLE_PREFIX.match, texts)):
            texts = [text for t in texts if (text := _ROLE_PREFIX.sub("", t))]
        if texts:
            yield Dialogue(texts)


def dialogues_of(record: Any, where: str) -> list[list[str]]:
    """一条记录里的各段对话。

    Raises:
        UserError: 看不懂。
    """
    if isinstance(record, dict):
        return [_utterances_of(record, where)]
    if isinstance(record, list):
        lists = [item for item in record if isinstance(item, list)]
        if lists and len(lists) == len(record) and all(_is_turns(item) for item in lists):
            if len(lists) == 2 and not all(isinstance(turn, str) for turn in lists[1]):
                return [_turns(lists[0], where)]  # DialogRE：[各句, 标注]
            return [_turns(item, where) for item in lists]
        return [_turns(record, where)]
    raise UserError(
        f"{where}不是对话：应是字符串的列表，或含有 {'、'.join(TURN_KEYS[:6])}、"
        "instruction/output、question/answer 等键的对象；请改正内容，或用 --format 指定别的格式"
    )


def _is_turns(value: list) -> bool:
    return all(isinstance(turn, (str, dict)) for turn in value)


def _utterances_of(record: dict, where: str) -> list[str]:
    chosen = record.get("chosen")
    if chosen is not None and not isinstance(record.get("messages"), list):
        return _preferred(record, chosen, where)
    if "instruction" in record or {"history", "response"} <= record.keys():
        return _instructed(record, where)
    if {"u1", "b1"} <= record.keys():
        names = (f"{side}{number}" for number in range(1, 50) for side in "ub")
        return [str(record[name]) for name in names if record.get(name)]
    if isinstance(chat := record.get("chat"), dict):  # MOSS-003
        return [text for turn in chat.values() for text in texts_of(turn, where)]
    if isinstance(text := record.get("plain_text"), str):  # MOSS-002
        parts = re.split(r"\[(?:Human|MOSS)\][:：]", text)
        return [_MOSS_MARK.sub("", part).strip() for part in parts[1:]]
    if isinstance(context := record.get("context"), list) and isinstance(
        record.get("response"), str
    ):
        return [*_turns(context, where), record["response"]]
    turns = next((record[key] for key in TURN_KEYS if isinstance(record.get(key), list)), None)
    if turns is not None:
        return _turns(turns, where)
    if pair := _pair_of(record):
        return pair
    lines = record.get("text", record.get("content"))
    if isinstance(lines, str) and len(found := [x for x in lines.split("\n") if x.strip()]) > 1:
        return found
    found = "、".join(str(key) for key in list(record)[:8]) or "零个"
    raise UserError(
        f"{where}不是对话：键是 {found}，里面没有 {'、'.join(TURN_KEYS[:6])}、"
        "instruction/output、question/answer 这样成对或成列的话；请把键改成其中之一"
    )


def _preferred(record: dict, chosen: Any, where: str) -> list[str]:
    """DPO：前文之后接 chosen；chosen 是整段对话时就是它。"""
    if isinstance(chosen, list) and len(chosen) > 1:
        return _turns(chosen, where)
    context = next((record[key] for key in TURN_KEYS if isinstance(record.get(key), list)), None)
    if context is not None:
        turns = _turns(context, where)
    else:
        keys = ("prompt", "question", "instruction", "query", "input")
        found = next((record[key] for key in keys if record.get(key)), "")
        turns = _turns(found, where) if isinstance(found, list) else [str(found)]
        turns = [*_pairs_of(record.get("history"), where), *turns]
    reply = chosen if isinstance(chosen, list) else [chosen]
    return [*turns, *_turns(reply, where)]


def _instructed(record: dict, where: str) -> list[str]:
    """Alpaca、BELLE：历史，问（instruction 与 input），答。"""
    asked = [
        str(record.get(key) or "").strip() for key in ("instruction", "input", "query", "prompt")
    ]
    question = "\n".join(text for text in asked if text)
    answer = next((record[key] for key in ("output", "response", "answer", "target")
                   if isinstance(record.get(key), str)), "")  # fmt: skip
    if _BELLE.match(question):
        questions = [part for part in _BELLE.split(question) if part.strip()]
    else:
        questions = [question] if question else []
    answers = [answer] if answer else []
    return [*_pairs_of(record.get("history"), where), *questions, *answers]


def _pairs_of(history: Any, where: str) -> list[str]:
    """``[[问, 答], …]`` 或一句句的话，接成一列。"""
    texts: list[str] = []
    for turn in history if isinstance(history, list) else []:
        texts += [str(text) for text in turn] if isinstance(turn, list) else texts_of(turn, where)
    return texts


def _turns(turns: list, where: str) -> list[str]:
    return [text for turn in turns for text in texts_of(turn, where)]


def texts_of(turn: Any, where: str) -> list[str]:
    """一句（system 与工具的不是话），或成对的一问一答。"""
    if isinstance(turn, dict):
        role = next((turn[key] for key in SPEAKER_KEYS if isinstance(turn.get(key), str)), "")
        if role.lower() in NOT_SPOKEN:
            return []
        if pair := _pair_of(turn):
            return [_MOSS_MARK.sub("", text).strip() for text in pair]
        turn = next(
            (turn[key] for key in TEXT_KEYS if isinstance(turn.get(key), (str, list))), None
        )
        if isinstance(turn, list):  # OpenAI 的 [{"type": "text", "text": …}]
            parts = [part.get("text") for part in turn if isinstance(part, dict)]
            turn = " ".join(part for part in parts if isinstance(part, str))
    if not isinstance(turn, str):
        raise UserError(
            f"{where}里有一句不是文字（{str(turn)[:20]!r}）：应是字符串，"
            f"或含有 {'、'.join(TEXT_KEYS[:5])} 之一的对象"
        )
    if _SURROGATE.search(turn):
        raise UserError(f"{where}里有不成对的代理码（\\ud800 至 \\udfff）：请改正这一句")
    return [turn]


def _pair_of(record: dict) -> list[str]:
    """成对的问和答；没有这样的两个键时是空的。"""
    for pair in _PAIRS:
        texts = [record.get(key) for key in pair]
        if all(isinstance(text, str) for text in texts):
            return [text for text in texts if text.strip()]
    return []
