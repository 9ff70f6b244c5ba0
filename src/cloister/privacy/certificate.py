"""Exact certificates of integer tables: ε, the spread of the privacy loss, and the refusal of anything above a claim.

Covers: tables of integers W[x, y] whose rows sum to 2³², read as the channel P[x, y] = W[x, y]/2³². All comparisons are
of integers; nothing here rounds except the last step, upwards, to show a number.
Does not cover: where tables come from; privacy across classes (there is none: see `privacy.mechanism`).

Guarantees: `certify` returns only if every column is all zero or satisfies max W · q ≤ min W · p, where p/q is a rational
number not above e^ε; then the channel is ε-locally differentially private, exactly.
Assumes: 32 uniform independent bits per draw.
Edge cases: a zero beside a positive weight in one column is ε = ∞ and is refused; one row costs ε = 0.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
from jaxtyping import Float64, Int64

from cloister.errors import CertificateError

TOTAL = 2**32
"""Every row of a table sums to this."""
MAX_EPSILON = 16
MAX_MEMBERS = 1024

Weights = Int64[np.ndarray, "spans candidates"]
AnyWeights = Int64[np.ndarray, "_ _"]
"""As `Weights`, where several tables of different sizes meet in one call."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proved of one table."""

    ratio: Fraction
    """max_y (max_x W[x,y] / min_x W[x,y]): e^ε, exactly."""
    spread: Fraction
    """max over pairs of (max_y ratio / min_y ratio): e^range of the privacy loss, between ratio and ratio²."""

    @property
    def epsilon(self) -> float:
        """ε, rounded up."""
        return log_up(self.ratio)

    @property
    def rho(self) -> float:
        """ρ of zero-concentrated DP: range²/8 (bounded range, Dong et al. 2020), rounded up; at most ε²/2."""
        return math.nextafter(log_up(self.spread) ** 2 / 8, math.inf)


def certify(weights: Weights, epsilon: Fraction) -> Fraction:
    """Returns e^(exact ε) of a table, having checked every row sum and every column.

    Raises:
        CertificateError: the table is no channel, or spends more than `epsilon`.
    """
    if weights.ndim != 2 or not 1 <= weights.shape[0] <= MAX_MEMBERS or weights.shape[0] != weights.shape[1]:
        raise CertificateError(f"A table has the shape {weights.shape}.", remedy="Build the candidates again.")
    if (weights < 0).any() or (weights > TOTAL).any() or (weights.sum(axis=1) != TOTAL).any():
        raise CertificateError("A row of a table does not sum to 2^32.", remedy="Build the candidates again.")
    ratio = exact_ratio(weights)
    if ratio is None or ratio > exponential_below(epsilon):
        spent = "infinite" if ratio is None else f"{log_up(ratio):.6f}"
        raise CertificateError(
            f"A table spends ε = {spent}, more than the {float(epsilon):g} it claims.",
            remedy="Build the candidates again.",
        )
    return ratio


def exact_ratio(weights: Weights) -> Fraction | None:
    """Returns max_y (max_x W / min_x W) exactly, or None for infinity (a zero beside a positive weight)."""
    top, bottom = weights.max(axis=0), weights.min(axis=0)
    if ((bottom == 0) & (top > 0)).any():
        return None
    alive = top > 0
    worst = Fraction(1)
    # Only columns within float rounding of the largest ratio can hold it.
    ratios = top[alive] / bottom[alive]
    for column in np.flatnonzero(ratios >= ratios.max() * (1 - 1e-9)):
        worst = max(worst, Fraction(int(top[alive][column]), int(bottom[alive][column])))
    return worst


def certificate(weights: Weights) -> Certificate:
    """Returns the exact ε and range of a table with finite ε.

    Raises:
        CertificateError: ε is infinite.
    """
    ratio = exact_ratio(weights)
    if ratio is None:
        raise CertificateError("A table spends an infinite ε.", remedy="Build the candidates again.")
    return Certificate(ratio, min(_spread(weights), ratio * ratio))


def _spread(weights: Weights) -> Fraction:
    """Returns max over x, x' of max_y W[x,y]/W[x',y] divided by the min: exact at the pair that floats find worst.

    The float search could miss the true maximum by rounding only, so the result is raised by 1e-12.
    """
    alive = weights[:, weights.max(axis=0) > 0].astype(np.float64)
    logs = np.log(alive)
    worst = 0.0
    for row in logs:
        losses = row - logs
        worst = max(worst, float((losses.max(axis=1) - losses.min(axis=1)).max()))
    return Fraction(math.exp(worst + 1e-12) * (1 + 1e-12))


@cache
def exponential_below(epsilon: Fraction) -> Fraction:
    """Returns a rational number not above e^ε and within 2^-60 of it relatively: a partial sum, rounded down.

    Raises:
        CertificateError: ε is negative or above 16.
    """
    if not 0 <= epsilon <= MAX_EPSILON:
        raise CertificateError(f"ε is {float(epsilon):g}.", remedy=f"Allowed: 0 to {MAX_EPSILON}.")
    term = total = Fraction(1)
    for count in range(1, 120):
        term = term * epsilon / count
        total += term
    return Fraction(math.floor(total * 2**64), 2**64)


def log_up(ratio: Fraction) -> float:
    """Returns ln(ratio) for a ratio of at least 1, rounded up to a float."""
    if ratio <= 1:
        return 0.0
    # math.log of each part is within an ulp; 4 ulp of the parts bound the difference.
    top, bottom = math.log(ratio.numerator), math.log(ratio.denominator)
    return top - bottom + 4 * max(math.ulp(top), math.ulp(bottom))


def hockey_stick(
    table: Float64[np.ndarray, "spans candidates"], epsilons: Float64[np.ndarray, " points"]
) -> np.ndarray:
    """Returns, for each ε, δ(ε) = max over pairs of Σ_y max(0, P[x,y] - e^ε P[x',y]).

    Pairs come in both orders, so δ(-ε) = 1 - e^-ε + e^-ε δ(ε): only ε of at least 0 are computed.
    """
    sizes, back = np.unique(np.abs(epsilons), return_inverse=True)
    positive = np.zeros(len(sizes))
    for row in table:
        for index, factor in enumerate(np.exp(sizes)):
            excess = row - factor * table
            np.maximum(excess, 0.0, out=excess)
            positive[index] = max(positive[index], float(excess.sum(axis=1).max()))
    curve = positive[back]
    shrink = np.exp(-np.abs(epsilons))
    return np.where(epsilons < 0, 1.0 - shrink + shrink * curve, curve)
