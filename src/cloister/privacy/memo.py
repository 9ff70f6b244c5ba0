"""One draw per distinct span and session: the same secret always gets the same replacement, so noise never averages out.

Covers: repeats within a prompt, across prompts and in the answers that a chat sends back.
Guarantees: the table is keyed by HMAC-SHA256 under a key of the session, over the type (word or name, identifier, value)
and the normalised span, so it holds no span. Whether a name was taken for a person or for a place makes no second draw.
Key and table live in memory only.
Where a whole span stands again is told by keyed hashes of its first letters and of all of them, and by its length.
Does not cover: a restart. It draws anew and the ledger charges anew, since two draws do tell more than one.
"""

import hmac
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from cloister.privacy.labels import Label

HEAD: Final = 3
"""First characters of a span, or all of a shorter one, by whose hash it is looked for."""

_BLANKS: Final = dict.fromkeys(map(ord, "\t\n\r\v\f\xa0"), " ")

_BEGIN: Final = re.compile(r"(?<!\w)\w|[^\w\s]")
"""Where something begins that restoring may have put there (`privacy.restore`): a word, or a sign."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A replacement, and what the span was called when it was drawn."""

    text: str
    label: Label


class Memo:
    """The replacements of one session."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._table: dict[bytes, Remembered] = {}
        self._used: set[str] = set()
        self._seen: set[int] = set()  # Python's keyed hashes, 64 bits, of this process
        self._lengths: dict[int, tuple[int, ...]] = {}  # of spans to look for, by the hash of their heads
        self._whole: set[int] = set()  # hashes of all their characters
        self._short: set[int] = set()  # hashes of the first characters of those shorter than a head
        self._looked_for: dict[bytes, Label] = {}

    def tag(self, label: Label, span: str) -> bytes:
        """Returns the key of a span: equal for equal spans, whatever their case and blanks."""
        plain = normalised(span)
        self._seen.add(hash(plain))
        return hmac.digest(self._key, f"{type(label).__name__}\0{plain}".encode(), "sha256")

    def look_for(self, span: str, tag: bytes, label: Label) -> None:
        """Lets `places` tell where this span may stand, and `looked_for` what it was called, also if nothing is drawn for it."""
        self._looked_for.setdefault(tag, label)
        form, length = folded(span), len(span)
        self._whole.add(hash(form))
        if length < HEAD:
            self._short.add(hash(form[0]))
        known = self._lengths.get(head := hash(form[:HEAD]), ())
        if length not in known:
            self._lengths[head] = tuple(sorted((*known, length), reverse=True))

    def looked_for(self, tag: bytes) -> Label | None:
        """Returns what a span that is looked for was called; None of another."""
        return self._looked_for.get(tag)

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields where spans to look for stand, start and stop: in order, of those that begin together the longest first."""
        lengths, whole = self._lengths, self._whole
        if not lengths:
            return
        form, short = folded(text), self._short
        starts = [match.start() for match in _BEGIN.finditer(text)]
        may = {start for start in starts if hash(form[start : start + HEAD]) in lengths}
        if short:
            may.update([start for start in starts if hash(form[start]) in short])
        for start in sorted(may):
            for head in range(start + HEAD, start, -1):
                for length in lengths.get(hash(form[start:head]), ()):
                    if start + length <= len(form) and hash(form[start : start + length]) in whole:
                        yield start, start + length

    def may_hold(self, span: str) -> bool:
        """Returns False only if no such span was ever tagged: a quick look before the HMAC."""
        return hash(normalised(span)) in self._seen

    def may_hold_any(self, words: Collection[str]) -> bool:
        """Returns False only if none of some words was ever tagged, with or without a possessive ending."""
        bare = [word[:-2] for word in words if word[-2:-1] in ("'", "’")]
        return not all(self._seen.isdisjoint(map(hash, map(str.casefold, some))) for some in (words, bare))

    def get(self, tag: bytes) -> Remembered | None:
        """Returns what was drawn for a span, if it was."""
        return self._table.get(tag)

    def put(self, tag: bytes, remembered: Remembered) -> None:
        """Remembers a draw; the first one stays."""
        self._table.setdefault(tag, remembered)
        self._used.add(normalised(remembered.text))

    def unused(self, text: str) -> bool:
        """Returns whether no span got this replacement."""
        return normalised(text) not in self._used

    def __len__(self) -> int:
        return len(self._table)


def normalised(span: str) -> str:
    """Returns a span without differences of case and of blanks."""
    return span.casefold() if span.isalnum() else " ".join(span.split()).casefold()


def folded(text: str) -> str:
    """Returns a text without differences of case and of kinds of blanks, character by character: places stay what they are."""
    text = text.translate(_BLANKS)
    if text.isascii():
        return text.lower()
    form = text.casefold()
    return form if len(form) == len(text) else "".join(map(_folded, text))


def _folded(character: str) -> str:
    return next((form for form in (character.casefold(), character.lower()) if len(form) == 1), character)
