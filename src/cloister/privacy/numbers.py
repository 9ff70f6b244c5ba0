"""Noise for numbers and dates: the bounded discrete Laplace mechanism, sampled exactly.

Covers: numbers as they are written. The class of a number is its format: how many digits it has before and after the
point, whether the first is a zero, its separators, and whether it is a year. The class of a date is the way it is written;
digits are read day first where that is a date and else month first (05/25/2020), and which of the two is part of the class.
A value is replaced by one of its class, drawn with probability proportional to exp(-|x - y| ε / N), where N is the width
of the class.
Guarantees: ε-local differential privacy between any two numbers of one class, exactly: the widest ratio is that of the two
ends (Holohan, Antonatos, Braghin, Mac Aonghusa 2018, with the sensitivity of the whole range). Randomness and
arithmetic are exact: values of the class, all equally likely, are drawn until one is accepted, with its probability (by
Algorithm 1 of Canonne, Kamath, Steinke 2020). So there is no floating-point hole.
Does not cover: the time that a draw takes, which depends on the value a little, or the format, which is revealed.
"""

import datetime
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from cloister.errors import PrivacyError
from cloister.privacy.accounting import pure
from cloister.privacy.mechanism import Cost

Below = Callable[[int], int]

FIRST_YEAR, LAST_YEAR = 1900, 2099
MAX_DIGITS: Final = 24

MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_FIRST_DAY: Final = datetime.date(FIRST_YEAR, 1, 1).toordinal()
_LAST_DAY: Final = datetime.date(LAST_YEAR, 12, 31).toordinal()
_GROUPED: Final = re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?")
_PLAIN: Final = re.compile(r"(\d+)(?:([.,])(\d+))?")
_NUMERIC: Final = re.compile(r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})")
_DAY_FIRST: Final = re.compile(r"(?:(\d{1,2})(\.? ))?([A-Z][a-z]+)(?: (\d{4}))?")
_MONTH_FIRST: Final = re.compile(r"([A-Z][a-z]+) (\d{1,2})(st|nd|rd|th)?(?:(,? )(\d{4}))?")


@dataclass(frozen=True)
class Valued:
    """A value on an integer grid between public bounds, and how to write another one like it."""

    value: int
    low: int
    high: int
    write: Callable[[int], str]


def noisy(text: str, epsilon: Fraction, below: Below = secrets.randbelow) -> str | None:
    """Returns the number or date `text` with noise, in its own format; None if it is neither."""
    valued = read(text)
    if valued is None:
        return None
    return valued.write(bounded_laplace(valued.value, valued.low, valued.high, epsilon, below))


def cost(epsilon: Fraction) -> Cost:
    """Returns what one draw costs: ε, rounded up."""
    return pure(float(epsilon) * (1 + 1e-15))


def other_form(text: str) -> str | None:
    """Returns a number with thousands separators without them, and one without them with them; None of anything else."""
    if _GROUPED.fullmatch(text) is not None:
        return text.replace(",", "")
    whole, point, part = text.partition(".")
    if not (whole.isascii() and whole.isdecimal() and len(whole) > 3 and whole[0] != "0"):
        return None
    return f"{int(whole):,}{point}{part}" if part.isdecimal() or not point else None


def read(text: str) -> Valued | None:
    """Returns the value in `text` with the bounds of its class, or None if it is no number and no date."""
    return _number(text) if text.isdecimal() else _date(text) or _number(text)


def bounded_laplace(value: int, low: int, high: int, epsilon: Fraction, below: Below = secrets.randbelow) -> int:
    """Returns y in [low, high] with probability proportional to exp(-|value - y| ε / (high - low)).

    Raises:
        PrivacyError: the value lies outside its bounds, or ε is not positive.
    """
    if not (low <= value <= high and epsilon.numerator > 0):
        raise PrivacyError("A number lies outside the bounds of its class, or ε is not positive.")
    if low == high:
        return value
    width, top, bottom = high - low, epsilon.numerator, (high - low) * epsilon.denominator
    while True:
        drawn = low + below(width + 1)
        if _accepted(abs(value - drawn) * top, bottom, below):
            return drawn


def _accepted(top: int, bottom: int, below: Below) -> bool:
    """Returns True with probability exp(-top / bottom)."""
    while top > bottom:
        if not _bernoulli_exp(1, 1, below):
            return False
        top -= bottom
    return _bernoulli_exp(top, bottom, below)


def _bernoulli_exp(top: int, bottom: int, below: Below) -> bool:
    """Returns True with probability exp(-top / bottom), for top / bottom between 0 and 1."""
    count = 1
    while below(bottom * count) < top:
        count += 1
    return count % 2 == 1


def _number(text: str) -> Valued | None:
    grouped = "," in text and _GROUPED.fullmatch(text) is not None
    plain = text.replace(",", "") if grouped else text
    match = _PLAIN.fullmatch(plain)
    if match is None or not plain.isascii() or len(plain) > MAX_DIGITS:
        return None
    whole, point, part = match.group(1), match.group(2) or "", match.group(3) or ""

    def write(value: int) -> str:
        digits = str(value).zfill(len(whole) + len(part))
        before, after = digits[: len(digits) - len(part)], digits[len(digits) - len(part) :]
        return (f"{int(before):,}" if grouped else before) + point + after

    value = int(whole + part)
    if not part and len(whole) == 4 and not grouped and FIRST_YEAR <= value <= LAST_YEAR:
        return Valued(value, FIRST_YEAR, LAST_YEAR, write)
    low = 0 if len(whole) == 1 or whole.startswith("0") else 10 ** (len(whole) - 1 + len(part))
    return Valued(value, low, 10 ** (len(whole) + len(part)) - 1, write)


def _date(text: str) -> Valued | None:
    for form in (_numeric_date, _month_first, _day_first):
        found = form(text)
        if found is not None:
            return found
    return None


def _numeric_date(text: str) -> Valued | None:
    match = _NUMERIC.fullmatch(text)
    if match is None:
        return None
    first, mark, second, third = match.groups()
    if len(first) == 4:
        return _dated(int(first), int(second), int(third), lambda d: f"{d.year}{mark}{d.month:02d}{mark}{d.day:02d}")
    short = len(third) <= 2
    year = int(third) + (2000 if short and int(third) < 50 else 1900 if short else 0)
    american = int(second) > 12

    def write(date: datetime.date) -> str:
        places = (date.month, date.day) if american else (date.day, date.month)
        last = f"{date.year % 100:02d}" if short else f"{date.year}"
        return f"{places[0]:02d}{mark}{places[1]:02d}{mark}{last}"

    day, month = (int(second), int(first)) if american else (int(first), int(second))
    return _dated(year, month, day, write)


def _month_first(text: str) -> Valued | None:
    match = _MONTH_FIRST.fullmatch(text)
    if match is None or match.group(1) not in MONTHS:
        return None
    month, day, suffix, gap, year = match.groups()

    def write(date: datetime.date) -> str:
        ending = "" if suffix is None else _ordinal(date.day)
        return f"{MONTHS[date.month - 1]} {date.day}{ending}" + (f"{gap}{date.year}" if year else "")

    return _dated(int(year or 2001), MONTHS.index(month) + 1, int(day), write, yearless=year is None)


def _day_first(text: str) -> Valued | None:
    match = _DAY_FIRST.fullmatch(text)
    if match is None or match.group(3) not in MONTHS:
        return None
    day, gap, month, year = match.groups()

    def write(date: datetime.date) -> str:
        lead = f"{date.day}{gap}" if day else ""
        return f"{lead}{MONTHS[date.month - 1]}" + (f" {date.year}" if year else "")

    return _dated(int(year or 2001), MONTHS.index(month) + 1, int(day or 1), write, yearless=year is None)


def _dated(
    year: int, month: int, day: int, write: Callable[[datetime.date], str], *, yearless: bool = False
) -> Valued | None:
    try:
        value = datetime.date(year, month, day).toordinal()
    except ValueError:
        return None
    low, high = _FIRST_DAY, _LAST_DAY
    if yearless:  # a day of some year: the class is one year
        low, high = datetime.date(year, 1, 1).toordinal(), datetime.date(year, 12, 31).toordinal()
    if not low <= value <= high:
        return None
    return Valued(value, low, high, lambda ordinal: write(datetime.date.fromordinal(ordinal)))


def _ordinal(day: int) -> str:
    return "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
