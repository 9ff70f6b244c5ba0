"""The exact output distributions of Report-Noisy-Max over a finite class, for three kinds of noise.

Covers: P[x, y] for Laplace, Gumbel and exponential noise, by closed form or by quadrature that is exact up to rounding
of float64. Does not cover: the guarantee. A table becomes a mechanism only as integers with an exact certificate
(`privacy.channel`), so rounding here costs utility, never privacy.

Scores are similarities u[x, y] of a span x and a candidate y; the noise has scale 2Δ/ε, where Δ bounds how far the score
of one candidate moves between two neighbours. (Δ/ε would be right for monotone scores only; similarities are not.)
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from cloister.privacy.mechanism import Mechanism

Table = Float64[np.ndarray, "spans candidates"]
INTERVAL_NODES = 8
"""Gauss-Legendre nodes between two kinks of the Laplace integrand: error below 1e-12 for intervals up to ε = 16."""


def sensitivity(scores: Table) -> float:
    """Returns Δ = max_y max_{x,x'} |u[x,y] - u[x',y]|."""
    return float((scores.max(axis=0) - scores.min(axis=0)).max())


def gumbel_table(scores: Table, scale: float) -> Table:
    """Returns the exponential mechanism: P[x,y] ∝ exp(u[x,y]/scale)."""
    weights = np.exp((scores - scores.max(axis=1, keepdims=True)) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


def permute_and_flip_table(scores: Table, scale: float) -> Table:
    """Returns permute-and-flip, which is the noisy maximum with exponential noise (arXiv 2105.07260).

    In a random order each candidate is accepted with probability q = exp((u - u_max)/scale). With uniform arrival times
    that is q_y ∫₀¹ Π_{z≠y} (1 - t q_z) dt: a polynomial, which Gauss-Legendre integrates exactly.
    """
    accept = np.exp((scores - scores.max(axis=1, keepdims=True)) / scale)
    times, weights = _legendre(scores.shape[1] // 2 + 1)
    survive = 1.0 - times[:, None, None] * accept  # node, span, candidate: positive, since times < 1
    everyone = np.exp(np.log(survive).sum(axis=2, keepdims=True))
    table = accept * np.tensordot(weights, everyone / survive, axes=1)
    return table / table.sum(axis=1, keepdims=True)


def laplace_table(scores: Table, scale: float) -> Table:
    """Returns P[x,y] = ∫ f(t - u_y) Π_{z≠y} F(t - u_z) dt for the density f and distribution F of Laplace noise."""
    table = np.stack([_laplace_row(row / scale) for row in scores])
    return table / table.sum(axis=1, keepdims=True)


def _laplace_row(scores: Float64[np.ndarray, "candidates"]) -> Float64[np.ndarray, "candidates"]:
    count = len(scores)
    kinks = np.unique(scores)
    low, high = kinks[0], kinks[-1]
    # Below all scores every factor is e^(t-u)/2: the integral is closed.
    row = np.full(count, np.exp(count * low - scores.sum() - count * np.log(2.0)) / count)
    # Between kinks the integrand is smooth.
    nodes, weights = _legendre(INTERVAL_NODES)
    widths = np.diff(kinks)
    points = (kinks[:-1, None] + widths[:, None] * nodes).ravel()
    masses = (widths[:, None] * weights).ravel()
    # Above all scores, with s = e^(high - t), it is a polynomial in s.
    nodes, weights = _legendre(count // 2 + 1)
    points = np.concatenate([points, high - np.log(nodes)])
    masses = np.concatenate([masses, weights / nodes])
    offset = points[:, None] - scores
    density = 0.5 * np.exp(-np.abs(offset))
    below = np.where(offset < 0, density, 1.0 - density)
    everyone = np.exp(np.log(below).sum(axis=1))
    return row + (masses * everyone) @ (density / below)


def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes and weights on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1.0) / 2.0, weights / 2.0


TABLES: dict[Mechanism, Callable[[Table, float], Table]] = {
    Mechanism.LAPLACE_RNM: laplace_table,
    Mechanism.GUMBEL: gumbel_table,
    Mechanism.PERMUTE_AND_FLIP: permute_and_flip_table,
}


def analytic_table(mechanism: Mechanism, scores: Table, epsilon: float) -> Table:
    """Returns the table with noise of scale 2Δ/ε: at most ε, in truth less (see `exact_table`)."""
    spread = sensitivity(scores)
    if spread == 0.0:
        return np.full(scores.shape, 1.0 / scores.shape[1])
    return TABLES[mechanism](scores, 2.0 * spread / epsilon)


def exact_table(mechanism: Mechanism, scores: Table, epsilon: float) -> Table:
    """Returns the table with the least noise whose exact ε, found by bisection, does not exceed `epsilon`."""
    spread = sensitivity(scores)
    if spread == 0.0:
        return np.full(scores.shape, 1.0 / scores.shape[1])
    make = TABLES[mechanism]
    low, high = epsilon / (2.0 * spread), epsilon / (2.0 * spread)
    while exact_epsilon(make(scores, 1.0 / high)) <= epsilon and high < 2.0**10 * low:
        high *= 2.0
    for _ in range(30):
        middle = (low + high) / 2.0
        if exact_epsilon(make(scores, 1.0 / middle)) <= epsilon:
            low = middle
        else:
            high = middle
    return make(scores, 1.0 / low)


def exact_epsilon(table: Table) -> float:
    """Returns max_y ln(max_x P[x,y] / min_x P[x,y]) in floating point; columns of zeros count for nothing."""
    top, bottom = table.max(axis=0), table.min(axis=0)
    alive = top > 0
    if (bottom[alive] <= 0).any():
        return float("inf")
    return float(np.log(top[alive] / bottom[alive]).max())


def bayes_attack(table: Table, prior: Float64[np.ndarray, "spans"]) -> float:
    """Returns how often the best attacker names the span right: Σ_y max_x π_x P[x,y]."""
    return float((prior[:, None] * table).max(axis=0).sum())
