"""Where a text can hold a telephone number of a region, so that most texts are not parsed for one.

Covers: the recogniser of telephone numbers that Presidio brings (`phonenumbers`, leniency "valid"). Guarantees: whatever it
takes for a valid number of the region, or for an international one, lies in a stretch with the characters around it.
Assumes: what the library does. A number's digits stand within `GAP` characters of one another, an extension's within `REACH`, but
for blanks, commas and hyphens before it; texts with long runs of these are not passed over. What is left of a number
without its prefixes is a row of its digits of a length and form that some region with its country code has.
"""

import copy
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cloister.privacy.prefilter import Digits, Stretch

GAP: Final = 5
"""Characters from one digit of a number to the next, at most: there are at most four between them."""

REACH: Final = 48
"""Characters from a number's digits to those of its extension, at most."""

LEAD: Final = 12
"""Characters before a number's first digit that belong to it (plus sign, brackets), at most."""

LEAST_AFTER_PLUS: Final = 4
"""Digits of an international number, at least: a country code and two more (E.164 numbers are longer)."""

LEAST_AFTER_PREFIX: Final = 6
"""Digits with a prefix for calls abroad, at least."""

LONGEST_ROW: Final = 20
"""Digits in a row that belong to one number, at most."""

TYPES: Final = (
    "toll_free", "premium_rate", "shared_cost", "personal_number", "voip", "pager", "uan", "voicemail", "fixed_line", "mobile",
)  # fmt: skip
"""What a valid number is one of (`phonenumbers.number_type`)."""

_LONG_GAP: Final = re.compile(r"[\s,-]{16}")
_PLUS: Final = re.compile("[+\uff0b]")
_CROSSES: Final = re.compile(r"(?:[xX\uff58\uff38][^xX\uff58\uff38]*){3}")
_DATE: Final = re.compile(r"(?:[0-3]?\d/[01]?\d|[01]?\d/[0-3]?\d)/(?:[12]\d)?\d\d")
"""What the library takes for a date and passes over, where nothing else is around it."""
_SUFFIX: Final = re.compile(r"(?:\\|\$)\d")
_ANYTHING: Final = re.compile("")
_NEVER: Final = re.compile("(?!)")


@dataclass(frozen=True, slots=True)
class _Number:
    """Digits of a text that may be one number."""

    start: int
    digits: str
    rows: tuple[int, ...]
    """Where in `digits` the digits begin that stand in a row."""
    anywhere: bool
    """Whether it may be a number of any region: it has a plus sign, or is written strangely."""


@dataclass(frozen=True)
class Region:
    """A region's numbers."""

    least: int | None
    """Digits of a number within the region, at least; None: the region is unknown, only numbers with a + are found."""
    form: "re.Pattern[str]" = _ANYTHING
    """Found in the digits of every valid number of the region."""
    abroad: "re.Pattern[str]" = _NEVER
    """Matches at the beginning of every number with the region's prefix for calls abroad."""

    def may_be(self, number: _Number) -> bool:
        """Returns whether some digits may be a number for this region."""
        count = len(number.digits)
        if number.anywhere or self.least is None:
            return number.anywhere
        if count >= self.least and self.form.search(number.digits):
            return True
        return count >= LEAST_AFTER_PREFIX and any(self.abroad.match(number.digits, row) for row in number.rows)


class PhoneNumbers:
    """Presidio's recogniser of telephone numbers, once for each of its regions."""

    def __init__(self, recogniser: Any) -> None:
        self._regions: list[tuple[Any, Region]] = []
        for name in recogniser.supported_regions:
            alone = copy.copy(recogniser)
            alone.supported_regions = (name,)
            self._regions.append((alone, region(name)))
        self._least = min([LEAST_AFTER_PLUS, *(one.least for _, one in self._regions if one.least is not None)])

    def worth(self, digits: Digits) -> Iterator[tuple[Any, Stretch]]:
        """Yields the recognisers with the stretches of a text that each may find a number in, with what stands around it."""
        text = digits.text
        groups = [group for group in digits.groups(GAP) if group[2] >= self._least]
        numbers = [_number(digits, start, stop) for start, stop, _ in groups if not _DATE.fullmatch(text, start, stop)]
        for recogniser, one in self._regions:
            held = [number.start for number in numbers if one.may_be(number)]
            if held:
                for stretch in _around(digits, held):
                    yield recogniser, stretch


def region(name: str) -> Region:
    """Returns what is known of a region by its name of two letters."""
    from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata

    own: Any = PhoneMetadata.metadata_for_region(name, None)
    if own is None:
        return Region(None)
    relatives = [PhoneMetadata.metadata_for_region(one, None) for one in COUNTRY_CODE_TO_REGION_CODE[own.country_code]]
    rules = [one.national_prefix_transform_rule for one in (own, relatives[0]) if one is not None]
    if None in relatives or not all(rule is None or _SUFFIX.fullmatch(rule) for rule in rules):
        return Region(1)  # a number is rewritten before it is looked at
    types = [kind for one in relatives for kind in _types(one)]
    lengths = [length for kind in types for length in kind.possible_length or (1,)]
    form = "|".join(dict.fromkeys(f"(?:{kind.national_number_pattern})" for kind in types))
    abroad = re.compile(own.international_prefix) if own.international_prefix else _NEVER
    return Region(min(lengths, default=1), re.compile(form), abroad)


def _types(metadata: Any) -> Iterable[Any]:
    """Returns the descriptions of a region's types of numbers."""
    found = (getattr(metadata, name) for name in TYPES)
    return (kind for kind in found if kind is not None and kind.national_number_pattern)


def _number(digits: Digits, start: int, stop: int) -> _Number:
    text = digits.text
    held = slice(bisect_left(digits.rows, (start, start)), bisect_left(digits.rows, (stop, stop)))
    rows = [text[first:last] for first, last in digits.rows[held]]
    together = "".join(rows)
    places, place = [], 0
    for row in rows:
        places.append(place)
        place += len(row)
    strange = (
        not together.isascii()
        or max(map(len, rows)) > LONGEST_ROW
        or _CROSSES.search(text, start, stop) is not None  # they are read as digits, as letters on a telephone are
    )
    plus = place >= LEAST_AFTER_PLUS and _PLUS.search(text, max(0, start - LEAD), stop) is not None
    return _Number(start, together, tuple(places), strange or plus)


def _around(digits: Digits, numbers: Sequence[int]) -> list[Stretch]:
    """Returns what stands around the numbers that begin at some places, in order, extensions and all."""
    text = digits.text
    if _LONG_GAP.search(text):
        return [(0, len(text))]
    return [
        (max(0, start - REACH), min(len(text), stop + REACH))
        for start, stop, _ in digits.groups(REACH)
        if bisect_left(numbers, start) < bisect_left(numbers, stop)
    ]
