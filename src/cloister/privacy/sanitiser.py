"""A request's texts in, sanitised texts out: detect, remember, charge, draw, replace, in this order.

Guarantees: the ledger has the charge on the disk before a draw is made, and a refusal leaves nothing drawn. Every span
that was found is replaced, also where its replacement is unknown to the sampler. Equal spans get equal replacements, and what
was found once is replaced wherever it stands in the session's later texts, whatever surrounds it: answers that were restored come
back with the next request (`privacy.known_spans`).
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from cloister.errors import PrivacyError
from cloister.privacy import numbers
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.detector import Detection
from cloister.privacy.formats import pseudonym
from cloister.privacy.known_spans import KnownSpans, Piece
from cloister.privacy.labels import Finding, Format, Label, Numeral
from cloister.privacy.ledger import Entry, Ledger, Receipt
from cloister.privacy.mechanism import Cost, Kind, Mechanism, Sampler, Span
from cloister.privacy.memo import Memo, Remembered
from cloister.privacy.randomness import Randomness
from cloister.privacy.restore import Swap
from cloister.privacy.words import cased_like, cleaned, is_stop_word

NOTHING = Cost(0.0, 0.0)

_NAME = re.compile(r"\S+")
_PART = re.compile(r"[\w'’/.-]*\w")

TABLES_SHOWN = 32
"""Digits of the candidates' digest in a policy: 128 bits."""

SEEN_TEXTS = 1024
"""Texts whose findings are remembered, by a keyed hash, as places and keys of the memo: a chat sends its earlier turns again with
every request."""


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
        self._known = KnownSpans(self._memo, sampler)
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
            found = [self._pieces(text, normal) for text in plain]
            rows, kept = self._known.added(plain, found, lambda text, one: self._piece(text, one, {}))
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
        self._known.note(own, tag, found.label)
        return Piece(found.start, found.stop, found.label, tag)

    def _fresh(self, piece: Piece, text: str, normal: dict[bytes, str]) -> _Fresh:
        form = normal.get(piece.tag) or self._normal(text[piece.start : piece.stop], piece.label)
        return _Fresh(piece.tag, piece.label, form, self._cost(form, piece.label))

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
            if piece.label is not Format.KEY or not self._known.ordinary(own):  # put back it would not be found again
                swaps.append(Swap(sent, own, piece.label))
            place = piece.stop
        return "".join([*parts, text[place:]]), swaps


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
