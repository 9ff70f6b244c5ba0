"""Where what was found once stands again in a session's texts, whatever surrounds it there.

Covers: secrets that a detector knows by their surroundings alone (the password after `password is`) and that come back with an
answer; names found elsewhere. Guarantees: a known span is replaced wherever it stands as a whole; what a detector found beside it
stays a piece of its own.
Does not cover: after a restart, what only a text before it told to be a secret; a name in lower case, which may be another word.
Edge cases: a public or very short word in the place of a password (`token: str`) is not looked for elsewhere.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from cloister.privacy.labels import Finding, Format, Label, Numeral
from cloister.privacy.mechanism import Kind, Sampler, Span
from cloister.privacy.memo import Memo
from cloister.privacy.words import ENDING, INSTRUCTION_WORDS, POSSESSIVE, WORD, is_stop_word, words_of

_ENDED = re.compile(ENDING + r"(?!\w)")
"""Where a word ends, or what English hangs on one: what restoring leaves there (`privacy.restore`)."""
_REST = re.compile(r"\w(?:.*\w)?", re.DOTALL)

SHORT_WORD = 4
"""Letters of a word that is too short to be looked for everywhere."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A span to be replaced, under the memo's key for it: no text."""

    start: int
    stop: int
    label: Label
    tag: bytes = field(repr=False)


MakePiece = Callable[[str, Finding], Piece]
"""Returns the piece of a finding in a text."""


class KnownSpans:
    """What the memo of one session knows, looked for in its texts."""

    def __init__(self, memo: Memo, sampler: Sampler) -> None:
        self._memo = memo
        self._sampler = sampler

    def note(self, own: str, tag: bytes, label: Label) -> None:
        """Lets a span be found everywhere from now on. Single words of names and the like are looked for as words anyway."""
        if self._everywhere(own, label):
            self._memo.look_for(own, tag, label)

    def added(
        self, texts: Sequence[str], found: Sequence[tuple[Piece, ...]], make: MakePiece
    ) -> tuple[list[tuple[Piece, ...]], frozenset[str]]:
        """Returns the pieces with those added whose words were found elsewhere, in this request or before it; all other words.

        What a detector knows by its surroundings once is a secret everywhere: the password after `password is` also where an
        answer repeats it, which comes back with the next request. In lower case a name may be another word.
        """
        labels = {piece.tag: piece.label for row in found for piece in row if isinstance(piece.label, Kind)}
        rows: list[tuple[Piece, ...]] = []
        kept: set[str] = set()
        for text, row in zip(texts, found, strict=True):
            row = self._with_known(text, row, make)
            words = _words_between(text, row)
            if self._memo.may_hold_any(words):
                extra = self._named_elsewhere(text, row, labels)
                if extra:
                    row = tuple(sorted([*row, *extra], key=lambda piece: piece.start))
                    words = _words_between(text, row)
            rows.append(row)
            kept |= words
        return rows, frozenset(kept)

    def _named_elsewhere(self, text: str, row: Sequence[Piece], labels: Mapping[bytes, Label]) -> list[Piece]:
        covered = bytearray(len(text))
        for piece in row:
            covered[piece.start : piece.stop] = b"\1" * (piece.stop - piece.start)
        extra = []
        for match in WORD.finditer(text):
            start, word = match.start(), match.group()
            span = POSSESSIVE.sub("", word) if word[-2:-1] in "'’" else word
            if covered[start] or not self._memo.may_hold(span) or any(covered[start : start + len(span)]):
                continue
            tag = self._memo.tag(Kind.WORD, span)
            remembered = self._memo.get(tag)
            label = labels.get(tag) or (remembered.label if remembered else None)
            if isinstance(label, Kind) and (span[0].isupper() or label is Kind.WORD):
                extra.append(Piece(start, start + len(span), label, tag))
        return extra

    def _everywhere(self, own: str, label: Label) -> bool:
        """Returns whether a span is looked for letter by letter: single words of names and the like are looked for as words."""
        if isinstance(label, Kind):
            return WORD.fullmatch(own) is None
        return isinstance(label, Numeral) or (len(own) > 2 and not self.ordinary(own))

    def ordinary(self, own: str) -> bool:
        """Returns whether a span is a public word, or as short as one, as in `the password is required` and `token: str`."""
        known = is_stop_word(own) or own.lower() in INSTRUCTION_WORDS
        if known or not own.isalpha():
            return known
        return len(own) <= SHORT_WORD or self._sampler.cost(Span(own.lower(), Kind.WORD)).epsilon > 0

    def _with_known(self, text: str, row: tuple[Piece, ...], make: MakePiece) -> tuple[Piece, ...]:
        """Returns the pieces with those added that were found elsewhere and stand here again, and the others cut to make room."""
        own = {(piece.start, piece.stop): piece for piece in row}
        known: list[Piece] = []
        end = 0
        for start, stop in self._memo.places(text):
            if start >= end and (one := self._known(text, start, stop, own.get((start, stop)))) is not None:
                known.append(one)
                end = stop
        known = [one for one in known if not any(p.start <= one.start and one.stop <= p.stop for p in row)]
        if not known:
            return row
        kept = [piece for part in row for piece in _beside(text, part, known, make)]
        return tuple(sorted([*kept, *known], key=lambda piece: piece.start))

    def _known(self, text: str, start: int, stop: int, found: Piece | None) -> Piece | None:
        """Returns the piece that stands there if it may be one here; `found`: what a detector found there."""
        own = text[start:stop]
        if own[-1].isspace() or ((own[-1].isalnum() or own[-1] == "_") and _ENDED.match(text, stop) is None):
            return None
        tags = (self._memo.tag(some, own) for some in (Format.IDENTIFIER, Numeral.NUMBER, Kind.WORD))
        for tag in tags if found is None else chain((found.tag,), tags):
            label = self._memo.looked_for(tag)
            if label is not None:
                named = isinstance(label, Kind) and label is not Kind.WORD
                return None if named and own.islower() else Piece(start, stop, label, tag)
        return None


def _beside(text: str, piece: Piece, known: Sequence[Piece], make: MakePiece) -> Iterator[Piece]:
    """Yields what of a piece lies outside of those that are known."""
    over = [one for one in known if one.start < piece.stop and piece.start < one.stop]
    if not over:
        yield piece
        return
    starts, stops = [piece.start, *[one.stop for one in over]], [*[one.start for one in over], piece.stop]
    label = Format.IDENTIFIER if isinstance(piece.label, Numeral) else piece.label
    for start, stop in zip(starts, stops, strict=True):
        if start < stop and (rest := _REST.search(text, start, stop)) is not None:
            yield make(text, Finding(*rest.span(), label))


def _words_between(text: str, pieces: Sequence[Piece]) -> set[str]:
    """Returns the words of what no piece covers."""
    starts, stops = [0, *[piece.stop for piece in pieces]], [*[piece.start for piece in pieces], len(text)]
    return set(words_of("\0".join([text[start:stop] for start, stop in zip(starts, stops, strict=True)])))
