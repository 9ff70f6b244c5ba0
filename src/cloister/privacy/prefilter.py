"""Where in a text an expression can match at all, so that most texts are passed over without trying it.

Covers: what every match of an expression must have (digits, how many of them in a row, marks such as colons, no blank, a
greatest length), derived from the expression itself, so that another version of a library brings its own. Guarantees:
whatever an expression matches in a text lies in one of its stretches, and is found there by itself. An expression that is
not understood is tried everywhere.
Does not cover: being fast for texts full of digits; how an expression is read is `privacy.expressions`.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeVar

CROWD: Final = 64
"""Characters within which the digits of a text are counted once for all expressions."""

LONG: Final = 14
"""Characters of a chunk that is worth a look though no digit is in it, at least."""

_ROW: Final = re.compile(r"\d+")
_BLANKS: Final = b"\t\n\v\f\r\x1c\x1d\x1e\x1f"
_PLAIN: Final = bytes.maketrans(b"123456789" + _BLANKS, b"0" * 9 + b" " * len(_BLANKS))

Stretch = tuple[int, int]
Thresholds = tuple[int, int, int, bool, int]
Entry = TypeVar("Entry")


class Digits:
    """A text, with the places of its digits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._plain = text.encode().translate(_PLAIN).decode() if text.isascii() else text
        self.rows = self._rows()
        """Where digits stand in a row: start and end."""
        self.count = sum([stop - start for start, stop in self.rows])
        self._groups: dict[int, list[tuple[int, int, int]]] = {}

    def _rows(self) -> list[Stretch]:
        if not self.text.isascii():
            return [match.span() for match in _ROW.finditer(self.text)]
        plain, found = self._plain, []
        start = plain.find("0")
        while start >= 0:
            stop = start + 1
            while plain[stop : stop + 1] == "0":
                stop += 1
            found.append((start, stop))
            start = plain.find("0", stop)
        return found

    @cached_property
    def places(self) -> list[int]:
        """Where the digits stand."""
        return [place for start, stop in self.rows for place in range(start, stop)]

    @cached_property
    def crowd(self) -> int:
        """How many digits stand within `CROWD` characters, at most."""
        places, most, first = self.places, 0, 0
        if places and places[-1] - places[0] < CROWD:
            return len(places)
        for last, place in enumerate(places):
            while place - places[first] >= CROWD:
                first += 1
            most = max(most, last - first + 1)
        return most

    @cached_property
    def longest_row(self) -> int:
        """How many digits stand in a row, at most."""
        return max([stop - start for start, stop in self.rows], default=0)

    @cached_property
    def beside_letters(self) -> bool:
        """Whether a letter or underscore stands right beside a digit."""
        text = self.text
        return any(
            _is_letter(text[stop : stop + 1]) or (start > 0 and _is_letter(text[start - 1]))
            for start, stop in self.rows
        )

    @cached_property
    def longest_chunk(self) -> int:
        """How many characters stand between two blanks, at most; of short ones only that they are."""
        return max([stop - start for start, stop in self.long_chunks], default=LONG - 1)

    @cached_property
    def chunks(self) -> list[tuple[int, int, int]]:
        """What stands between blanks and has digits: start, end, how many digits."""
        found: list[tuple[int, int, int]] = []
        for start, stop in self.rows:
            if found and stop <= found[-1][1]:
                found[-1] = (found[-1][0], found[-1][1], found[-1][2] + stop - start)
            else:
                found.append((*self._chunk(start), stop - start))
        return found

    @cached_property
    def long_chunks(self) -> list[Stretch]:
        """What stands between blanks and has at least `LONG` characters."""
        found: list[Stretch] = []
        place = 0
        for chunk in [chunk for chunk in self.text.split() if len(chunk) >= LONG]:
            start = self.text.index(chunk, place)  # none of the shorter ones holds it
            place = start + len(chunk)
            found.append((start, place))
        return found

    def chunks_with(self, mark: str) -> list[Stretch]:
        """Returns what stands between blanks and has a certain character."""
        found: list[Stretch] = []
        place = self.text.find(mark)
        while place >= 0:
            found.append(self._chunk(place))
            place = self.text.find(mark, found[-1][1])
        return found

    def _chunk(self, place: int) -> Stretch:
        """Returns what stands between two blanks around a place; in a text that is not ASCII, only ` ` is a blank."""
        stop = self._plain.find(" ", place)
        return self._plain.rfind(" ", 0, place) + 1, stop if stop >= 0 else len(self.text)

    def groups(self, gap: int) -> list[tuple[int, int, int]]:
        """Returns the digits that are at most `gap` characters apart: the first one's place, the last one's end, how many."""
        known = self._groups.get(gap)
        if known is None:
            known = self._groups[gap] = []
            for start, stop in self.rows:
                if known and start - known[-1][1] < gap:
                    known[-1] = (known[-1][0], stop, known[-1][2] + stop - start)
                else:
                    known.append((start, stop, stop - start))
        return known


@dataclass(frozen=True)
class Needs:
    """What every match of an expression has."""

    digits: int = 0
    """Decimal digits, at least."""
    row: int = 0
    """Decimal digits in a row, at least."""
    beside_letters: bool = False
    """Whether a letter or underscore stands right beside a digit."""
    marks: tuple[tuple[tuple[str, int], ...], ...] = ((),)
    """Punctuation marks, each at least so many times: one of these lists."""
    run: "re.Pattern[str] | None" = None
    """Found in it, if it is known: as many characters as it has at least, of those that it can have."""
    solid: bool = False
    """Whether no blank is in it."""
    least: int = 0
    """Characters, at least."""
    longest: float = math.inf
    """Characters, at most."""
    margin: int = 0
    """Characters around it that its assertions look at, at most."""

    @property
    def thresholds(self) -> Thresholds:
        """What a text has at least that holds a match: digits, in a crowd, in a row, beside letters; characters of a chunk."""
        crowded = self.digits if self.longest <= CROWD else 0
        return self.digits, crowded, self.row, self.beside_letters, self.least if self.solid else 0

    def stretches(self, digits: Digits) -> list[Stretch]:
        """Returns the stretches of a text, in order and apart, in which matches lie, with `margin` around them."""
        text = digits.text
        if self.solid:
            return self._chunks(digits)
        if not self.digits or self.longest == math.inf:
            return [(0, len(text))]
        found: list[Stretch] = []
        places, last, reach = digits.places, self.digits - 1, int(self.longest)
        for first in range(len(places) - last):
            left, right = places[first], places[first + last]
            if right - left < reach:  # a match that begins with these digits lies between or around the two places
                found.append((right - reach, left + reach))
        return joined(found, self.margin, len(text))

    def _chunks(self, digits: Digits) -> list[Stretch]:
        text = digits.text
        if self.digits:
            found = [(start, stop) for start, stop, count in digits.chunks if count >= self.digits]
        elif self.least >= LONG:
            found = digits.long_chunks
        elif all(self.marks):
            found = sorted({place for marks in self.marks for place in digits.chunks_with(marks[0][0])})
        else:
            return [(0, len(text))]
        fitting = [place for place in found if place[1] - place[0] >= self.least and self._marked(text, *place)]
        if self.run is not None:
            fitting = [place for place in fitting if self.run.search(text, *place) is not None]
        return joined(fitting, self.margin, len(text))

    def _marked(self, text: str, start: int, stop: int) -> bool:
        return any(all(text.count(mark, start, stop) >= count for mark, count in marks) for marks in self.marks)


def worth(table: Iterable[tuple[Thresholds, Entry]], digits: Digits) -> Iterator[Entry]:
    """Yields those entries of a table whose `Needs.thresholds` a text reaches: the others have no stretches in it."""
    count, crowd, row = digits.count, digits.crowd, digits.longest_row
    beside, chunk = digits.beside_letters, digits.longest_chunk
    for (all_digits, crowded, in_row, letters, least), entry in table:
        if all_digits <= count and crowded <= crowd and in_row <= row and letters <= beside and least <= chunk:
            yield entry


def joined(stretches: Iterable[Stretch], margin: int, end: int) -> list[Stretch]:
    """Returns stretches, which come in order, with a margin on both sides; those that meet become one."""
    found: list[Stretch] = []
    for start, stop in stretches:
        start, stop = max(0, start - margin), min(end, stop + margin)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"
