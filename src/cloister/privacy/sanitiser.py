"""A request's texts in, sanitised texts out: detect, remember, charge, draw, replace, in this order.

Guarantees: the ledger has the charge on the disk before a draw is made, and a refusal leaves nothing drawn. Every span
that was found is replaced, also where its replacement is unknown to the sampler. Equal spans get equal replacements, and what
was found once is replaced wherever it stands in the session's later texts, whatever surrounds it: answers that were restored come
back with the next request.
Assumes: the sampler keeps its word about costs (its tables are certified when they are loaded).
Does not cover: what no detector finds; lengths of the texts in words; after a restart, what only a text before it
told to be a secret.
Edge cases: a public or very short word in the place of a password (`token: str`) is replaced there alone, and never put back.
"""

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

from cloister.errors import PrivacyError
from cloister.privacy import numbers
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.detector import Detection
from cloister.privacy.formats import pseudonym
from cloister.privacy.labels import Finding, Format, Label, Numeral
from cloister.privacy.ledger import Entry, Ledger, Receipt
from cloister.privacy.mechanism import Cost, Kind, Mechanism, Sampler, Span
from cloister.privacy.memo import Memo, Remembered
from cloister.privacy.randomness import Randomness
from cloister.privacy.restore import Swap
from cloister.privacy.words import INSTRUCTION_WORDS, POSSESSIVE, WORD, cased_like, cleaned, is_stop_word, words_of

NOTHING = Cost(0.0, 0.0)

_NAME = re.compile(r"\S+")
_PART = re.compile(r"[\w'’/.-]*\w")
_ENDED = re.compile(r"(?:['’]s|['’]|s['’]|s|es)?(?!\w)")
"""Where a word ends, or what English hangs on one: what restoring leaves there (`privacy.restore`)."""
_REST = re.compile(r"\w(?:.*\w)?", re.DOTALL)

SHORT_WORD = 4
"""Letters of a word that is too short to be looked for everywhere."""

TABLES_SHOWN = 32
"""Digits of the candidates' digest in a policy: 128 bits."""

SEEN_TEXTS = 1024
"""Texts whose findings are remembered, by a keyed hash, as places and keys of the memo: a chat sends its earlier turns again with
every request."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A span to be replaced, under the memo's key for it: no text."""

    start: int
    stop: int
    label: Label
    tag: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Fresh:
    """A span that is drawn for: its text in the form that is drawn for, and what that costs."""

    tag: bytes
    label: Label
    text: str = field(repr=False)
    cost: Cost


@dataclass(frozen=True)
class Sanitised:
    """What may be sent, and what the client keeps to itself."""

    texts: tuple[str, ...]
    swaps: tuple[Swap, ...] = field(repr=False)
    kept: frozenset[str] = field(repr=False)
    """Words that were sent as they are."""
    receipt: Receipt
    counts: dict[str, int]
    """How many distinct spans of each label were replaced."""
    drawn: int
    """How many of them were drawn for this request; the others were remembered."""


class Sanitiser:
    """Sanitises for one session. Calls are served one after another."""

    def __init__(self, detection: Detection, sampler: Sampler, ledger: Ledger, session: str, budget: float) -> None:
        """Opens or resumes `session` in the ledger.

        Raises:
            BudgetError: the budget is not positive, or the session has another one, another policy or other tables.
            PrivacyError: the sampler's tables have no name, so that a session could be resumed with others.
        """
        if not sampler.tables:
            raise PrivacyError("The candidates have no digest.", remedy="Write them to a file and read that.")
        self.detection = detection
        self.session = session
        drawn = f"{sampler.mechanism}, ε = {sampler.epsilon:.6g} per span"
        self.policy = f"{detection.policy}; {drawn}; candidates {sampler.tables[:TABLES_SHOWN]}"
        self._sampler = sampler
        self._ledger = ledger
        self._memo = Memo()
        self._key = os.urandom(32)
        self._seen: dict[bytes, tuple[Piece, ...]] = {}
        self._epsilon = Fraction(str(sampler.epsilon)).limit_denominator(10**6)
        if self._epsilon > sampler.epsilon:
            self._epsilon -= Fraction(1, 10**6)
        self._value_cost = numbers.cost(self._epsilon)
        self._turn = threading.Lock()
        ledger.open_session(session, budget, _typical(sampler), self.policy, sampler.privacy_loss())

    def sanitise(self, texts: Sequence[str]) -> Sanitised:
        """Returns `texts` with every sensitive span replaced, charged as one prompt.

        Raises:
            BudgetError: the session's budget does not cover it; nothing was drawn and nothing may be sent.
            PrivacyError: a guarantee could not be kept; nothing may be sent.
        """
        with self._turn:
            plain = [cleaned(text) for text in texts]
            normal: dict[bytes, str] = {}
            rows, kept = self._again(plain, [self._pieces(text, normal) for text in plain])
            pieces = [(piece, text) for text, row in zip(plain, rows, strict=True) for piece in row]
            first = {one[0].tag: one for one in reversed(pieces)}
            fresh = [self._fresh(*one, normal) for tag, one in reversed(first.items()) if self._memo.get(tag) is None]
            receipt = self._charge(fresh, len(first) - len(fresh))
            self._draw(fresh)
            made = [self._replaced(text, row) for text, row in zip(plain, rows, strict=True)]
        swaps = {(swap.sent, swap.own): swap for _, row in made for swap in row}
        counts = Counter([str(piece.label) for piece in {piece.tag: piece for piece, _ in pieces}.values()])
        return Sanitised(
            tuple([text for text, _ in made]), tuple(swaps.values()), kept, receipt, dict(counts), len(fresh)
        )

    def _pieces(self, text: str, normal: dict[bytes, str]) -> tuple[Piece, ...]:
        """Returns what is to be drawn for in `text`, and notes its normal forms. What was found before is remembered."""
        known = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key).digest()
        found = self._seen.pop(known, None)
        if found is None:
            parts = [part for finding in self.detection.find(text) for part in _split(text, finding)]
            found = tuple([self._piece(text, part, normal) for part in parts])
        self._seen[known] = found  # the last used is the last
        if len(self._seen) > SEEN_TEXTS:
            del self._seen[next(iter(self._seen))]
        return found

    def _piece(self, text: str, found: Finding, normal: dict[bytes, str]) -> Piece:
        own = text[found.start : found.stop]
        form = self._normal(own, found.label)
        tag = self._memo.tag(found.label, form)
        normal.setdefault(tag, form)
        if self._everywhere(own, found.label):
            self._memo.look_for(own, tag, found.label)
        return Piece(found.start, found.stop, found.label, tag)

    def _fresh(self, piece: Piece, text: str, normal: dict[bytes, str]) -> _Fresh:
        form = normal.get(piece.tag) or self._normal(text[piece.start : piece.stop], piece.label)
        return _Fresh(piece.tag, piece.label, form, self._cost(form, piece.label))

    def _again(
        self, texts: Sequence[str], found: Sequence[tuple[Piece, ...]]
    ) -> tuple[list[tuple[Piece, ...]], frozenset[str]]:
        """Returns the pieces with those added whose words were found elsewhere, in this request or before it; all other words.

        What a detector knows by its surroundings once is a secret everywhere: the password after `password is` also where an
        answer repeats it, which comes back with the next request. In lower case a name may be another word.
        """
        labels = {piece.tag: piece.label for row in found for piece in row if isinstance(piece.label, Kind)}
        rows: list[tuple[Piece, ...]] = []
        kept: set[str] = set()
        for text, row in zip(texts, found, strict=True):
            row = self._with_known(text, row)
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
        return isinstance(label, Numeral) or (len(own) > 2 and not self._ordinary(own))

    def _ordinary(self, own: str) -> bool:
        """Returns whether a span is a public word, or as short as one, as in `the password is required` and `token: str`."""
        known = is_stop_word(own) or own.lower() in INSTRUCTION_WORDS
        if known or not own.isalpha():
            return known
        return len(own) <= SHORT_WORD or self._sampler.cost(Span(own.lower(), Kind.WORD)).epsilon > 0

    def _with_known(self, text: str, row: tuple[Piece, ...]) -> tuple[Piece, ...]:
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
        kept = [piece for part in row for piece in self._beside(text, part, known)]
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

    def _beside(self, text: str, piece: Piece, known: Sequence[Piece]) -> Iterator[Piece]:
        """Yields what of a piece lies outside of those that are known."""
        over = [one for one in known if one.start < piece.stop and piece.start < one.stop]
        if not over:
            yield piece
            return
        starts, stops = [piece.start, *[one.stop for one in over]], [*[one.start for one in over], piece.stop]
        label = Format.IDENTIFIER if isinstance(piece.label, Numeral) else piece.label
        for start, stop in zip(starts, stops, strict=True):
            if start < stop and (rest := _REST.search(text, start, stop)) is not None:
                yield self._piece(text, Finding(*rest.span(), label), {})

    def _normal(self, span: str, label: Label) -> str:
        """Returns the form of a span for which its replacement is drawn: one form for all of its cases.

        A word is drawn in lower case where the sampler knows it so, else as it is written.
        """
        if label is Kind.WORD and not span.islower():
            lower = span.lower()
            if self._sampler.cost(Span(lower, Kind.WORD)).epsilon > 0:
                return lower
        if isinstance(label, Kind) and span.isupper() and len(span) > 3:
            return span.title()
        return " ".join(span.split()) if isinstance(label, Kind) else span

    def _cost(self, text: str, label: Label) -> Cost:
        if isinstance(label, Kind):
            return self._sampler.cost(Span(text, label))
        return self._value_cost if isinstance(label, Numeral) else NOTHING

    def _charge(self, fresh: Sequence[_Fresh], repeated: int) -> Receipt:
        entries: Counter[tuple[str, Cost, bool]] = Counter()
        pseudonyms = 0
        for one in fresh:
            if isinstance(one.label, Format):
                pseudonyms += 1
            elif one.cost.epsilon > 0:
                entries[str(one.label), one.cost, isinstance(one.label, Kind)] += 1
        charged = [Entry(kind, Charge(cost, count, ours)) for (kind, cost, ours), count in entries.items()]
        return self._ledger.charge(self.session, charged, repeated=repeated, pseudonyms=pseudonyms)

    def _draw(self, fresh: Sequence[_Fresh]) -> None:
        sampled = [(one, Span(one.text, one.label)) for one in fresh if isinstance(one.label, Kind)]
        replacements = self._sampler.replace([span for _, span in sampled]) if sampled else []
        for (one, _), replacement in zip(sampled, replacements, strict=True):
            if replacement.cost.epsilon > one.cost.epsilon * (1 + 1e-12):
                raise PrivacyError("The sampler spent more than it had announced; nothing was sent.")
            if len(replacement.class_ids) != 1:
                raise PrivacyError("A span was charged as one draw and drawn in several; nothing was sent.")
            self._memo.put(one.tag, Remembered(replacement.text, one.label))
        below = Randomness().below
        for one in fresh:
            if isinstance(one.label, Format):
                made = pseudonym(one.text, one.label, self._memo.unused, below)
                self._memo.put(one.tag, Remembered(made, one.label))
            elif isinstance(one.label, Numeral):
                drawn = self._drawn_in_other_form(one.text) or numbers.noisy(one.text, self._epsilon, below)
                if drawn is None:
                    raise PrivacyError("A value was taken for a number and is none; nothing was sent.")
                self._memo.put(one.tag, Remembered(drawn, one.label))

    def _drawn_in_other_form(self, number: str) -> str | None:
        """Returns what was drawn for a number that is written with separators here and was without, or the other way round."""
        other = numbers.other_form(number)
        drawn = None if other is None else self._memo.get(self._memo.tag(Numeral.NUMBER, other))
        return None if drawn is None else numbers.other_form(drawn.text)

    def _replaced(self, text: str, pieces: Sequence[Piece]) -> tuple[str, list[Swap]]:
        parts: list[str] = []
        swaps: list[Swap] = []
        place = 0
        for piece in pieces:
            remembered = self._memo.get(piece.tag)
            if remembered is None:
                raise PrivacyError("A span has no replacement; nothing was sent.")
            own = text[piece.start : piece.stop]
            sent = cased_like(remembered.text, own) if isinstance(piece.label, Kind) else remembered.text
            parts += [text[place : piece.start], sent]
            if piece.label is not Format.KEY or not self._ordinary(own):  # put back it would not be found again
                swaps.append(Swap(sent, own, piece.label))
            place = piece.stop
        return "".join([*parts, text[place:]]), swaps


def _words_between(text: str, pieces: Sequence[Piece]) -> set[str]:
    """Returns the words of what no piece covers."""
    starts, stops = [0, *[piece.stop for piece in pieces]], [*[piece.start for piece in pieces], len(text)]
    return set(words_of("\0".join([text[start:stop] for start, stop in zip(starts, stops, strict=True)])))


def _split(text: str, finding: Finding) -> list[Finding]:
    """Returns the findings that one finding is drawn as: a full name is a first name and last names.

    So a person who is first named in full and then by one name stays the same person. A value that cannot be read as one
    is drawn word by word.
    """
    span = text[finding.start : finding.stop]
    if finding.label is Kind.PERSON:
        words = [m for m in _NAME.finditer(span) if m[0].isalpha() or any(c.isalpha() for c in m[0])]
        labels = [Kind.FIRST_NAME] * (len(words) > 1) + [Kind.LAST_NAME] * len(words)
        return [
            Finding(finding.start + word.start(), finding.start + word.start() + len(word.group().rstrip(".,")), label)
            for word, label in zip(words, labels, strict=False)
        ]
    if isinstance(finding.label, Numeral) and numbers.read(span) is None:
        return [
            Finding(
                finding.start + match.start(),
                finding.start + match.end(),
                Format.IDENTIFIER if any(c.isdigit() for c in match.group()) else Kind.WORD,
            )
            for match in _PART.finditer(span)
            if not is_stop_word(match.group())
        ]
    return [finding]


def _typical(sampler: Sampler) -> Cost:
    """Returns the cost of a draw, by which the session's filter is chosen."""
    if sampler.mechanism is Mechanism.GUMBEL:
        return Cost(sampler.epsilon, sampler.epsilon**2 / 8)
    return pure(sampler.epsilon)
