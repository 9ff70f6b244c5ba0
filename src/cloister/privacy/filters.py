"""The rule that ends a session: what counts against its budget, chosen once, when the session is opened.

`basic` counts ε up to the budget. `zCDP` counts ρ up to what implies (budget, δ). `PLD` counts draws up to the largest number
whose composed privacy-loss distribution stays within (budget, δ).

Guarantees: all three hold when every prompt depends on the answers before it. For basic composition and zCDP, filters are
proved as such (Rogers et al. 2016; Whitehouse et al. 2023, Theorem 1). A filter by privacy-loss distributions of mechanisms
chosen on the way is not proved; `PLD` here is none: one fixed pair of distributions dominates every draw, and at most a fixed
number of draws is made, so the session is an adaptive composition of that many copies of one dominated mechanism (Zhu, Dong,
Wang 2022, Theorem 10), a draw that is not made being dominated too. Draws outside the sampler's classes (numbers) count as so
many of its draws as together dominate any mechanism of their ε.
Does not cover: what the draws are; see `privacy.accounting`.
"""

import math
from dataclasses import dataclass, field
from typing import Final

from cloister.privacy.accounting import Charge, check_curve, pld_dominates, pld_draws, pure, within, zcdp_budget
from cloister.privacy.mechanism import Cost, DominatingCurve

FEW_DRAWS: Final = 16
"""Budgets for fewer draws than that are counted by basic composition or zCDP: PLD gains nothing there."""

MOST_EQUIVALENTS: Final = 8
"""Draws of the sampler that one other draw counts as, at most; one that needs more cannot be counted."""


@dataclass(frozen=True)
class Filter:
    """A rule, what it admits, and what it counts for a draw."""

    rule: str
    most: float
    """In ε (`basic`), ρ (`zCDP`) or draws (`PLD`)."""
    curve: DominatingCurve | None = field(default=None, repr=False)
    _known: dict[float, float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def unit(self) -> str:
        """What is counted, as messages name it."""
        return {"basic": "ε", "zCDP": "ρ"}.get(self.rule, "draws")

    def price(self, charge: Charge) -> float:
        """Returns what one draw of a charge counts; infinity if the rule cannot count it.

        `PLD` cannot count a sampled draw of more than its curve's largest ε (it is several), nor another that no
        `MOST_EQUIVALENTS` draws dominate.
        """
        if self.rule == "basic":
            return charge.cost.epsilon
        if self.rule == "zCDP":
            return charge.cost.rho
        if charge.cost.epsilon <= 0:
            return 0.0
        if self.curve is None:
            return math.inf
        if charge.sampled:
            return 1.0 if within(charge.cost.epsilon, self.curve) else math.inf
        known = self._known.get(charge.cost.epsilon)
        if known is None:
            known = self._known[charge.cost.epsilon] = _equivalents(charge.cost.epsilon, self.curve)
        return known


def chosen(budget: float, per_span: Cost, curve: DominatingCurve | None) -> Filter:
    """Returns the filter that admits most draws like `per_span` within a budget; at a tie, the simplest.

    `PLD` is chosen only if it also admits at least as many numbers, of which no more than their ε is known.

    Raises:
        PrivacyError: the curve is no privacy profile.
    """
    if curve is not None:
        check_curve(curve)
    best, admitted = Filter("basic", budget), _most(budget, per_span.epsilon)
    numbers, rho = admitted, zcdp_budget(budget)
    if per_span.rho > 0 and rho / per_span.rho > admitted:
        best, admitted = Filter("zCDP", rho), rho / per_span.rho
        numbers = max(numbers, _most(rho, pure(per_span.epsilon).rho))
    if curve is not None and math.isfinite(admitted) and budget / per_span.epsilon >= FEW_DRAWS:
        draws = pld_draws(budget, curve)
        if draws > admitted and draws // _equivalents(per_span.epsilon, curve) >= math.floor(numbers):
            best = Filter("PLD", float(draws), curve)
    return best


def _most(budget: float, each: float) -> float:
    return budget / each if each > 0 else math.inf


def _equivalents(epsilon: float, curve: DominatingCurve) -> float:
    counts = (count for count in range(1, MOST_EQUIVALENTS + 1) if pld_dominates(curve, count, epsilon))
    return float(next(counts, math.inf))
