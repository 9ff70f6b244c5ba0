"""One draw per distinct span and session: the same secret always gets the same replacement, so noise never averages out.

Covers: repeats within a prompt, across prompts and in the answers that a chat sends back.
Guarantees: the table is keyed by HMAC-SHA256 under a key of the session, over the type (word or name, identifier, value)
and the normalised span, so it holds no span. Whether a name was taken for a person or for a place makes no second draw.
Key and table live in memory only; `forget` drops both.
Does not cover: a restart. It draws anew and the ledger charges anew, since two draws do tell more than one.
"""

import hmac
import os
from collections.abc import Collection
from dataclasses import dataclass

from cloister.privacy.labels import Label


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

    def tag(self, label: Label, span: str) -> bytes:
        """Returns the key of a span: equal for equal spans, whatever their case and blanks."""
        plain = normalised(span)
        self._seen.add(hash(plain))
        return hmac.digest(self._key, f"{type(label).__name__}\0{plain}".encode(), "sha256")

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
