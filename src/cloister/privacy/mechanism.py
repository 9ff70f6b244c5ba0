"""The one interface of sanitising: what a sampler is given, what it returns, what a draw costs.

Covers: the types that detector, ledger, gateway and audits share. Does not cover: which spans are sensitive
(`privacy.detector`), drawing once per distinct span (`privacy.memo`), adding costs up (`privacy.ledger`).

A sampler holds a public partition of spans into classes of one kind. It replaces a span by a member of the span's own
class. The guarantee is policy local differential privacy: two spans of one class are neighbours, and no output is more
than e^epsilon times likelier under one than under the other. Which class a span belongs to is not hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

RandomSource = Callable[[int], bytes]
"""Returns that many random bytes. The real one is `os.urandom`; anything else is for tests."""


class Mechanism(StrEnum):
    """How a replacement is drawn."""

    CHANNEL = "channel"
    """The table that a linear program found: most expected similarity under exact epsilon and a cap on the best attack."""
    GUMBEL = "gumbel"
    """The exponential mechanism (noisy maximum with Gumbel noise of scale 2Δ/ε)."""
    PERMUTE_AND_FLIP = "permute_and_flip"
    """Noisy maximum with exponential noise of scale 2Δ/ε (McKenna and Sheldon 2020)."""
    LAPLACE_RNM = "laplace_rnm"
    """Report-Noisy-Max with Laplace noise of scale 2Δ/ε over cosine similarities, as CMIF (arXiv 2509.09091)."""


class Kind(StrEnum):
    """What a span is. Classes never mix kinds."""

    FIRST_NAME = "first_name"
    LAST_NAME = "last_name"
    PERSON = "person"
    """A full name, first and last. Replaced as a first name and a last name, two draws."""
    CITY = "city"
    COUNTRY = "country"
    ORGANISATION = "organisation"
    DISEASE = "disease"
    DRUG = "drug"
    PROFESSION = "profession"
    WORD = "word"
    """Any other word."""
    PIECE = "piece"
    """A token that is no whole word: part of one, a number, punctuation. Reached by its id only, never by text."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a draw spends."""

    epsilon: float
    """The exact ε of the class's table, rounded up to a float; 0 where the output does not depend on the span."""
    rho: float
    """The rho of zero-concentrated differential privacy: range²/8, where range bounds the spread of the privacy loss."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.epsilon + other.epsilon, self.rho + other.rho)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a prompt to be replaced as one: a whole word or entity, without the blank before it."""

    text: str
    kind: Kind = Kind.WORD


@dataclass(frozen=True, slots=True)
class Replacement:
    """What leaves instead of a span. Its `repr` shows no text of the prompt: the span is not in it."""

    text: str
    kind: Kind
    class_ids: tuple[int, ...]
    """The classes drawn from (two for a full name); -1 for a span that no class holds: a uniform draw over its kind."""
    cost: Cost

    @property
    def known(self) -> bool:
        """Returns whether every part of the span was a member of a class."""
        return -1 not in self.class_ids


@runtime_checkable
class Sampler(Protocol):
    """Draws replacements.

    Guarantees: fresh randomness for every draw (so the caller draws once per distinct span and session); the cost that
    comes with a replacement is never below what the draw spent; a span is never returned unchanged because it is
    unknown: unknown spans get a uniform draw over their kind.
    """

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism."""

    @property
    def epsilon(self) -> float:
        """The most that one draw from one class costs."""

    @property
    def tables(self) -> str:
        """A digest of the public tables that are drawn from, in hexadecimal: with others, a session is another."""

    def replace(self, spans: Sequence[Span]) -> list[Replacement]:
        """Returns one replacement for each span, in order, each drawn independently."""

    def cost(self, span: Span) -> Cost:
        """Returns what a draw for this span will cost, without drawing: to refuse before a budget is overspent."""

    def privacy_loss(self) -> "DominatingCurve":
        """Returns the curve that dominates every draw from every class, for composition by privacy loss distributions."""


@dataclass(frozen=True, slots=True)
class DominatingCurve:
    """Upper bounds of the hockey-stick divergence of any two neighbours, on an even grid of ε.

    `deltas[i]` is at least max over pairs of Σ_y max(0, P[x,y] - e^ε_i P[x',y]) with ε_i = first + i·gap. For
    `dp_accounting.pld.pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap`.
    """

    first: float
    gap: float
    deltas: tuple[float, ...]
