"""Measures ε from outside: lower bounds with stated confidence, from draws alone.

Covers: a lower bound on the ε of anything that can be asked to draw for one of two neighbours (Clopper and Pearson's
interval on the event that separates them best, chosen on other draws; as DP-Sniper and LDP-Auditor do). Does not cover:
proof that ε is no larger; that is `privacy.certificate`. A bound above the claim refutes the claim; a bound far below it
says that the claim is loose or the draws too few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

SIGNIFICANCE = 0.05
"""All bounds of one audit together are wrong at most this often (Bonferroni)."""
TIGHT = 0.95
"""A tight audit finds at least this share of the claim."""

Outcomes = Int64[np.ndarray, "draws"]
Draw = Callable[[int, int], Outcomes]
"""Returns what the mechanism puts out for one of the neighbours, that many times, as small whole numbers."""


@dataclass(frozen=True)
class Bound:
    """A lower bound of ε from one pair of neighbours."""

    pair: tuple[int, int]
    epsilon: float
    """ε is at least this, with confidence 1 - `significance`."""
    share: float
    """How often the separating event came under the first neighbour."""
    draws: int
    """Draws per neighbour that the bound rests on (as many again chose the event)."""
    significance: float


@dataclass(frozen=True)
class Verdict:
    """An audit's result."""

    claim: float
    bounds: tuple[Bound, ...]

    @property
    def epsilon(self) -> float:
        """The largest lower bound."""
        return max(bound.epsilon for bound in self.bounds)

    @property
    def refuted(self) -> bool:
        """Whether the mechanism spends more than it claims."""
        return self.epsilon > self.claim

    @property
    def tight(self) -> bool:
        """Whether the audit finds nearly all that is claimed, and no more."""
        return TIGHT * self.claim <= self.epsilon <= self.claim


def audit(draw: Draw, pairs: Sequence[tuple[int, int]], claim: float, draws: int, outcomes: int) -> Verdict:
    """Returns lower bounds of ε for pairs of neighbours, each from `draws` draws per neighbour, half of them to choose.

    Args:
        draw: The mechanism as deployed; only its outputs are looked at.
        pairs: Neighbours to compare, in both directions each.
        claim: The ε that is claimed.
        draws: Draws per neighbour.
        outcomes: Outputs are below this.
    """
    significance = SIGNIFICANCE / (2 * len(pairs))
    half = draws // 2
    bounds = []
    for left, right in pairs:
        counts = [
            [np.bincount(draw(side, half), minlength=outcomes) for _ in range(2)] for side in (left, right)
        ]  # fmt: skip
        for first, second, pair in ((0, 1, (left, right)), (1, 0, (right, left))):
            event = separating_event(counts[first][0], counts[second][0], significance)
            hits, others = (int(counts[side][1][event].sum()) for side in (first, second))
            bounds.append(Bound(pair, lower_bound(hits, others, half, significance), hits / half, half, significance))
    return Verdict(claim, tuple(bounds))


def separating_event(
    first: Int64[np.ndarray, " outcomes"], second: Int64[np.ndarray, " outcomes"], significance: float
) -> Int64[np.ndarray, " _"]:
    """Returns the outputs with the largest likelihood ratio, as many as make the bound largest on these counts.

    For a finite output set the best event is always one of these (Neyman and Pearson).
    """
    draws = int(first.sum())
    order = np.argsort(-((first + 0.5) / (second + 0.5)), kind="stable")
    hits, others = np.cumsum(first[order]), np.cumsum(second[order])
    bounds = lower_bounds(hits, others, draws, significance)
    return order[: int(np.argmax(bounds)) + 1]


def lower_bound(hits: int, others: int, draws: int, significance: float) -> float:
    """Returns ln(lower limit of the first share / upper limit of the second), or 0."""
    return float(lower_bounds(np.array([hits]), np.array([others]), draws, significance)[0])


def lower_bounds(hits: np.ndarray, others: np.ndarray, draws: int, significance: float) -> np.ndarray:
    """Returns `lower_bound` for many counts at once."""
    from scipy.stats import beta

    tail = significance / 2
    low = np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), draws - hits + 1), 0.0)
    high = np.where(others < draws, beta.ppf(1 - tail, others + 1, np.maximum(draws - others, 1)), 1.0)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(low / high), 0.0)


def best_pair(table: np.ndarray, draws: int) -> tuple[int, int]:
    """Returns the neighbours of a table whose bound is expected to be largest: the place to look first.

    Args:
        table: P[x,y].
        draws: Draws per neighbour.
    """
    best, pair = -1.0, (0, 1)
    counts = np.rint(np.asarray(table) * (draws // 2)).astype(np.int64)
    for left in range(len(table)):
        ratio = (table[left] + 1e-12) / (table + 1e-12)
        order = np.argsort(-ratio, axis=1, kind="stable")
        hits = np.cumsum(np.take_along_axis(np.broadcast_to(counts[left], counts.shape), order, axis=1), axis=1)
        others = np.cumsum(np.take_along_axis(counts, order, axis=1), axis=1)
        # The normal approximation of the interval is enough to choose a pair.
        low = hits - 3 * np.sqrt(hits + 1)
        expected = np.log(np.maximum(low, 1e-9) / (others + 3 * np.sqrt(others + 1)))
        expected[left] = -1.0
        place = np.unravel_index(int(expected.argmax()), expected.shape)
        if expected[place] > best:
            best, pair = float(expected[place]), (left, int(place[0]))
    return pair


def sequence_events(draw_many: Callable[[int, int], np.ndarray], ratios: np.ndarray, cells: int = 64) -> Draw:
    """Returns a `Draw` over runs of several draws for one secret: each run as its summed log-likelihood ratio in cells.

    Args:
        draw_many: Returns runs of draws: runs x repeats.
        ratios: The log-likelihood ratio of each single output between the two neighbours.
        cells: How finely the sum is cut.
    """

    def draw(side: int, count: int) -> Any:
        sums = ratios[draw_many(side, count)].sum(axis=1)
        top = float(np.abs(ratios).max()) * 8 + 1e-9
        return np.clip(((sums / top + 1.0) / 2.0 * cells).astype(np.int64), 0, cells - 1)

    return draw
