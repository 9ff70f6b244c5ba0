"""The public classes of spans, their tables, and the look-up from a span to its place in them.

Covers: what a candidate file holds once it is read and checked. Does not cover: building it (`privacy.build`), its bytes
(`privacy.candidate_file`), drawing (`privacy.sampler`).

Guarantees: every class is of one type; every token that is text is in exactly one class; no class, table or similarity
depends on anything but the model's frozen input embeddings, its tokenizer and public lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from cloister.errors import CandidatesError
from cloister.privacy.certificate import AnyWeights, Certificate
from cloister.privacy.mechanism import DominatingCurve, Kind, Mechanism


@dataclass(frozen=True)
class CandidateClass:
    """Spans that may stand for each other."""

    kind: Kind
    type: str
    """What its members share, for people: `word, capitalised, neutral, NOUN`."""
    members: tuple[str, ...]
    """The spans as they stand in a text."""
    tokens: tuple[int, ...]
    """The token of each member, or -1 for one that takes several."""


@dataclass(frozen=True)
class TableSet:
    """One mechanism at one ε: a table for each class, with what is proved of it."""

    mechanism: Mechanism
    epsilon: Fraction
    """The claim: no table spends more."""
    tables: tuple[AnyWeights, ...]
    certificates: tuple[Certificate, ...]
    attacks: tuple[float, ...]
    """The best attacker's success on each class, under the public prior."""
    curve: DominatingCurve


@dataclass(frozen=True)
class Provenance:
    """What the classes were made from."""

    model: str
    """The name of the model's folder."""
    embedding_sha256: str
    """Of the input embedding table's bytes, in the checkpoint's own number format."""
    tokenizer_sha256: str
    """Of tokenizer.json."""
    vocabulary: int
    """Tokens of the tokenizer."""
    members: int
    """K: the class size that was asked for."""


@dataclass(frozen=True)
class Candidates:
    """A whole candidate file."""

    provenance: Provenance
    classes: tuple[CandidateClass, ...]
    sets: tuple[TableSet, ...]
    digest: str = field(default="", compare=False)
    """The SHA-256 of the file that they were read from, in hexadecimal; empty before there is one."""
    _places: Mapping[tuple[Kind, str], tuple[int, int]] = field(init=False, repr=False, compare=False)
    _tokens: Mapping[int, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places: dict[tuple[Kind, str], tuple[int, int]] = {}
        tokens: dict[int, tuple[int, int]] = {}
        for number, group in enumerate(self.classes):
            for member, (text, token) in enumerate(zip(group.members, group.tokens, strict=True)):
                if group.kind is not Kind.PIECE:
                    places.setdefault((group.kind, text), (number, member))
                if token >= 0 and tokens.setdefault(token, (number, member)) != (number, member):
                    raise CandidatesError(f"Token {token} is in two classes.", remedy="Build the candidates again.")
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_tokens", tokens)

    def find(self, text: str, kind: Kind) -> tuple[int, int] | None:
        """Returns class and member of a span, exactly as it is written, or None."""
        return self._places.get((kind, text))

    def find_token(self, token: int) -> tuple[int, int] | None:
        """Returns class and member of a token, or None for a control token."""
        return self._tokens.get(token)

    def table_set(self, mechanism: Mechanism, epsilon: Fraction) -> TableSet:
        """Returns the tables of a mechanism at an ε.

        Raises:
            CandidatesError: the file has none; the error says how to build them.
        """
        for one in self.sets:
            if one.mechanism is mechanism and one.epsilon == epsilon:
                return one
        held = ", ".join(f"{one.mechanism} at ε = {float(one.epsilon):g}" for one in self.sets)
        raise CandidatesError(
            f"The candidate file has no tables for {mechanism} at ε = {float(epsilon):g}; it has {held or 'none'}.",
            remedy=f"Build them: cloister candidates build MODEL --mechanism {mechanism} --epsilon {float(epsilon):g}.",
        )

    def check_model(self, embedding_sha256: str, tokenizer_sha256: str) -> None:
        """Raises unless the classes were made from this embedding table and this tokenizer.

        Raises:
            CandidatesError: they were made from others.
        """
        wanted = (self.provenance.embedding_sha256, self.provenance.tokenizer_sha256)
        names = ("embedding table", "tokenizer")
        for name, ours, given in zip(names, wanted, (embedding_sha256, tokenizer_sha256), strict=True):
            if ours != given:
                raise CandidatesError(
                    f"The candidates were built from another {name} (of {self.provenance.model!r}) than this model's.",
                    remedy="Build them for this model: cloister candidates build MODEL.",
                )
