"""What a plan lets the gate lend, in the form that the gate asks for it: product by product, one row or many.

Guarantees: a product without a public weight is never allowed, whatever the plan says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cloister.blinding.linear import LentLinear, Linear
from cloister.plan.labels import Placement
from cloister.plan.operators import Kind
from cloister.plan.plan import Phase, Plan


@dataclass(frozen=True)
class Schedule:
    """The products that may be lent, by name, in each phase."""

    prefill: frozenset[str]
    decode: frozenset[str]
    attention: bool = False
    """Whether QK^T and AV are lent, under pads on both operands."""

    @staticmethod
    def of(plan: Plan) -> "Schedule":
        """Returns the schedule of a sound plan."""
        prefill, decode = (plan.groups(phase, Placement.BLINDED) for phase in (Phase.PREFILL, Phase.DECODE))
        attention = any(a.operator.kind is Kind.QK and a.decode is Placement.BLINDED for a in plan.assignments)
        return Schedule(prefill, decode, attention)

    @staticmethod
    def everything(linears: Sequence[Linear]) -> "Schedule":
        """Returns the schedule that lends whatever has a public weight."""
        names = frozenset(linear.name for linear in linears)
        return Schedule(names, names)

    @property
    def lent(self) -> frozenset[str]:
        """The products that are lent in any phase: what pads are stocked for and accelerators are given."""
        return self.prefill | self.decode

    @property
    def uses_accelerators(self) -> bool:
        """Whether anything at all is lent."""
        return bool(self.lent) or self.attention

    def allowed(self, linears: Sequence[Linear]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Returns whether each linear may be lent: for one row, and for many."""
        public = [isinstance(linear, LentLinear) for linear in linears]
        one, many = (
            tuple(is_public and linear.name in names for is_public, linear in zip(public, linears, strict=True))
            for names in (self.decode, self.prefill)
        )
        return one, many
