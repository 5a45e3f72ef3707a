"""时刻：聊天记录里各种写法的日期和时间。"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from datetime import datetime, timedelta, timezone

Times = tuple[float | None, ...]
"""一个时刻的各种读法，单位秒，自 1970 年起（UTC）。

空的表示读不出；一项表示没有歧义；两项是“月在前”和“日在前”的读法，不可能的那一种是 None。
"""

_MARKS = (
    "凌晨|清晨|早上|早晨|上午|中午|下午|傍晚|晚上|午前|午後|오전|오후"
    r"|[AaPp]\.?\s?[Mm]\.?(?![A-Za-z])"
)
_AFTERNOON = re.compile("下午|傍晚|晚上|午後|오후|[Pp]")
_WEEKDAY = (
    r"(?:[,，]?\s*(?:[(（]\S{1,3}[)）]|(?:星期|周|週|礼拜)[一二三四五六日天]|[A-Z][a-z]{2,8}day))?"
)
_MOMENT = re.compile(
    r"(?:[A-Za-z]{3,9},?\s+(?=\d))?"
    r"(?:(?P<year>\d{4})\s?[-/.年]\s?(?P<month>\d{1,2})\s?[-/.月]\s?(?P<day>\d{1,2})日?"
    r"|(?P<first>\d{1,2})[-/.](?P<second>\d{1,2})[-/.](?P<last>\d{4}|\d{2})"
    r"|(?P<day2>\d{1,2})[\s-](?P<name2>[A-Za-z]{3,9})\.?,?[\s-](?P<year2>\d{4})"
    r"|(?P<name3>[A-Za-z]{3,9})\.?\s(?P<day3>\d{1,2})(?:st|nd|rd|th)?,?\s(?P<year3>\d{4}))"
    + _WEEKDAY
    + rf"(?:(?:[T,，]|\s|\sat\s)*(?P<before>{_MARKS})?\s*"
    r"(?P<hour>\d{1,2})\s?[:：时點点]\s?(?P<minute>\d{1,2})"
    r"(?:\s?[:：分]\s?(?P<sec>\d{1,2})(?:[.,](?P<fraction>\d{1,9}))?)?[分秒]?"
    rf"\s*(?P<after>{_MARKS})?"
    r"\s*(?P<zone>Z|(?:UTC|GMT)?[+-]\d{2}:?\d{2}|UTC|GMT)?)?"
)
_CLOCK = re.compile(rf"(?P<before>{_MARKS})?\s*(?P<hour>\d{{1,2}})[:：](?P<minute>\d{{2}})"
                    rf"\s*(?P<after>{_MARKS})?")  # fmt: skip
_NUMBER = re.compile(r"(\d{9,19})(\.\d*)?")
_INVISIBLE = dict.fromkeys([0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, *range(0x202A, 0x202F)])
_MONTHS = {
    name: number
    for number, name in enumerate(
        ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1
    )
}


def parse_times(text: str) -> Times:
    """读出一个时刻。

    年月日的次序、分隔符、12 小时制的标记（上午、PM……在前或在后）不限，也可以是自 1970 年起的
    秒、毫秒、微秒。带时区的按时区，不带的当作本机的时区；没有时间的当作零点。
    """
    text = text.strip() if text.isascii() else text.translate(_INVISIBLE).strip()
    if text[4:5] == "-" and len(text) > 15:  # 最常见的写法，标准库读得最快
        with contextlib.suppress(ValueError, OverflowError):
            return (datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp(),)
    if number := _NUMBER.fullmatch(text):
        digits = len(number[1])
        scale = 1 if digits < 12 else 1e3 if digits < 15 else 1e6 if digits < 18 else 1e9
        return (float(text) / scale,)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    match = _MOMENT.fullmatch(text)
    if match is None:
        return ()
    clock = parse_clock(match) if match["hour"] else (0, 0)
    if clock is None:
        return ()
    return tuple(_moment(match, date, clock) for date in _dates(match))


def parse_clock(match: re.Match) -> tuple[int, int] | None:
    """由 hour、minute、before、after 四组读出 24 小时制的时和分；没有这样的时刻时是 None。"""
    hour, minute = int(match["hour"]), int(match["minute"])
    mark = match["before"] or match["after"]
    if mark == "中午":
        hour += 12 if hour < 6 else 0
    elif mark and hour <= 12:
        hour = hour % 12 + (12 if _AFTERNOON.match(mark) else 0)
    return (hour, minute) if hour < 24 and minute < 60 else None


def parse_clock_text(text: str) -> tuple[int, int] | None:
    """读出没有日期的时刻，如 ``下午08:15``、``8:15PM``；读不出时是 None。"""
    match = _CLOCK.fullmatch(text.translate(_INVISIBLE).strip())
    return parse_clock(match) if match else None


def _dates(match: re.Match) -> list[tuple[int, int, int]]:
    """日期的各种读法，（年，月，日）。"""
    if match["year"]:
        return [(int(match["year"]), int(match["month"]), int(match["day"]))]
    for suffix in "23":
        if name := match[f"name{suffix}"]:
            month = _MONTHS.get(name[:3].lower(), 0)
            return [(int(match[f"year{suffix}"]), month, int(match[f"day{suffix}"]))]
    first, second, last = (int(match[name]) for name in ("first", "second", "last"))
    if first > 31:  # 两位的年在前
        return [(2000 + first, second, last)]
    year = last if last > 99 else 2000 + last
    return [(year, first, second), (year, second, first)]


def _moment(match: re.Match, date: tuple[int, int, int], clock: tuple[int, int]) -> float | None:
    fraction = float(f"0.{match['fraction'] or 0}")
    try:
        moment = datetime(*date, *clock, int(match["sec"] or 0))
        if zone := match["zone"]:
            moment = moment.replace(tzinfo=_zone(zone))
        return moment.timestamp() + fraction
    except (ValueError, OverflowError, OSError):
        return None


def _zone(text: str) -> timezone:
    """``Z``、``+08:00``、``UTC+0800`` 这样的时区。"""
    text = text.removeprefix("UTC").removeprefix("GMT").replace(":", "")
    if text in ("", "Z"):
        return timezone.utc
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[3:5]))
    return timezone(-offset if text[0] == "-" else offset)
