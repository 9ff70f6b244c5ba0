"""What a session's filter counts, in whole numbers, and how much of a budget is reserved ahead.

Covers: the price of draws under the rule that ends a session, and the size of a reservation: a share of what is free, so that
it shrinks with the budget and the last of it can still be spent. Guarantees: sums are exact; a price is rounded up once, by
less than 10⁻¹². Pure: no state, no file.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cloister.errors import BudgetError
from cloister.privacy.accounting import Charge
from cloister.privacy.filters import Filter
from cloister.privacy.mechanism import Cost

GRAIN: Final = 2.0**-40
"""The unit of the sums, in ε, ρ or draws."""

MOST: Final = 2.0**22
"""Largest budget that is counted: sums stay below 2⁶³."""

SHARE: Final = 4
"""A reservation is at most one part in so many of what is free: what a crash can cost."""

MOST_DRAWS: Final = 256
"""Draws reserved at once, at most."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Draws, by what the filter counts (`price`) and by what reports need: sums of ε and ρ, all in grains."""

    price: int = 0
    epsilon: int = 0
    rho: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.price + other.price, self.epsilon + other.epsilon, self.rho + other.rho)

    def __sub__(self, other: "Amount") -> "Amount":
        """Returns what is left of this after `other`, nothing where that is more."""
        return Amount(
            max(0, self.price - other.price), max(0, self.epsilon - other.epsilon), max(0, self.rho - other.rho)
        )

    def __mul__(self, times: int) -> "Amount":
        return Amount(times * self.price, times * self.epsilon, times * self.rho)

    def covers(self, other: "Amount") -> bool:
        """Returns whether `other` fits into this."""
        return self.price >= other.price and self.epsilon >= other.epsilon and self.rho >= other.rho

    @property
    def cost(self) -> Cost:
        """The sums of ε and ρ."""
        return Cost(units(self.epsilon), units(self.rho))


NOTHING: Final = Amount()


def grains(value: float) -> int:
    """Returns a price in grains, rounded up."""
    return math.ceil(value / GRAIN)


def units(count: int) -> float:
    """Returns grains as ε, ρ or draws."""
    return count * GRAIN


def limit(most: float) -> int:
    """Returns the most that a filter admits, in grains; the rounding of its charges does not cost a draw."""
    return math.floor(min(most, MOST) / GRAIN * (1 + 1e-9))


def amount(charges: Iterable[Charge], counted: Filter) -> Amount:
    """Returns what charges come to under a filter.

    Raises:
        BudgetError: the filter cannot count one of them.
    """
    price = epsilon = rho = 0
    for charge in charges:
        each, cost = counted.price(charge), charge.cost
        if math.isinf(each):
            raise BudgetError(
                f"A draw of ε = {charge.cost.epsilon:.4g} cannot be counted by the rule {counted.rule}, which was fixed "
                "when the session was opened. Nothing was sent.",
                remedy="Begin another session (its secrets are then accounted anew, so what both reveal adds up).",
            )
        price += grains(each) * charge.count
        epsilon += grains(cost.epsilon) * charge.count
        rho += grains(cost.rho) * charge.count
    return Amount(price, epsilon, rho)


def ahead(free: int, each: Amount) -> Amount:
    """Returns what to reserve beyond what is needed now, of `free` grains, where a draw is expected to come to `each`."""
    if each.price <= 0:
        return NOTHING
    return each * max(0, min(MOST_DRAWS, free // SHARE // each.price))
