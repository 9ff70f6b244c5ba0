"""Where in a text an expression can match at all, so that most texts are passed over without trying it.

Covers: what every match of an expression must have (digits, colons, a run of letters and digits, a greatest length), derived
from the expression itself, so that another version of a library brings its own. Guarantees: whatever an expression
matches in a text lies in one of its stretches, and is found there by itself. An expression that is not understood is tried
everywhere.
Does not cover: being fast for texts full of digits.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, runtime_checkable

MARGIN: Final = 32
"""Characters around a match that its assertions may look at; an expression that looks further is tried everywhere."""

CROWD: Final = 64
"""Characters within which the digits of a text are counted once for all expressions."""

DIGIT: Final = re.compile(r"\d")
_RUN: Final = re.compile(r"\w+")


class Digits:
    """A text, with the places of its digits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.places = [match.start() for match in DIGIT.finditer(text)]
        self._groups: dict[int, list[tuple[int, int]]] = {}

    @cached_property
    def colons(self) -> int:
        """How many colons there are."""
        return self.text.count(":")

    @cached_property
    def crowd(self) -> int:
        """How many digits stand within `CROWD` characters, at most."""
        most = first = 0
        for last, place in enumerate(self.places):
            while place - self.places[first] >= CROWD:
                first += 1
            most = max(most, last - first + 1)
        return most

    @cached_property
    def longest_run(self) -> int:
        """How many letters, digits and underscores stand in a row, at most."""
        return max(map(len, _RUN.findall(self.text)), default=0)

    @cached_property
    def row(self) -> str:
        """All digits, one after the other."""
        return "".join([self.text[place] for place in self.places])

    def groups(self, gap: int) -> list[tuple[int, int]]:
        """Returns the first and the last place, by number, of the digits that are at most `gap` characters apart."""
        known = self._groups.get(gap)
        if known is None:
            ends = [i for i in range(len(self.places) - 1) if self.places[i + 1] - self.places[i] > gap]
            firsts = [0, *(end + 1 for end in ends)]
            known = self._groups[gap] = (
                list(zip(firsts, [*ends, len(self.places) - 1], strict=True)) if self.places else []
            )
        return known

    def dense(self, digits: int, longest: float) -> bool:
        """Returns whether `digits` digits stand within `longest` characters somewhere."""
        places, last = self.places, digits - 1
        return any(places[i + last] - places[i] < longest for i in range(len(places) - last))


@runtime_checkable
class Stretches(Protocol):
    """Knows where a text is worth a try."""

    def stretches(self, digits: Digits) -> Iterable[tuple[int, int]]:
        """Returns the stretches of a text in which matches lie, in order and apart, with what stands around them."""


@dataclass(frozen=True)
class Needs:
    """What every match of an expression has."""

    digits: int = 0
    """Decimal digits, at least."""
    colons: int = 0
    """Colons, at least."""
    run: int = 0
    """Length of the run of letters, digits and underscores that it lies in, at least; 0: it may hold other characters."""
    longest: float = math.inf
    """Characters, at most."""

    def stretches(self, digits: Digits) -> list[tuple[int, int]]:
        """Returns the stretches of a text, in order and apart, in which matches lie, with `MARGIN` around them."""
        text, places = digits.text, digits.places
        if len(places) < self.digits or (self.colons and digits.colons < self.colons):
            return []
        if self.digits > digits.crowd and self.longest <= CROWD:
            return []
        if self.run and digits.longest_run < self.run:
            return []
        if not self.digits or self.longest == math.inf:
            return [(0, len(text))]
        found: list[tuple[int, int]] = []
        last, reach = self.digits - 1, int(self.longest)
        for first in range(len(places) - last):
            left, right = places[first], places[first + last]
            if right - left < reach:  # a match that begins with these digits lies between or around the two places
                start, stop = max(0, right - reach - MARGIN), min(len(text), left + reach + MARGIN)
                if found and start <= found[-1][1]:
                    found[-1] = (found[-1][0], stop)
                else:
                    found.append((start, stop))
        return found


NOTHING: Final = Needs()


def needs_of(expression: str, flags: int = 0) -> Needs:
    """Returns what every match of a regular expression has, as far as that can be told."""
    try:
        parser: Any = importlib.import_module("re._parser")
        tree = parser.parse(expression, flags & (re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE))
        return _Reader().needs(tree)
    except (ImportError, re.error, NotImplementedError, RecursionError, OverflowError):
        return NOTHING


@dataclass(frozen=True)
class _Counts:
    digits: int
    colons: int
    least: int
    most: float
    words: bool
    """Whether nothing but letters, digits and underscores is in it."""

    def __add__(self, other: "_Counts") -> "_Counts":
        return _Counts(
            self.digits + other.digits,
            self.colons + other.colons,
            self.least + other.least,
            self.most + other.most,
            self.words and other.words,
        )

    def __or__(self, other: "_Counts") -> "_Counts":
        return _Counts(
            min(self.digits, other.digits),
            min(self.colons, other.colons),
            min(self.least, other.least),
            max(self.most, other.most),
            self.words and other.words,
        )


_EMPTY: Final = _Counts(0, 0, 0, 0, True)


class _Reader:
    """Reads the tree of an expression. Anything that it does not know raises `NotImplementedError`.

    An assertion has no length of its own; within another, what it looks at counts as length, so that the outer one knows
    how far it looks.
    """

    def __init__(self) -> None:
        self._asserting = 0

    def needs(self, tree: Any) -> Needs:
        counts = self._sequence(tree)
        run = counts.least if counts.words and counts.least > 8 else 0
        return Needs(counts.digits, counts.colons, run, counts.most)

    def _sequence(self, items: Any) -> _Counts:
        counts = _EMPTY
        for operation, argument in items:
            counts += self._one(str(operation), argument)
        return counts

    def _one(self, operation: str, argument: Any) -> _Counts:
        match operation:
            case "LITERAL":
                letter = chr(argument)
                return _Counts(letter.isdecimal(), letter == ":", 1, 1, _is_word(letter))
            case "IN":
                return _Counts(
                    _only(argument, str.isdecimal, "DIGIT"), 0, 1, 1, _only(argument, _is_word, "DIGIT", "WORD")
                )
            case "ANY" | "NOT_LITERAL":
                return _Counts(0, 0, 1, 1, False)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, body = argument
                once = self._sequence(body)
                bound = math.inf if str(most) == "MAXREPEAT" and once.most else most * once.most if once.most else 0
                return _Counts(least * once.digits, least * once.colons, least * once.least, bound, once.words)
            case "SUBPATTERN":
                return self._sequence(argument[3])
            case "BRANCH":
                branches = [self._sequence(branch) for branch in argument[1]]
                joined = branches[0]
                for branch in branches[1:]:
                    joined |= branch
                return joined
            case "GROUPREF":
                return _Counts(0, 0, 0, math.inf, False)
            case "AT" if str(argument) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
                return self._looking(1)
            case "ASSERT" | "ASSERT_NOT":
                self._asserting += 1
                reach = self._sequence(argument[1]).most
                self._asserting -= 1
                return self._looking(reach if reach <= MARGIN else math.inf)
        raise NotImplementedError(operation)

    def _looking(self, reach: float) -> _Counts:
        """Returns what an assertion counts that looks at so many characters."""
        return _Counts(0, 0, 0, reach if self._asserting or reach == math.inf else 0, True)


def _only(items: Any, fits: Callable[[str], bool], *categories: str) -> bool:
    """Returns whether a set of characters holds nothing else than what `fits`, or the named categories hold."""
    return all(
        (str(kind) == "LITERAL" and fits(chr(value)))
        or (
            str(kind) == "RANGE"
            and value[1] - value[0] < 256
            and all(fits(chr(c)) for c in range(value[0], value[1] + 1))
        )
        or (str(kind) == "CATEGORY" and str(value) in {f"CATEGORY_{name}" for name in categories})
        for kind, value in items
    )


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def matches(pattern: "re.Pattern[str]", needs: Needs, digits: Digits) -> Iterator["re.Match[str]"]:
    """Yields the matches of an expression in a text: what `finditer` finds."""
    for start, stop in needs.stretches(digits):
        yield from pattern.finditer(digits.text, start, stop)
