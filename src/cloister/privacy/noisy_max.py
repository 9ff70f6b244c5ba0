"""The exact output distributions of Report-Noisy-Max over a finite class, for three kinds of noise.

Covers: P[x, y] for Laplace, Gumbel and exponential noise, by closed form or by quadrature that is exact up to rounding
of float64. Does not cover: the guarantee. A table becomes a mechanism only as integers with an exact certificate
(`privacy.channel`), so rounding here costs utility, never privacy.

Scores are similarities u[x, y] of a span x and a candidate y; the noise has scale 2Δ/ε, where Δ bounds how far the score
of one candidate moves between two neighbours. (Δ/ε would be right for monotone scores only; similarities are not.)
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from cloister.privacy.mechanism import Mechanism

Table = Float64[np.ndarray, "spans candidates"]
INTERVAL_NODES = 4
LONGEST_INTERVAL = 0.25
"""Gauss-Legendre nodes on each smooth piece of the Laplace integrand, and its longest length in units of the scale."""


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


def _laplace_row(scores: Float64[np.ndarray, " candidates"]) -> Float64[np.ndarray, " candidates"]:
    count = len(scores)
    kinks = np.unique(scores)
    pieces = np.maximum(np.ceil(np.diff(kinks) / LONGEST_INTERVAL), 1).astype(np.int64)
    starts = np.repeat(kinks[:-1], pieces)
    steps = np.repeat(np.diff(kinks) / np.maximum(pieces, 1), pieces)
    places = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    low, high = kinks[0], kinks[-1]
    # Below all scores every factor is e^(t-u)/2: the integral is closed.
    row = np.full(count, np.exp(count * low - scores.sum() - count * np.log(2.0)) / count)
    # Between kinks the integrand is smooth.
    nodes, weights = _legendre(INTERVAL_NODES)
    points = (starts[:, None] + steps[:, None] * (places[:, None] + nodes)).ravel()
    masses = (steps[:, None] * weights).ravel()
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


def randomised_response(count: int, epsilon: float) -> Table:
    """Returns the table that keeps a span as often as ε allows, and else draws uniformly from the others."""
    table = np.ones((count, count)) + math.expm1(epsilon) * np.identity(count)
    return table / table.sum(axis=1, keepdims=True)


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


def exact_table(mechanism: Mechanism, scores: Table, epsilon: float, tolerance: float = 1e-7) -> Table:
    """Returns the table with the least noise whose exact ε does not exceed `epsilon` (and is within `tolerance` of it)."""
    spread = sensitivity(scores)
    if spread == 0.0:
        return np.full(scores.shape, 1.0 / scores.shape[1])
    make = TABLES[mechanism]
    return calibrated(lambda inverse: make(scores, 1.0 / inverse), epsilon, epsilon / (2.0 * spread), tolerance)


def calibrated(make: Callable[[float], Any], epsilon: float, start: float, tolerance: float = 1e-7) -> Any:
    """Returns the table of the largest parameter whose exact ε does not exceed `epsilon`, to `tolerance` relatively.

    Args:
        make: Returns a table for a positive parameter; its exact ε grows with the parameter.
        epsilon: ε to stay below.
        start: A parameter to begin with.
        tolerance: How far below `epsilon` is near enough, relatively.
    """
    low = high = start
    below = above = exact_epsilon(make(start)) - epsilon
    for _ in range(60):
        if below <= 0 < above:
            break
        if above <= 0:
            low, below, high = high, above, 2.0 * high
            above = exact_epsilon(make(high)) - epsilon
        else:
            high, above, low = low, below, low / 2.0
            below = exact_epsilon(make(low)) - epsilon
    for step in range(40):
        if below >= -tolerance * epsilon or high - low <= 1e-9 * high:
            break
        # Regula falsi aims just below the root; every third step halves instead, for curves that it creeps along.
        share = 0.5 if step % 3 == 2 or not math.isfinite(above) else below / (below - above)
        middle = low + (high - low) * min(max(share * (1 - tolerance / 10), 1e-3), 0.999)
        error = exact_epsilon(make(middle)) - epsilon
        if error <= 0:
            low, below = middle, error
        else:
            high, above = middle, error
    return make(low)


def exact_epsilon(table: Float[np.ndarray, "spans candidates"]) -> float:
    """Returns max_y ln(max_x P[x,y] / min_x P[x,y]) in floating point; columns of zeros count for nothing."""
    top, bottom = table.max(axis=0), table.min(axis=0)
    alive = top > 0
    if (bottom[alive] <= 0).any():
        return float("inf")
    return float(np.log(top[alive] / bottom[alive]).max())


def bayes_attack(table: Table, prior: Float64[np.ndarray, " spans"]) -> float:
    """Returns how often the best attacker names the span right: Σ_y max_x π_x P[x,y]."""
    return float((prior[:, None] * table).max(axis=0).sum())
