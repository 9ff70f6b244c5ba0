"""Draws replacements of spans from the certified tables of a candidate file.

Covers: finding a span's class whatever its casing; one integer draw per span; a uniform draw for a span that no class
holds. Does not cover: which spans to replace, drawing once per distinct span, adding up what was spent.

Guarantees: as `mechanism.Sampler`. The work of a draw does not depend on which member of its class the span is.
Assumes: the class of a span (kind, casing, type) may be known to whoever sees the replacement: neighbours are the
members of one class.
Edge cases: a span in a casing that its kind does not hold is looked up in lower case, then capitalised, and its
replacement is given the span's casing; a full name is a first and a last name, two draws, their costs added; an unknown
span becomes a uniform draw over its kind, which spends nothing, since the draw does not depend on it.
"""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction

from cloister.errors import CandidatesError, CertificateError
from cloister.privacy.candidates import Candidates
from cloister.privacy.channel import Channel
from cloister.privacy.mechanism import Cost, DominatingCurve, Kind, Mechanism, RandomSource, Replacement, Span
from cloister.privacy.profile import check_dominates, of_any, work
from cloister.privacy.randomness import Randomness
from cloister.privacy.vocabulary import casing

NOTHING = Cost(0.0, 0.0)
UNKNOWN = -1
MOST_WORK = 2**28
"""What checking a curve may come to (`profile.work`): about 500 classes of 64, some seconds."""
STEPS = 64
"""Points of the curve of any mechanism, on each side of ε = 0."""

Place = tuple[int, int]


class TableSampler:
    """A `mechanism.Sampler` over the tables of one mechanism at one ε."""

    def __init__(
        self,
        candidates: Candidates,
        mechanism: Mechanism = Mechanism.CHANNEL,
        epsilon: Fraction = Fraction(2),
        source: RandomSource = os.urandom,
    ) -> None:
        """Takes candidates that were read (and so certified); `source` other than `os.urandom` is for tests.

        Raises:
            CandidatesError: the candidates have no tables for this mechanism and ε.
        """
        chosen = candidates.table_set(mechanism, epsilon)
        self._candidates = candidates
        self._source = source
        self._mechanism = mechanism
        self._channel = Channel(chosen.tables, source)
        self._costs = tuple(Cost(one.epsilon, one.rho) for one in chosen.certificates)
        self._tables = chosen
        self._curve: DominatingCurve | None = None
        self._epsilon = max((cost.epsilon for cost in self._costs), default=0.0)
        self._of_kind: dict[Kind, list[int]] = {}
        for number, group in enumerate(candidates.classes):
            self._of_kind.setdefault(group.kind, []).append(number)

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism."""
        return self._mechanism

    @property
    def epsilon(self) -> float:
        """The most that one draw from one class costs."""
        return self._epsilon

    @property
    def tables(self) -> str:
        """The digest of the candidate file; empty for candidates that were not read from one."""
        return self._candidates.digest

    def privacy_loss(self) -> DominatingCurve:
        """Returns the curve that dominates every draw from every class.

        It is the one that came with the tables, checked against them at the first call; where that would take longer than
        some seconds, the one of any mechanism of their ε.

        Raises:
            CandidatesError: the curve that came with the tables does not dominate them.
        """
        if self._curve is None:
            curve, tables = self._tables.curve, self._tables.tables
            if work(curve, tables) > MOST_WORK:
                epsilon = float(self._tables.epsilon)
                self._curve = of_any(epsilon, epsilon / STEPS)
            else:
                try:
                    check_dominates(curve, tables)
                except CertificateError as error:
                    raise CandidatesError(error.message, remedy=error.remedy) from None
                self._curve = curve
        return self._curve

    def cost(self, span: Span) -> Cost:
        """Returns what a draw for this span will cost, without drawing."""
        if span.kind is not Kind.PERSON:
            place = self._find(span)[0]
            return NOTHING if place is None else self._costs[place[0]]
        total = NOTHING
        for part in _parts(span):
            total += self.cost(part)
        return total

    def replace(self, spans: Sequence[Span]) -> list[Replacement]:
        """Returns one replacement for each span, in order, each drawn independently.

        Raises:
            CandidatesError: a kind has no candidates at all.
        """
        parts = [_parts(span) for span in spans]
        flat = [part for group in parts for part in group]
        found = [self._find(part) for part in flat]
        places = [place for place, _ in found if place is not None]
        drawn = iter(
            self._channel.draw([place[0] for place in places], [place[1] for place in places]) if places else ()
        )
        below = Randomness(self._source).below
        made = iter(
            [
                self._unknown(part, below) if place is None else self._known(part, place[0], next(drawn), recased)
                for part, (place, recased) in zip(flat, found, strict=True)
            ]
        )
        return [_joined(span, [next(made) for _ in group]) for span, group in zip(spans, parts, strict=True)]

    def replace_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Returns a token for each token, drawn from the single-token members of its class; control tokens stay.

        For token-level sanitising (as the published systems do it). A draw of a member that takes several tokens is
        resolved to its class's first single token: post-processing, which spends nothing.

        Raises:
            CandidatesError: a token is not in the vocabulary that the candidates were built from.
        """
        places: list[Place] = []
        where: list[int] = []
        for position, token in enumerate(tokens):
            if not 0 <= token < self._candidates.provenance.vocabulary:
                raise CandidatesError(
                    f"Token {token} is not in the vocabulary.", remedy="Use the model of the candidates."
                )
            place = self._candidates.find_token(token)
            if place is not None:
                places.append(place)
                where.append(position)
        result = list(tokens)
        drawn = self._channel.draw([place[0] for place in places], [place[1] for place in places]) if places else []
        for position, place, member in zip(where, places, drawn, strict=True):
            members = self._candidates.classes[place[0]].tokens
            result[position] = members[member] if members[member] >= 0 else next(one for one in members if one >= 0)
        return result

    def _find(self, span: Span) -> tuple[Place | None, bool]:
        """Returns the place of a span, and whether a replacement is to be given the span's casing."""
        text, kind, find = span.text, span.kind, self._candidates.find
        place = find(text, kind)
        if place is not None:
            return place, False
        lower = text.lower()
        for form in (lower, lower[:1].upper() + lower[1:], lower.title(), lower.upper()):
            place = find(form, kind)
            if place is not None:
                break
        return place, True

    def _known(self, span: Span, number: int, member: int, recased: bool) -> Replacement:
        text = self._candidates.classes[number].members[member]
        return Replacement(_recase(span.text)(text) if recased else text, span.kind, (number,), self._costs[number])

    def _unknown(self, span: Span, below: Callable[[int], int]) -> Replacement:
        numbers = self._of_kind.get(span.kind)
        if not numbers:
            raise CandidatesError(
                f"The candidate file has nothing of the kind {span.kind}.", remedy="Build the candidates again."
            )
        group = self._candidates.classes[numbers[below(len(numbers))]]
        text = group.members[below(len(group.members))]
        return Replacement(_recase(span.text)(text), span.kind, (UNKNOWN,), NOTHING)


def _parts(span: Span) -> list[Span]:
    """Returns what is drawn for a span: a full name is a first and a last name."""
    if span.kind is not Kind.PERSON:
        return [span]
    names = span.text.split()
    if len(names) < 2:
        return [Span(span.text, Kind.FIRST_NAME)]
    return [Span(" ".join(names[:-1]), Kind.FIRST_NAME), Span(names[-1], Kind.LAST_NAME)]


def _joined(span: Span, parts: list[Replacement]) -> Replacement:
    if len(parts) == 1 and parts[0].kind is span.kind:
        return parts[0]
    cost = NOTHING
    for part in parts:
        cost += part.cost
    text = " ".join(part.text for part in parts)
    return Replacement(text, span.kind, tuple(number for part in parts for number in part.class_ids), cost)


def _recase(like: str) -> Callable[[str], str]:
    """Returns what writes a word in the casing of another; entities of mixed casing stay as the list writes them."""
    match casing(like):
        case "lower":
            return str.lower
        case "upper" if len(like) > 1:
            return str.upper
        case "capitalised" | "upper":
            return lambda text: text[:1].upper() + text[1:]
        case _:
            return str
