"""OpenAI 的格式：回复、逐段的回复、模型列表。"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence

from chitchat.chat.web.choices import Choice


class Completion:
    """一次回答的编号和时间，由它写出各种格式。"""

    def __init__(self, model_id: str) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model_id = model_id

    def whole(self, choices: Sequence[Choice]) -> dict[str, object]:
        """不分段的回复。"""
        listed = []
        for choice in choices:
            listed.append(
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                    **_candidates(choice),
                }
            )
        return {**self._head("chat.completion"), "choices": listed, "usage": usage(choices)}

    def opening(self, choice: Choice) -> dict[str, object]:
        """一个回复的第一段：只说明是谁在说。"""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None)

    def piece(self, choice: Choice, text: str) -> dict[str, object]:
        """一段文字。"""
        return self._chunk(choice, {"content": text}, None)

    def closing(self, choice: Choice) -> dict[str, object]:
        """一个回复的最后一段：只说明为什么停。"""
        return self._chunk(choice, {}, choice.finish_reason)

    def accounts(self, choices: Sequence[Choice]) -> dict[str, object]:
        """最后报 token 数的一段。"""
        head = self._head("chat.completion.chunk")
        return {**head, "choices": [], "usage": usage(choices)}

    def _chunk(
        self, choice: Choice, delta: Mapping[str, str], finish_reason: str | None
    ) -> dict[str, object]:
        entry = {
            "index": choice.index,
            "delta": dict(delta),
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        extra = _candidates(choice) if finish_reason else {}
        return {**self._head("chat.completion.chunk"), "choices": [{**entry, **extra}]}

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model_id,
        }


def _candidates(choice: Choice) -> dict[str, object]:
    """有多个候选时多一个字段。"""
    listed = choice.list_candidates()
    return {"candidates": listed} if listed else {}


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """token 数：上下文算一次，各个回复相加。"""
    num_prompt = len(choices[0].ticket.rows[0].context)
    num_completion = sum(len(choice.ticket.token_ids) for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def model_card(model_id: str, created: int) -> dict[str, object]:
    """/v1/models 里的一项。"""
    return {"id": model_id, "object": "model", "created": created, "owned_by": "chitchat"}


def event(data: object) -> bytes:
    """SSE 的一条；文字原样是 ``[DONE]``，其余是 JSON。"""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
