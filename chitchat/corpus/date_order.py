"""日期的次序：03/04/2026 是三月还是四月，由全部消息认定。"""

from __future__ import annotations


class _Reading:
    """日期的一种读法：每个聊天里时刻向前、向后走了几步。"""

    def __init__(self) -> None:
        self.latest: dict[int, float] = {}
        self.steps: dict[int, int] = {}
        self.num_forward = self.num_back = 0
        self.num_impossible = 0
        self.first: float | None = None
        self.last: float | None = None

    def add(self, chat: int, time: float | None) -> float | None:
        """记下一个时刻；不知道时算在前一条的时刻。"""
        before = self.latest.get(chat)
        if time is None:
            return before
        if before is not None and time != before:
            step = 1 if time > before else -1
            self.steps[chat] = self.steps.get(chat, 0) + step
            if step > 0:
                self.num_forward += 1
            else:
                self.num_back += 1
        self.latest[chat] = time
        if self.first is None or time < self.first:
            self.first = time
        if self.last is None or time > self.last:
            self.last = time
        return time


class DateOrder:
    """日期有歧义时，由全部消息认定是月在前还是日在前。"""

    def __init__(self) -> None:
        self.readings = {"month_first": _Reading(), "day_first": _Reading()}

    def add(self, chat: int, times: tuple) -> tuple[float | None, float | None]:
        """记下一个时刻的各种读法，返回两种读法下的秒数。"""
        month_first, day_first = (times[0], times[-1]) if times else (None, None)
        if times and None in times:
            self.readings["month_first"].num_impossible += month_first is None
            self.readings["day_first"].num_impossible += day_first is None
        return (
            self.readings["month_first"].add(chat, month_first),
            self.readings["day_first"].add(chat, day_first),
        )

    def is_day_first(self) -> bool:
        """不可能的日期少的那种对；一样多时，看哪种更像一路向前或一路向后；再看哪种前后相隔更短。"""
        month_first, day_first = self.readings.values()

        def badness(reading: _Reading) -> tuple[int, int, float]:
            turns = min(reading.num_back, reading.num_forward)
            return reading.num_impossible, turns, (reading.last or 0) - (reading.first or 0)

        return badness(day_first) <= badness(month_first)
