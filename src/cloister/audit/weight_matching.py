"""Recovers private weights from what an accelerator was given, with the help of a public base model.

Covers: a private model that is a change of a public one, the case that the obfuscation papers claim to protect. Three attackers:
one reads exposed weights, one fills what is missing from the base, and one undoes permutations and scales by matching
directions (ArrowMatch): rows (or inputs) of the disguised weight are matched to the base's by their sorted elements, which no
permutation of the other axis changes; that tells the other axis' order; then rows are matched by cosine, scales by projection.
Does not cover: fine-tuning a surrogate on what was recovered, or recovery from activations.
Source: ArrowMatch, Wang et al., "Game of Arrows" (USENIX Security 2025); the sorted first step is what removes a permutation
of inputs, as for the permutation class in the same line of work.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32, Int64

from cloister.audit.inversion import directions
from cloister.audit.scores import Proportion
from cloister.blinding.linear import Linear

ROUNDS: Final = 3
"""How often rows and inputs are matched in turn; the second round already repairs what the first got wrong."""

RECOVERED: Final = 0.5
"""A row counts as recovered if the attacker's error is below this share of the base's distance from it."""

_BLOCK: Final = 2048

Weight = Float32[np.ndarray, "outputs d_in"]


@dataclass(frozen=True)
class WeightRecovery:
    """What an attacker holds of one private weight, beside a base that everybody has."""

    rows: Proportion
    """Outputs of which the attacker's estimate is at least twice as close as the public base."""
    known: float
    """Share of the private change that is recovered: 1 - error^2 / (distance from the base)^2, from 0 to 1."""


@dataclass(frozen=True)
class Arrows:
    """How a disguised weight lies in the base's: row `i` of it belongs to `rows[i]`, its input `k` to `columns[k]`."""

    rows: Int64[np.ndarray, " outputs"]
    columns: Int64[np.ndarray, " d_in"]


def true_weight(linear: Linear) -> Weight:
    """Returns a linear's weight as floats; with two planes, stacked as they are stored."""
    return linear.matrix.astype(np.float32) * linear.scales.reshape(-1, 1)


def score(estimate: Weight, truth: Weight, base: Weight) -> WeightRecovery:
    """Returns how much closer `estimate` is to `truth` than the public `base` is; rounding does not count as error."""
    rounding = 1e-10 * (truth.astype(np.float64) ** 2).sum(axis=1)
    error = np.maximum(0.0, ((estimate - truth).astype(np.float64) ** 2).sum(axis=1) - rounding)
    distance = ((base - truth).astype(np.float64) ** 2).sum(axis=1)
    recovered = int((error <= RECOVERED**2 * distance).sum())
    total = float(distance.sum())
    known = 1.0 - float(error.sum()) / total if total > 0 else float(not error.any())
    return WeightRecovery(Proportion(recovered, truth.shape[0]), min(1.0, max(0.0, known)))


def filled_from_base(exposed: Weight, base: Weight) -> Weight:
    """Returns the exposed weights, and the base's wherever none is (a weight of exactly zero counts as none)."""
    return np.where(exposed == 0, base, exposed)


def arrow_match(disguised: Weight, base: Weight) -> Arrows:
    """Returns which row and which input of `base` each of the disguised weight's is, whatever their order and scale."""
    arrows, targets = directions(disguised), directions(base)
    if base.shape[0] > base.shape[1]:  # sorted inputs are longer, and tell more, than sorted rows
        columns = _nearest(_profiles(arrows.T), _profiles(targets.T))
        rows = _nearest(arrows, targets[:, columns])
    else:
        rows = _nearest(_profiles(arrows), _profiles(targets))
    for _ in range(ROUNDS):
        columns = _nearest(directions(_centred(arrows.T)), directions(_centred(targets[rows].T)))
        rows = _nearest(arrows, targets[:, columns])
    return Arrows(rows, columns)


def undisguise(disguised: Weight, base: Weight, arrows: Arrows) -> Weight:
    """Returns the estimate of the private weight, in the base's order: matched rows, scaled to fit the base best.

    A row of the base that nothing was matched to stays the base's.
    """
    ordered = np.zeros_like(disguised)
    ordered[:, arrows.columns] = disguised
    targets = base[arrows.rows]
    squares = (ordered * ordered).sum(axis=1)
    scales = (ordered * targets).sum(axis=1) / np.where(squares > 0, squares, np.float32(1))
    estimate = base.copy()
    estimate[arrows.rows] = ordered * scales[:, None]
    return estimate


def simulated_base(weight: Weight, share: float, seed: int) -> Weight:
    """Returns a public base that `weight` might be a change of: each row differs by random noise, `share` of its length."""
    noise = directions(np.random.default_rng(seed).standard_normal(weight.shape, np.float32))
    return weight + np.float32(share) * noise * np.linalg.norm(weight, axis=1, keepdims=True)


def _profiles(rows: Weight) -> Weight:
    """Returns the sorted elements of each row, less what all rows have in common: what no permutation of inputs changes."""
    return directions(_centred(np.sort(rows, axis=1)))


def _centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(axis=0)


def _nearest(rows: np.ndarray, targets: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """Returns the target in the most similar direction for each row, some rows at a time."""
    found = [(rows[start : start + _BLOCK] @ targets.T).argmax(axis=1) for start in range(0, rows.shape[0], _BLOCK)]
    return np.concatenate(found).astype(np.int64)
