"""What draws of a mechanism add up to: basic composition, zCDP and privacy-loss distributions.

Covers: pure ε-DP draws whose ε and ρ are known exactly, and, for draws from a sampler, the curve that dominates them all.
Guarantees: every figure is an upper bound. Sums round up; the least of the three bounds is reported with its name.
Does not cover: detection (a secret that no detector saw is not accounted at all), or guesses from context.

Sources: basic composition (Dwork et al. 2006); bounded range η gives η²/8-zCDP (Cesar and Rogers 2021, Lemma 3.4); zCDP to
(ε, δ) (Canonne, Kamath, Steinke 2020, Corollary 13); dominating pairs (Zhu, Dong, Wang 2022) and connect-the-dots
discretisation (Doroshenko et al. 2022), both by `dp-accounting`.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from cloister.errors import PrivacyError
from cloister.privacy.mechanism import Cost, DominatingCurve

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

DELTA: Final = 1e-6
"""The δ of every (ε, δ) figure."""

MAX_EPSILON: Final = 100.0
"""Largest ε of one draw: beyond it nothing is protected and floating point no longer tells."""

MAX_CURVE_POINTS: Final = 100_000
"""Most points of a dominating curve."""

GRID: Final = 0.005
"""Step, in nats, of the privacy-loss distribution of a draw without a curve; rounding up keeps it an upper bound."""

ROUNDING: Final = 1e-11
"""More than the rounding of composed probabilities."""

TIE: Final = 1e-14
"""More than the rounding of one number's probabilities."""

LARGEST_PLD: Final = 5_000
"""Draws above which no privacy-loss distribution is composed: the other two bounds stand."""


@dataclass(frozen=True)
class Charge:
    """Some draws that cost the same: `count` of them, from the sampler's classes or (numbers) elsewhere.

    A span that is drawn in parts is so many draws, each with its own cost.
    """

    cost: Cost
    count: int = 1
    sampled: bool = True
    """Whether the sampler's dominating curve covers these draws."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost.epsilon) and 0 <= self.cost.epsilon <= MAX_EPSILON):
            raise PrivacyError(f"A draw would cost ε = {self.cost.epsilon}.", remedy=f"Allowed: 0 to {MAX_EPSILON:g}.")
        if not 0 <= self.cost.rho <= up(self.cost.epsilon**2 / 2) + 1e-12:
            raise PrivacyError(f"A draw of ε = {self.cost.epsilon} is said to cost ρ = {self.cost.rho}; at most ε²/2.")
        if self.count < 1:
            raise PrivacyError(f"{self.count} draws cannot be charged.")


@dataclass(frozen=True)
class Spent:
    """What some draws cost together: three valid bounds, ε in nats; zCDP and PLD hold at `delta`, basic at δ = 0."""

    draws: int
    basic: float
    zcdp: float
    pld: float
    delta: float = DELTA
    rho: float = math.inf
    """The sum of ρ."""

    @property
    def epsilon(self) -> float:
        """The least of the three."""
        return min(self.basic, self.zcdp, self.pld)

    @property
    def bound(self) -> str:
        """The name of the least one; basic composition wins a tie, since it needs no δ."""
        return min((self.basic, 0, "basic"), (self.zcdp, 1, "zCDP"), (self.pld, 2, "PLD"))[2]


def pure(epsilon: float) -> Cost:
    """Returns the cost of an ε-DP draw of which no more is known: ρ = ε²/2."""
    return Cost(epsilon, epsilon * epsilon / 2)


def compose(charges: Iterable[Charge], curve: DominatingCurve | None = None, delta: float = DELTA) -> Spent:
    """Returns what draws cost together; `curve` dominates every draw that is `sampled`.

    One that costs more than the curve allows is taken for a draw of which only its ε is known.
    """
    paid = [charge for charge in charges if charge.cost.epsilon > 0]
    draws = sum(charge.count for charge in paid)
    if draws == 0:
        return Spent(0, 0.0, 0.0, 0.0, delta, 0.0)
    basic = up(math.fsum(charge.cost.epsilon * charge.count for charge in paid))
    rho = up(math.fsum(charge.cost.rho * charge.count for charge in paid))
    pld = min(basic, _pld_epsilon(paid, curve, delta)) if 1 < draws <= LARGEST_PLD else basic
    return Spent(draws, basic, zcdp_epsilon(rho, delta), pld, delta, rho)


def widened(spent: Spent, more: Cost) -> Spent:
    """Returns an upper bound of `spent` together with further draws of which only the sums of ε and ρ are known."""
    if more.epsilon <= 0:
        return spent
    rho = up(spent.rho + more.rho)
    return Spent(
        spent.draws, up(spent.basic + more.epsilon), zcdp_epsilon(rho, spent.delta), up(spent.pld + more.epsilon),
        spent.delta, rho,
    )  # fmt: skip


def zcdp_epsilon(rho: float, delta: float = DELTA) -> float:
    """Returns the ε of ρ-zCDP at δ, by `dp-accounting`.

    The event is `ZCDpEvent` with the composed ρ: `ExponentialMechanismDpEvent` of some versions ignores its count.
    """
    if rho <= 0:
        return 0.0
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    accountant = rdp_privacy_accountant.RdpAccountant()
    accountant.compose(dp_event.ZCDpEvent(rho))
    return up(float(accountant.get_epsilon(delta)))


def zcdp_budget(epsilon: float, delta: float = DELTA) -> float:
    """Returns a ρ such that ρ-zCDP implies (ε, δ)-DP: the inverse of ρ + 2 sqrt(ρ ln(1/δ)) (Bun, Steinke 2016)."""
    root = math.sqrt(math.log(1 / delta))
    return (math.sqrt(root * root + epsilon) - root) ** 2 * (1 - 1e-12)


def top(curve: DominatingCurve) -> float:
    """Returns the ε beyond which nothing is left of a curve: no draw under it costs more."""
    last = next(i for i in range(len(curve.deltas) - 1, -1, -1) if i == 0 or curve.deltas[i - 1] > 0)
    return curve.first + last * curve.gap


def within(epsilon: float, curve: DominatingCurve) -> bool:
    """Returns whether a draw that the curve dominates can cost so much."""
    return epsilon <= top(curve) * (1 + 1e-9)


def pld_draws(epsilon: float, curve: DominatingCurve, delta: float = DELTA) -> int:
    """Returns how many draws that a curve dominates stay within (ε, δ) together, up to `LARGEST_PLD`."""
    draw = Charge(pure(min(top(curve), MAX_EPSILON)))
    low, high = 0, LARGEST_PLD
    while low < high:
        middle = (low + high + 1) // 2
        if compose([replace(draw, count=middle)], curve, delta).pld <= epsilon:
            low = middle
        else:
            high = middle - 1
    return low


def pld_dominates(curve: DominatingCurve, count: int, epsilon: float) -> bool:
    """Returns whether `count` draws under a curve dominate every ε-private mechanism.

    The worst ε-private mechanism is randomised response (Kairouz et al. 2015): δ(t) = (e^ε - e^t) / (e^ε + 1), a line in
    e^t. That of the draws is convex, and linear between multiples of the curve's step, so these are all that are compared.
    One draw is what its curve says, and may tie; several are composed, which rounds.
    """
    steps = np.arange(math.ceil(epsilon / curve.gap) + 2) * curve.gap
    worst = (math.exp(epsilon) - np.exp(steps)) / (math.exp(epsilon) + 1)
    if count == 1:
        places = np.minimum(np.arange(len(steps)) - round(curve.first / curve.gap), len(curve.deltas) - 1)
        return bool(places[0] >= 0 and np.all(np.array(curve.deltas)[places] >= worst - TIE))
    composed = _repeated(_curve_pld(curve), count)
    with np.errstate(over="ignore"):
        deltas = np.array([float(composed.get_delta_for_epsilon(float(step))) for step in steps])
    return bool(np.all(deltas >= worst + np.where(worst > 0, ROUNDING, 0.0)))


def up(value: float) -> float:
    """Returns `value` moved up by a few units in the last place, more than the rounding of a short computation."""
    return value * (1 + 1e-14) if value > 0 else value


def check_curve(curve: DominatingCurve) -> None:
    """Raises `PrivacyError` unless `curve` can be a privacy profile: falling from at most 1, never below max(0, 1 - e^ε)."""
    deltas, last = curve.deltas, curve.first + (len(curve.deltas) - 1) * curve.gap
    sized = (
        2 <= len(deltas) <= MAX_CURVE_POINTS and curve.gap > 0 and -MAX_EPSILON <= curve.first <= last <= MAX_EPSILON
    )
    falling = sized and 0 <= deltas[-1] <= deltas[0] <= 1 and all(a >= b for a, b in itertools.pairwise(deltas))
    if not falling or any(
        delta < -math.expm1(curve.first + place * curve.gap) - ROUNDING for place, delta in enumerate(deltas)
    ):
        raise PrivacyError(
            "A sampler's dominating curve is not a privacy profile.", remedy="Build the candidates again."
        )


def _pld_epsilon(charges: list[Charge], curve: DominatingCurve | None, delta: float) -> float:
    parts: list[PrivacyLossDistribution] = []
    gap = GRID if curve is None else curve.gap
    sampled = 0
    others: dict[float, int] = {}
    for charge in charges:
        if curve is not None and charge.sampled and within(charge.cost.epsilon, curve):
            sampled += charge.count
        else:
            others[charge.cost.epsilon] = others.get(charge.cost.epsilon, 0) + charge.count
    if curve is not None and sampled:
        parts.append(_repeated(_curve_pld(curve), sampled))
    parts += [_repeated(_pure_pld(epsilon, gap), count) for epsilon, count in others.items()]
    composed = parts[0]
    for part in parts[1:]:
        composed = composed.compose(part)
    with np.errstate(over="ignore"):  # the library divides by masses near zero: infinity is the right quotient there
        return up(float(composed.get_epsilon_for_delta(delta)))


def _repeated(once: "PrivacyLossDistribution", count: int) -> "PrivacyLossDistribution":
    return once.self_compose(count) if count > 1 else once


def _pure_pld(epsilon: float, gap: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as losses

    exact = common.DifferentialPrivacyParameters(epsilon, 0)
    return losses.from_privacy_parameters(exact, value_discretization_interval=gap)


def _curve_pld(curve: DominatingCurve) -> "PrivacyLossDistribution":
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as losses

    first = round(curve.first / curve.gap)
    if not math.isclose(first * curve.gap, curve.first, rel_tol=1e-9, abs_tol=1e-12):
        raise PrivacyError(
            "A dominating curve does not lie on multiples of its step.", remedy="Build the candidates again."
        )
    last = first + len(curve.deltas) - 1
    return losses.PrivacyLossDistribution(
        pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(curve.gap, first, last, list(curve.deltas))
    )
