"""A request's texts in, sanitised texts out: detect, remember, charge, draw, replace, in this order.

Guarantees: the ledger has the charge on the disk before a draw is made, and a refusal leaves nothing drawn. Every span
that was found is replaced, also where its replacement is unknown to the sampler. Equal spans get equal replacements.
Assumes: the sampler keeps its word about costs (its tables are certified when they are loaded).
Does not cover: what no detector finds; lengths of the texts in words.
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
from cloister.privacy.labels import Finding, Format, Label, Numeral
from cloister.privacy.ledger import Entry, Ledger, Receipt
from cloister.privacy.mechanism import Cost, Kind, Mechanism, Sampler, Span
from cloister.privacy.memo import Memo, Remembered
from cloister.privacy.randomness import Randomness
from cloister.privacy.restore import Swap
from cloister.privacy.words import POSSESSIVE, WORD, cased_like, cleaned, is_stop_word

NOTHING = Cost(0.0, 0.0)

TABLES_SHOWN = 32
"""Digits of the candidates' digest in a policy: 128 bits."""

SEEN_TEXTS = 1024
"""Texts whose findings are remembered, by a keyed hash: a chat sends its earlier turns again with every request."""


@dataclass(frozen=True)
class Piece:
    """A span to be replaced, as it is drawn for: `text` in its normal case."""

    start: int
    stop: int
    label: Label
    text: str = field(repr=False)
    tag: bytes = field(repr=False)


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
        self._seen: dict[bytes, tuple[Finding, ...]] = {}
        self._epsilon = Fraction(str(sampler.epsilon)).limit_denominator(10**6)
        if self._epsilon > sampler.epsilon:
            self._epsilon -= Fraction(1, 10**6)
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
            pieces = self._again(plain, [self._pieces(text) for text in plain])
            everything = [piece for row in pieces for piece in row]
            new = {piece.tag: piece for piece in reversed(everything) if self._memo.get(piece.tag) is None}
            fresh = list(reversed(new.values()))
            receipt = self._charge(fresh, len({piece.tag for piece in everything}) - len(fresh))
            self._draw(fresh)
            made = [self._replaced(text, row) for text, row in zip(plain, pieces, strict=True)]
        swaps = {(swap.sent, swap.own): swap for _, row, _ in made for swap in row}
        kept = frozenset(word for _, _, words in made for word in words)
        counts = Counter(str(piece.label) for piece in {p.tag: p for p in everything}.values())
        return Sanitised(
            tuple(text for text, _, _ in made), tuple(swaps.values()), kept, receipt, dict(counts), len(fresh)
        )

    def _pieces(self, text: str) -> list[Piece]:
        return [
            Piece(found.start, found.stop, found.label, span, self._memo.tag(found.label, span))
            for found in self._found(text)
            for span in [self._normal(text[found.start : found.stop], found.label)]
        ]

    def _found(self, text: str) -> tuple[Finding, ...]:
        """Returns what is to be drawn for in `text`; what was found in a text that was seen before is remembered."""
        known = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key).digest()
        found = self._seen.pop(known, None)
        if found is None:
            found = tuple(part for finding in self.detection.find(text) for part in _split(text, finding))
        self._seen[known] = found  # the last used is the last
        if len(self._seen) > SEEN_TEXTS:
            del self._seen[next(iter(self._seen))]
        return found

    def _again(self, texts: Sequence[str], found: list[list[Piece]]) -> list[list[Piece]]:
        """Returns the pieces with those added whose words were found elsewhere, in this request or before it.

        A name that a detector knows by its surroundings once is a secret everywhere; in lower case a name may be another word.
        """
        labels = {piece.tag: piece.label for row in found for piece in row if isinstance(piece.label, Kind)}
        rows = []
        for text, row in zip(texts, found, strict=True):
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
                    extra.append(Piece(start, start + len(span), label, self._normal(span, label), tag))
            rows.append(sorted([*row, *extra], key=lambda piece: piece.start))
        return rows

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

    def _charge(self, fresh: Sequence[Piece], repeated: int) -> Receipt:
        entries: Counter[tuple[str, Cost, bool]] = Counter()
        pseudonyms = 0
        for piece in fresh:
            cost = self._cost(piece)
            if isinstance(piece.label, Format):
                pseudonyms += 1
            elif cost.epsilon > 0:
                entries[str(piece.label), cost, isinstance(piece.label, Kind)] += 1
        charged = [Entry(kind, Charge(cost, count, ours)) for (kind, cost, ours), count in entries.items()]
        return self._ledger.charge(self.session, charged, repeated=repeated, pseudonyms=pseudonyms)

    def _cost(self, piece: Piece) -> Cost:
        if isinstance(piece.label, Kind):
            return self._sampler.cost(Span(piece.text, piece.label))
        return numbers.cost(self._epsilon) if isinstance(piece.label, Numeral) else NOTHING

    def _draw(self, fresh: Sequence[Piece]) -> None:
        sampled = [(piece, Span(piece.text, piece.label)) for piece in fresh if isinstance(piece.label, Kind)]
        replacements = self._sampler.replace([span for _, span in sampled]) if sampled else []
        for (piece, span), replacement in zip(sampled, replacements, strict=True):
            if replacement.cost.epsilon > self._sampler.cost(span).epsilon * (1 + 1e-12):
                raise PrivacyError("The sampler spent more than it had announced; nothing was sent.")
            if len(replacement.class_ids) != 1:
                raise PrivacyError("A span was charged as one draw and drawn in several; nothing was sent.")
            self._memo.put(piece.tag, Remembered(replacement.text, piece.label))
        below = Randomness().below
        for piece in fresh:
            if isinstance(piece.label, Format):
                made = pseudonym(piece.text, piece.label, self._memo.unused, below)
                self._memo.put(piece.tag, Remembered(made, piece.label))
            elif isinstance(piece.label, Numeral):
                drawn = numbers.noisy(piece.text, self._epsilon, below)
                if drawn is None:
                    raise PrivacyError("A value was taken for a number and is none; nothing was sent.")
                self._memo.put(piece.tag, Remembered(drawn, piece.label))

    def _replaced(self, text: str, pieces: Sequence[Piece]) -> tuple[str, list[Swap], list[str]]:
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
            swaps.append(Swap(sent, own, piece.label))
            place = piece.stop
        unchanged = [*parts[0::2], text[place:]]
        return "".join([*parts, text[place:]]), swaps, [word for part in unchanged for word in WORD.findall(part)]


def _split(text: str, finding: Finding) -> list[Finding]:
    """Returns the findings that one finding is drawn as: a full name is a first name and last names.

    So a person who is first named in full and then by one name stays the same person. A value that cannot be read as one
    is drawn word by word.
    """
    span = text[finding.start : finding.stop]
    if finding.label is Kind.PERSON:
        words = [m for m in re.finditer(r"\S+", span) if any(c.isalpha() for c in m.group())]
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
            for match in re.finditer(r"[\w'’/.-]*\w", span)
            if not is_stop_word(match.group())
        ]
    return [finding]


def _typical(sampler: Sampler) -> Cost:
    """Returns the cost of a draw, by which the session's filter is chosen."""
    if sampler.mechanism is Mechanism.GUMBEL:
        return Cost(sampler.epsilon, sampler.epsilon**2 / 8)
    return pure(sampler.epsilon)
