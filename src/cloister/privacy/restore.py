"""The way back: the user's own names and values in place of what was sent, in a streamed answer.

Covers: replacements cut by any chunk boundary, in capitals, with a possessive or plural ending, numbers with or without
thousands separators. Guarantees: runs on the client only, on what it already knows; text that holds no replacement is passed
on unchanged, and all pieces together equal the restoration of the whole answer.
Does not cover: replacements that a model rewrites (a nickname, a translation, a sum of two numbers), and what two secrets
share by chance: a replacement that stands for two of them, or that the prompt also holds as an ordinary word, is left as it
came and reported as ambiguous, since any choice could be wrong.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from cloister.privacy.labels import Label, Numeral
from cloister.privacy.mechanism import Kind
from cloister.privacy.words import ENDING

_LONGEST_ENDING: Final = 2
_BLANKS: Final = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Swap:
    """What was sent for what the user wrote."""

    sent: str
    own: str = field(repr=False)
    label: Label


@dataclass(frozen=True, slots=True)
class Restored:
    """A place in the restored answer, in characters, and what stood there."""

    start: int
    stop: int
    sent: str
    label: Label


class ReverseMap:
    """What an answer's replacements stand for; made for one request, shared by its choices."""

    def __init__(self, swaps: Iterable[Swap], kept: Iterable[str] = (), *, words: bool = False) -> None:
        """Takes the swaps of a request.

        `kept` are words that were sent unchanged; `words` restores ordinary words (`Kind.WORD`) as well.
        """
        wanted = [swap for swap in swaps if swap.sent != swap.own and (words or swap.label is not Kind.WORD)]
        by_sent: dict[str, dict[str, Swap]] = {}
        for swap in wanted:
            by_sent.setdefault(_plain(swap.sent), {}).setdefault(_plain(swap.own), swap)
        unchanged = set(kept)
        self.ambiguous = sorted(
            sent for sent, owns in by_sent.items() if len(owns) > 1 or next(iter(owns.values())).sent in unchanged
        )
        """Replacements (folded) that are not restored, since they could stand for several things."""
        clear = {sent: next(iter(owns.values())) for sent, owns in by_sent.items() if sent not in self.ambiguous}
        self._swaps: dict[str, Swap] = dict(clear)
        for swap in clear.values():
            for variant in _variants(swap):
                self._swaps.setdefault(_plain(variant.sent), variant)
        self._begins = {sent.partition(" ")[0] for sent in self._swaps}
        self._prefixes = {sent[:length] for sent in self._swaps for length in range(1, len(sent) + 1)}
        self.longest = max((len(sent) for sent in self._swaps), default=0) + _LONGEST_ENDING

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return _compiled(self._swaps)

    def matches(self, text: str, start: int) -> Iterator[re.Match[str]]:
        """Returns where replacements stand in `text` from `start` on.

        Their expression is made when one may stand there for the first time: that takes as long as sanitising a prompt.
        """
        plain = text.casefold()
        return self._pattern.finditer(text, start) if any(begin in plain for begin in self._begins) else iter(())

    def own(self, match: re.Match[str]) -> tuple[str, Swap] | None:
        """Returns what a match stands for, in the case of the match; None if its case says that it is another word."""
        seen = match.group(1)
        swap = self._swaps.get(_plain(seen))
        if swap is None:  # letters that an expression without case takes for others, such as ı for i
            return None
        if seen == swap.sent or _BLANKS.sub(" ", seen) == swap.sent:
            return swap.own, swap
        letters = [c for c in seen if c.isalpha()]
        if len(letters) > 1 and all(c.isupper() for c in letters):
            return swap.own.upper(), swap
        if seen[:1].isupper() and not swap.sent[:1].isupper():
            return swap.own[:1].upper() + swap.own[1:], swap
        return None

    def may_begin(self, tail: str) -> bool:
        """Returns whether more text could make `tail` a replacement, or a longer one, or give it an ending."""
        plain = _plain(tail)
        if plain in self._prefixes:
            return True
        return any(plain[: len(plain) - cut] in self._swaps for cut in range(_LONGEST_ENDING + 1) if len(plain) > cut)

    def __bool__(self) -> bool:
        return bool(self._swaps)


class Restorer:
    """Restores one streamed answer. `restored` lists the places, in characters of what was passed on."""

    def __init__(self, reverse: ReverseMap) -> None:
        self._reverse = reverse
        self._held = ""
        self._before = ""  # the last character passed on, as it was sent
        self._length = 0
        self.restored: list[Restored] = []

    def push(self, text: str) -> str:
        """Returns what is final of the answer so far, beyond what was returned before; possibly empty."""
        if not self._reverse:
            self._length += len(text)
            return text
        self._held += text
        return self._release(self._safe())

    def flush(self) -> str:
        """Returns what is still held; call it after the last piece."""
        return self._release(len(self._held))

    def _safe(self) -> int:
        """Returns how much of the held text no later text can change."""
        held = self._held
        for start in range(max(0, len(held) - 2 * self._reverse.longest), len(held)):
            before = held[start - 1] if start else self._before
            if not (before.isalnum() and held[start].isalnum()) and self._reverse.may_begin(held[start:]):
                return start
        return len(held)

    def _release(self, stop: int) -> str:
        """Passes on the first `stop` held characters, and the rest of a replacement that begins in them."""
        if not stop:
            return ""
        text = self._before + self._held  # all of it: what comes after a replacement may say that it is none
        pieces: list[str] = []
        place = len(self._before)
        end = place + stop
        length = self._length
        for match in self._reverse.matches(text, place):
            if match.start() >= end:
                break
            end = max(end, match.end(1))
            found = self._reverse.own(match)
            if found is None:
                continue
            own, swap = found
            pieces.append(text[place : match.start()])
            length += match.start() - place
            self.restored.append(Restored(length, length + len(own), swap.sent, swap.label))
            pieces.append(own)
            length += len(own)
            place = match.end(1)
        pieces.append(text[place:end])
        self._length = length + end - place
        self._held = text[end:]
        self._before = text[end - 1]
        return "".join(pieces)


def restore(text: str, reverse: ReverseMap) -> str:
    """Returns a whole text restored."""
    restorer = Restorer(reverse)
    return restorer.push(text) + restorer.flush()


def _compiled(swaps: dict[str, Swap]) -> re.Pattern[str]:
    longest = sorted(swaps, key=len, reverse=True)
    either = "|".join(_bounded(sent) for sent in longest) or r"(?!)"
    return re.compile(f"({either})", re.IGNORECASE)


def _bounded(sent: str) -> str:
    """Returns an expression for a replacement as a whole word, any blanks between its words, and an ending after it."""
    body = r"\s+".join(re.escape(part) for part in sent.split(" "))
    before = r"(?<!\w)" if sent[0].isalnum() else ""
    if sent[-1].isalpha():
        return f"{before}{body}(?={ENDING}(?!\\w))"
    return f"{before}{body}" + (r"(?!\w|[.,]\d)" if sent[-1].isdigit() else "")


def _variants(swap: Swap) -> Sequence[Swap]:
    """Returns other ways in which a model may write a number."""
    if swap.label is not Numeral.NUMBER:
        return ()
    forms = [(_grouped(swap.sent), _grouped(swap.own)), (swap.sent.replace(",", ""), swap.own.replace(",", ""))]
    return [Swap(sent, own, swap.label) for sent, own in forms if sent != swap.sent]


def _grouped(number: str) -> str:
    whole, point, part = number.partition(".")
    return f"{int(whole):,}{point}{part}" if whole.isdigit() and len(whole) > 3 else number


def _plain(text: str) -> str:
    return _BLANKS.sub(" ", text).casefold()
