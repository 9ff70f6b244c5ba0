"""What every match of a regular expression has, read off the expression itself.

Covers: expressions of `re`, and of `regex` as far as they are written alike. Guarantees: what is said of an expression holds for
each of its matches; what is not understood makes that nothing is said. Pure: no state, no text of a user.
Does not cover: where in a text to look (`privacy.prefilter`).
"""

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from cloister.privacy.prefilter import Needs

MOST_LOOKING: Final = 32
"""Characters around a match that its assertions may look at; of an expression that looks further, no length is said."""

LONG_RUN: Final = 8
"""A run of certain characters that is longer is worth looking for."""

EQUAL_LETTERS: Final = "\u0130\u0131\u017f\u212a"
"""What expressions without case may take for i, s and k."""

MOST_LISTS: Final = 64
"""Lists of marks of which a match has one, at most."""

NOTHING: Final = Needs()

DIGIT, LETTER, OTHER = frozenset("d"), frozenset("l"), frozenset("o")
ANY: Final = DIGIT | LETTER | OTHER


def needs_of(expression: str, flags: int = 0) -> Needs:
    """Returns what every match of a regular expression has, as far as that can be told."""
    try:
        parser: Any = importlib.import_module("re._parser")
        tree = parser.parse(expression, flags & (re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE))
        return _Reader().needs(tree)
    except (ImportError, re.error, NotImplementedError, RecursionError, OverflowError):
        return NOTHING


@dataclass(frozen=True)
class _Part:
    """What every match of a part of an expression has. The one of no characters is the neutral element of `+`."""

    digits: int = 0
    least: int = 0
    most: float = 0
    alphabet: frozenset[str] | None = frozenset()
    """The characters that can be in it, as parts of a set of an expression; None: any."""
    solid: bool = True
    """Whether no blank is in it."""
    pure: bool = True
    """Whether nothing but digits is in it."""
    lead: int = 0
    """Digits in a row at the beginning, at least."""
    trail: int = 0
    """Digits in a row at the end, at least."""
    row: int = 0
    """Digits in a row anywhere, at least."""
    first: frozenset[str] = frozenset()
    """What the first character can be, if there is one: digit, letter (or underscore), other."""
    last: frozenset[str] = frozenset()
    beside: bool = False
    """Whether a letter stands right beside a digit."""
    marks: tuple[Counter[str], ...] = (Counter(),)
    """Punctuation marks, each at least so many times: one of these."""

    def __add__(self, other: "_Part") -> "_Part":
        return _Part(
            digits=self.digits + other.digits,
            least=self.least + other.least,
            most=self.most + other.most,
            alphabet=None if self.alphabet is None or other.alphabet is None else self.alphabet | other.alphabet,
            solid=self.solid and other.solid,
            pure=self.pure and other.pure,
            lead=self.lead + other.lead if self.pure else self.lead,
            trail=self.trail + other.trail if other.pure else other.trail,
            row=max(self.row, other.row, self.trail + other.lead),
            first=self.first if self.least else self.first | other.first,
            last=other.last if other.least else self.last | other.last,
            beside=self.beside or other.beside or self._meets(other),
            marks=_fewest([one + another for one in self.marks for another in other.marks]),
        )

    def __or__(self, other: "_Part") -> "_Part":
        return _Part(
            digits=min(self.digits, other.digits),
            least=min(self.least, other.least),
            most=max(self.most, other.most),
            alphabet=None if self.alphabet is None or other.alphabet is None else self.alphabet | other.alphabet,
            solid=self.solid and other.solid,
            pure=self.pure and other.pure,
            lead=min(self.lead, other.lead),
            trail=min(self.trail, other.trail),
            row=min(self.row, other.row),
            first=self.first | other.first,
            last=self.last | other.last,
            beside=self.beside and other.beside,
            marks=_fewest([*self.marks, *other.marks]),
        )

    def _meets(self, other: "_Part") -> bool:
        """Returns whether a letter and a digit meet where the two parts do."""
        return bool(self.least and other.least) and {self.last, other.first} == {DIGIT, LETTER}


_EMPTY: Final = _Part()


class _Reader:
    """Reads the tree of an expression. Anything that it does not know raises `NotImplementedError`.

    An assertion has no length of its own; within another, what it looks at counts as length, so that the outer one knows
    how far it looks.
    """

    def __init__(self) -> None:
        self._asserting = 0
        self._margin = 0
        self._captured: dict[int, _Part] = {}

    def needs(self, tree: Any) -> Needs:
        part = self._sequence(tree)
        return Needs(
            digits=part.digits,
            row=part.row,
            beside_letters=part.beside,
            marks=tuple([tuple(sorted(marks.items())) for marks in part.marks]),
            run=self._run(part, bool(tree.state.flags & re.IGNORECASE)),
            solid=part.solid,
            least=part.least,
            longest=part.most,
            margin=self._margin,
        )

    @staticmethod
    def _run(part: _Part, without_case: bool) -> "re.Pattern[str] | None":
        if not part.alphabet or not part.solid or part.least <= LONG_RUN:
            return None
        letters = "".join(sorted(part.alphabet)) + (EQUAL_LETTERS if without_case else "")
        return re.compile(f"[{letters}]{{{part.least}}}", re.IGNORECASE if without_case else 0)

    def _sequence(self, items: Any) -> _Part:
        part = _EMPTY
        for operation, argument in items:
            part += self._one(str(operation), argument)
        return part

    def _one(self, operation: str, argument: Any) -> _Part:
        match operation:
            case "LITERAL":
                return _character([("LITERAL", argument)])
            case "IN":
                return _character(argument)
            case "ANY" | "NOT_LITERAL":
                return _character([])
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, body = argument
                return _repeated(self._sequence(body), int(least), math.inf if str(most) == "MAXREPEAT" else int(most))
            case "SUBPATTERN" if not argument[1] and not argument[2]:  # it has the flags of the whole
                part = self._sequence(argument[3])
                if argument[0] is not None:
                    self._captured[argument[0]] = part
                return part
            case "BRANCH":
                branches = [self._sequence(branch) for branch in argument[1]]
                either = branches[0]
                for branch in branches[1:]:
                    either |= branch
                return either
            case "GROUPREF" if argument in self._captured:
                return self._captured[argument]
            case "AT" if str(argument) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
                return self._looking(1)
            case "ASSERT" | "ASSERT_NOT":
                self._asserting += 1
                reach = self._sequence(argument[1]).most
                self._asserting -= 1
                return self._looking(reach if reach <= MOST_LOOKING else math.inf)
        raise NotImplementedError(operation)

    def _looking(self, reach: float) -> _Part:
        """Returns what an assertion counts that looks at so many characters."""
        if self._asserting or reach == math.inf:
            return _Part(most=reach, solid=reach < math.inf)
        self._margin = max(self._margin, int(reach))
        return _EMPTY


def _fewest(marks: list[Counter[str]]) -> tuple[Counter[str], ...]:
    """Returns those of some lists of marks that ask for no more than another one; of too many, what all ask for."""
    if len(marks) > MOST_LISTS:
        return (_common(marks),)
    fewest: list[Counter[str]] = []
    for one in marks:
        if not any(less <= one for less in fewest):
            fewest = [*(more for more in fewest if not one <= more), one]
    return tuple(fewest)


def _common(marks: Sequence[Counter[str]]) -> Counter[str]:
    common = marks[0]
    for one in marks:
        common &= one
    return common


def _repeated(body: _Part, least: int, most: float) -> _Part:
    once = body | _EMPTY if least == 0 else body if least == 1 else body + body
    all_digits = least * body.least if body.pure else None
    return replace(
        once,
        digits=least * body.digits,
        least=least * body.least,
        most=most * body.most if body.most else 0,
        lead=once.lead if all_digits is None else all_digits,
        trail=once.trail if all_digits is None else all_digits,
        row=once.row if all_digits is None else all_digits,
        marks=once.marks if least < 2 else (Counter({mark: least * n for mark, n in _common(body.marks).items()}),),
    )


def _character(items: Any) -> _Part:
    """Returns what a set of characters has; the one of no items can be any character."""
    digit = _only(items, str.isdecimal, "DIGIT")
    letter = _only(items, lambda c: _is_word(c) and not c.isdecimal())
    kind = DIGIT if digit else LETTER if letter else ANY
    single = chr(items[0][1]) if len(items) == 1 and str(items[0][0]) == "LITERAL" else ""
    mark = single if single.isascii() and single.isprintable() and not single.isspace() and not _is_word(single) else ""
    return _Part(
        digits=int(digit),
        least=1,
        most=1,
        alphabet=_alphabet(items),
        solid=_only(items, lambda c: not c.isspace(), "DIGIT", "WORD"),
        pure=digit,
        lead=int(digit),
        trail=int(digit),
        row=int(digit),
        first=kind,
        last=kind,
        marks=(Counter([mark] if mark else []),),
    )


def _alphabet(items: Any) -> frozenset[str] | None:
    """Returns a set of characters as parts of a set of an expression; None if that cannot be said."""
    parts = set()
    for kind, value in items:
        match str(kind):
            case "LITERAL":
                parts.add(re.escape(chr(value)))
            case "RANGE":
                parts.add(f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}")
            case "CATEGORY" if str(value) == "CATEGORY_DIGIT":
                parts.add(r"\d")
            case _:
                return None
    return frozenset(parts) or None


def _only(items: Any, fits: Callable[[str], bool], *categories: str) -> bool:
    """Returns whether a set of characters holds nothing else than what `fits`, or the named categories hold."""
    return bool(items) and all(
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
