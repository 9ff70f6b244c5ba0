"""What the ledger is given and what it reports: charges of a prompt, receipts, reports of sessions and prompts."""

import struct
from dataclasses import dataclass

from cloister.errors import LedgerError
from cloister.privacy.accounting import MAX_CURVE_POINTS, Charge, Spent, check_curve, widened
from cloister.privacy.ledger_file import DAMAGED
from cloister.privacy.mechanism import Cost, DominatingCurve


@dataclass(frozen=True)
class Entry:
    """Draws of one kind in a prompt; `kind` is the public name of a type of span."""

    kind: str
    charge: Charge


@dataclass(frozen=True)
class Receipt:
    """What a prompt cost, and what is left."""

    prompt: int
    spent: Spent
    filter: str
    used: float
    most: float

    @property
    def left(self) -> float:
        """What the session's filter still admits, in its own unit (ε for `basic`, ρ for `zCDP`, draws for `PLD`)."""
        return max(0.0, self.most - self.used)


@dataclass(frozen=True)
class SessionReport:
    """A session: its policy, its budget and what it spent, by three bounds."""

    name: str
    budget: float
    delta: float
    rule: str
    used: float
    most: float
    policy: str
    opened: float
    prompts: int
    spans: int
    repeated: int
    pseudonyms: int
    spent: Spent
    largest: float
    """The ε of the costliest draw."""
    memos: int
    """How many memos drew: each draws once for a span, so a span was drawn as often at most. A gateway that is started anew, or
    whose enclave is, has a memo of its own."""
    reserved: Cost
    """Sums of ε and ρ that gateways have reserved and not accounted for: part of `used`, not of `spent`. What a gateway that
    was killed had reserved stays here for good: it may have been spent."""

    @property
    def of_a_span(self) -> float:
        """The ε of one span at most: of all its draws together."""
        return min(self.largest * self.memos, self.spent.basic)

    @property
    def at_most(self) -> Spent:
        """What the session may have spent: `spent`, and all that is reserved."""
        return widened(self.spent, self.reserved)


@dataclass(frozen=True)
class PromptReport:
    """One prompt of a session."""

    prompt: int
    at: float
    spans: int
    repeated: int
    pseudonyms: int
    kinds: tuple[tuple[str, float, int], ...]
    spent: Spent


def packed(curve: DominatingCurve | None) -> tuple[float | None, float | None, bytes | None]:
    """Returns a curve as the file holds it: first point, step, heights."""
    if curve is None:
        return None, None, None
    check_curve(curve)
    return curve.first, curve.gap, struct.pack(f"<{len(curve.deltas)}d", *curve.deltas)


def unpacked(first: float | None, gap: float | None, packed: bytes | None) -> DominatingCurve | None:
    """Returns a curve that the file holds.

    Raises:
        LedgerError: it is damaged.
    """
    if first is None or gap is None or packed is None:
        return None
    if len(packed) % 8 or len(packed) > 8 * MAX_CURVE_POINTS:
        raise LedgerError("A session's curve in the ledger is damaged.", remedy=DAMAGED)
    curve = DominatingCurve(first, gap, struct.unpack(f"<{len(packed) // 8}d", packed))
    check_curve(curve)
    return curve
