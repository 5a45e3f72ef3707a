"""聊天记录：把一条条消息变成对话。

消息先存进临时的 SQLite 库，由它按聊天和时刻排好，因此次序乱、几个聊天交错都不要紧，
内存也不随消息数增长。
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chitchat.corpus.date_order import DateOrder
from chitchat.corpus.messages import Message, clean_message, join_messages
from chitchat.corpus.privacy import mask_private
from chitchat.corpus.sorting import temporary_database
from chitchat.corpus.tally import Tally

ME = "me"  # --reply_speaker me：导出记录的人


@dataclass(frozen=True)
class LogOptions:
    """怎样把消息变成对话，名字与命令行参数相同。

    Attributes:
        gap_minutes: 沉默超过这么多分钟就另起一段对话。
        join_seconds: 同一人接连的消息相隔不超过这么多秒才接成一句，更久就另起一段；0 表示都接。
        reply_speaker: 机器人要学的人：昵称、账号或 ``me``；None 表示谁都学。
        mask_private: 隐去电话、证件号、银行卡号、邮箱、网址。
    """

    gap_minutes: float = 30
    join_seconds: float = 0
    reply_speaker: str | None = None
    mask_private: bool = True


@dataclass
class _Turn:
    """一个人接连说的话。"""

    speaker: int
    texts: list[str]
    line: int


Utterances = tuple[list[str], list[int]]
"""一段对话的各句，以及它们的行号。"""


def build_dialogues(
    messages: Iterable[Message], options: LogOptions, tally: Tally
) -> Iterator[Utterances]:
    """把消息变成对话：接起同一人接连的消息，沉默太久就另起一段，只有一个人说话的不要。

    群聊里每换一个人算一句；给了 reply_speaker 时，除他以外的人算一方。各个聊天互不相干。
    所有的消息读完才给出第一段。

    Args:
        messages: 次序不限；没有时刻的算在前一条的时刻。
        options: 怎样分段。
        tally: 记下各种数目。
    """
    with temporary_database(*_TABLES) as database:
        store = _Store(database)
        store.fill(messages, options, tally)
        wanted = store.speakers_called(options.reply_speaker)
        tally.num_wanted = sum(store.num_said[speaker] for speaker in wanted)
        for turns in store.sessions(options):
            found = turns
            if options.reply_speaker is not None:
                found = _alternate(turns, wanted)
                tally.num_unanswered += len(turns) - len(found)
            if len(found) > 1:
                yield [join_messages(turn.texts) for turn in found], [turn.line for turn in found]
            else:
                tally.num_alone += len(turns) == 1


def _alternate(turns: list[_Turn], wanted: set[int]) -> list[_Turn]:
    """两方交替，由别人开头，以 wanted 里的人结尾；别人接连的话接成一句。"""
    sides: list[_Turn] = []
    for turn in turns:
        side = int(turn.speaker in wanted)
        if not sides and side:
            continue
        if sides and sides[-1].speaker == side:
            sides[-1].texts += turn.texts
        else:
            sides.append(_Turn(side, turn.texts, turn.line))
    if sides and not sides[-1].speaker:
        sides.pop()
    return sides


_TABLES = (
    "CREATE TABLE messages"
    " (n INTEGER PRIMARY KEY, chat, speaker, month_first, day_first, text, line)",
    "CREATE TABLE descending (chat)",
)


class _Store:
    """排消息用的临时库。"""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database
        self.chats: dict[str, int] = {}
        self.speakers: dict[tuple[str, bool], int] = {}
        self.people: dict[tuple[str, bool, str], int] = {}
        self.names: dict[str, set[int]] = {}
        self.num_said: Counter[int] = Counter()

    def fill(self, messages: Iterable[Message], options: LogOptions, tally: Tally) -> None:
        """存进全部消息，去掉不是话的；认定日期的次序，记下每个聊天是不是倒着排的。"""
        order = DateOrder()
        self.database.executemany(
            "INSERT INTO messages (chat, speaker, month_first, day_first, text, line)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            self._rows(messages, options, tally, order),
        )
        if 2 * tally.num_untimed > sum(tally.speakers.values()):
            tally.warnings.append(
                f"{tally.num_untimed:,} 条消息没有时间或时间读不懂，不能按沉默分段："
                "请导出带完整日期和时间的记录，或用 --time_column 指定时间的列"
            )
        self.column = "day_first" if order.is_day_first() else "month_first"
        reading = order.readings[self.column]
        tally.num_chats = len(self.chats)
        tally.first, tally.last = reading.first, reading.last
        self.database.executemany(
            "INSERT INTO descending VALUES (?)",
            [(chat,) for chat, steps in reading.steps.items() if steps < 0],
        )

    def _rows(
        self, messages: Iterable[Message], options: LogOptions, tally: Tally, order: DateOrder
    ) -> Iterator[tuple]:
        for message in messages:
            tally.num_messages += 1
            if reason := message.left_out:
                tally.left_out[reason] += 1
                continue
            text, reason = clean_message(message.text, has_type=message.has_type)
            if text and options.mask_private:
                text = mask_private(text, tally.private)
            if not text:
                tally.left_out[reason or "链接卡片"] += 1
                continue
            chat = self.chats.setdefault(message.chat, len(self.chats))
            key = (message.speaker, message.is_me)
            speaker = self._find_speaker(*key, message.name)
            self.num_said[speaker] += 1
            tally.speakers[key] += 1
            tally.names[key] = message.name or tally.names.get(key) or message.speaker
            is_timed = any(time is not None for time in message.times)
            tally.num_untimed += not (is_timed or message.is_cut)
            yield (chat, speaker, *order.add(chat, message.times), text, message.line)

    def _find_speaker(self, account: str, is_me: bool, name: str) -> int:
        """说话人的编号，没见过的给一个新的；记下他的各个名字。"""
        number = self.people.get((account, is_me, name))
        if number is None:
            # 自己总是同一个人：有的导出里，自己的那些行写的是对方的账号。
            own = (ME if is_me else account, is_me)
            number = self.speakers.setdefault(own, len(self.speakers))
            self.people[account, is_me, name] = number
            for called in {account, name, ME if is_me else ""} - {""}:
                self.names.setdefault(called, set()).add(number)
        return number

    def speakers_called(self, name: str | None) -> set[int]:
        """叫这个名字的人：昵称（改过的也算）或账号相同，或 ``me``；None 是谁也不要。"""
        return self.names.get(name, set())

    def sessions(self, options: LogOptions) -> Iterator[list[_Turn]]:
        """按聊天和时刻给出各段，同一人接连的消息在一处。"""
        rows = self.database.execute(
            f"SELECT chat, speaker, {self.column}, text, line FROM messages"
            f" ORDER BY chat, {self.column},"
            " CASE WHEN chat IN (SELECT chat FROM descending) THEN -n ELSE n END"
        )
        turns: list[_Turn] = []
        last_chat, last_time = -1, None
        for chat, speaker, time, text, line in rows:
            silence = time - last_time if None not in (time, last_time) else 0
            is_same = bool(turns) and turns[-1].speaker == speaker
            too_long = is_same and options.join_seconds and silence > options.join_seconds
            if turns and (chat != last_chat or silence > 60 * options.gap_minutes or too_long):
                yield turns
                turns, is_same = [], False
            if is_same:
                turns[-1].texts.append(text)
            else:
                turns.append(_Turn(speaker, [text], line))
            last_chat, last_time = chat, time
        if turns:
            yield turns
