"""The published sanitisers to compare with, re-implemented from their papers: SanText, CusText, RANTEXT, TEM, CMIF.

Covers: each mechanism's exact channel over a vocabulary, as a table, so that exact ε, the best attack and draws follow
without simulation. Does not cover: their tokenisers, their handling of unknown words and numbers (which in their code leaks,
see docs/sanitising.md); here every system gets the same words.

Sources: SanText (Yue et al. 2021, arXiv 2106.01221), CusText (Chen et al. 2023, arXiv 2207.01193), RANTEXT (Tong et al.
2023, arXiv 2310.12214), TEM (Carvalho et al. 2021, arXiv 2107.07928), CMIF (Yu et al. 2025, arXiv 2509.09091). Nothing is
copied from their code.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cloister.privacy.noisy_max import calibrated, exact_epsilon
from cloister.privacy.published import SENSITIVITY

Vectors = Float32[np.ndarray, "words hidden"]
Dense = Float32[np.ndarray, "words outputs"]
CUSTEXT_MEMBERS = 20
TOLERANCE = 3e-3
"""A rival is calibrated to this share below its ε."""
TEM_BETA = 0.001
"""TEM's probability of looking beyond its radius."""
LARGEST_PARAMETER = 1e6
RADII = 8
"""Quantiles by which RANTEXT's random radius is represented."""
COSINES = 1025
"""Values between -1 and 1 to which cosines are rounded for CMIF's channel over a whole vocabulary."""
NODES, BEYOND = 512, 40.0
"""Points in the integral over the noisy maximum, and how far above the highest score it goes, in units of the noise."""
ROWS = 1024
"""Rows of a channel that are made together."""


@dataclass(frozen=True)
class Block:
    """A part of a channel: P[x, y] for some words x over some words y, as indices of the vocabulary."""

    spans: Int64[np.ndarray, " _"]
    outputs: Int64[np.ndarray, " _"]
    table: np.ndarray


@dataclass(frozen=True)
class Rival:
    """A mechanism over a vocabulary."""

    blocks: tuple[Block, ...]

    @property
    def epsilon(self) -> float:
        """The exact ε between words of one block."""
        return max(exact_epsilon(block.table) for block in self.blocks)


def distances(vectors: Vectors) -> Dense:
    """Returns Euclidean distances."""
    squares = (vectors**2).sum(axis=1)
    result = squares[:, None] + squares[None] - 2.0 * (vectors @ vectors.T)
    np.maximum(result, 0.0, out=result)
    np.sqrt(result, out=result)
    np.fill_diagonal(result, 0.0)
    return result


def santext(far: Dense, parameter: float) -> Dense:
    """Returns P(y|x) ∝ exp(-parameter · d(x,y) / 2): SanText over one vocabulary (SanText+: over the sensitive words)."""
    return _softmax(-0.5 * parameter * far)


def tem(far: Dense, parameter: float) -> Dense:
    """Returns the truncated exponential mechanism for metric DP.

    Within the radius γ = (2/ε) ln((1-β)|V|/β) words score -d; everything beyond is one element ⊥ with the score
    -γ + (2/ε) ln |beyond|, which stands for a uniform word of the beyond. Gumbel noise of scale 2/ε.
    """
    size = far.shape[1]
    radius = 2.0 / parameter * math.log((1.0 - TEM_BETA) * size / TEM_BETA)
    # ⊥ weighs |beyond| · exp(-εγ/2) and is shared out evenly: the same as every word beyond scoring -γ.
    return _softmax(np.float32(0.5 * parameter) * -np.minimum(far, np.float32(radius)))


def rantext(far: Dense, vectors: Vectors, parameter: float, rng: np.random.Generator) -> Dense:
    """Returns RANTEXT's channel, its random radius integrated over quantiles.

    The radius is the length of a vector of Laplace noise (per-coordinate scale: the coordinate's range over ε, with the
    paper's damping above ε = 2); candidates lie within it; among them the exponential mechanism with utility (r - d)/r.
    """
    ranges = vectors.max(axis=0) - vectors.min(axis=0)
    damping = parameter if parameter < 2 else 0.01658 * math.log(max(19.0647 * parameter - 38.1294, 1e-9)) + 9.3111
    lengths = np.linalg.norm(rng.laplace(size=(4096, len(ranges))) * (ranges / max(damping, 1e-9)), axis=1)
    radii = np.quantile(lengths, (np.arange(RADII) + 0.5) / RADII)
    table = np.zeros_like(far)
    for radius in radii:
        weights = np.where(far < radius, np.exp(0.5 * parameter * (1.0 - far / radius)), 0.0)
        table += (weights / weights.sum(axis=1, keepdims=True) / RADII).astype(np.float32)
    return table


def custext_groups(vectors: Vectors, members: int = CUSTEXT_MEMBERS) -> list[Int64[np.ndarray, " _"]]:
    """Returns CusText's "conservative" groups: the most frequent word left and its nearest words left, again and again.

    Words come in order of falling frequency.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    left = np.arange(len(unit))
    groups = []
    while len(left) >= 2 * members:
        near = np.argsort(-(unit[left] @ unit[left[0]]), kind="stable")
        near = near[near != 0][: members - 1]
        chosen = np.concatenate([[0], near])
        groups.append(left[chosen])
        left = np.delete(left, chosen)
    if len(left):
        groups.append(left)
    return groups


def custext(vectors: Vectors, group: Int64[np.ndarray, " _"], parameter: float) -> Float64[np.ndarray, "_ _"]:
    """Returns P(y|x) ∝ exp(parameter · u / 2) with cosine similarity scaled to [0, 1] for each x of a group."""
    unit = vectors[group].astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    scores = unit @ unit.T
    low, high = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    weights = np.exp(0.5 * parameter * (scores - low) / np.maximum(high - low, 1e-12))
    return weights / weights.sum(axis=1, keepdims=True)


def santext_plus(vectors: Vectors, sensitive: Int64[np.ndarray, " _"], epsilon: float) -> Rival:
    """Returns SanText over the sensitive words, calibrated to an exact ε among them."""
    far = distances(vectors[sensitive])
    return Rival((Block(sensitive, sensitive, calibrated(partial(santext, far), epsilon, epsilon, TOLERANCE)),))


def santext_at_attack(vectors: Vectors, sensitive: Int64[np.ndarray, " _"], attack: float) -> Rival:
    """Returns SanText over the sensitive words at the parameter by which its best attacker is right a share `attack` of the time.

    All words are taken as equally frequent. The exact ε is whatever that parameter gives.
    """
    far = distances(vectors[sensitive])

    def success(parameter: float) -> float:
        return float(santext(far, parameter).max(axis=0).sum()) / len(far)

    low, high = 0.0, 1.0
    while success(high) < attack and high < LARGEST_PARAMETER:
        low, high = high, 2.0 * high
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if success(middle) < attack else (low, middle)
    return Rival((Block(sensitive, sensitive, santext(far, low)),))


def tem_rival(vectors: Vectors, sensitive: Int64[np.ndarray, " _"], epsilon: float) -> Rival:
    """Returns TEM over the sensitive words, calibrated to an exact ε among them."""
    far = distances(vectors[sensitive])
    return Rival((Block(sensitive, sensitive, calibrated(partial(tem, far), epsilon, epsilon, TOLERANCE)),))


def custext_plus(vectors: Vectors, sensitive: Int64[np.ndarray, " _"], epsilon: float) -> Rival:
    """Returns CusText over the sensitive words, every group calibrated to an exact ε."""
    blocks = []
    for group in custext_groups(vectors[sensitive]):
        rows = sensitive[group]
        blocks.append(Block(rows, rows, calibrated(partial(custext, vectors, rows), epsilon, epsilon, TOLERANCE)))
    return Rival(tuple(blocks))


def rantext_rival(
    vectors: Vectors, sensitive: Int64[np.ndarray, " _"], epsilon: float, rng: np.random.Generator
) -> Rival:
    """Returns RANTEXT over the sensitive words at its nominal ε: no parameter gives it a finite exact one in general."""
    far = distances(vectors[sensitive])
    return Rival((Block(sensitive, sensitive, rantext(far, vectors[sensitive], epsilon, rng)),))


def cmif_rival(vectors: Vectors, sensitive: Int64[np.ndarray, " _"], epsilon: float) -> Rival:
    """Returns CMIF's noisy maximum over the whole vocabulary for the sensitive words, at its published scale 2Δ/ε with Δ = 2.

    What `privacy.published` draws, for cosines rounded to 1/512. Its exact ε is below the nominal one, which is a bound.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    every = np.arange(len(unit))
    table = np.empty((len(sensitive), len(unit)), dtype=np.float32)
    for start in range(0, len(sensitive), ROWS):
        rows = sensitive[start : start + ROWS]
        table[start : start + ROWS] = noisy_maximum(
            np.clip(unit[rows] @ unit.T, -1.0, 1.0), 2.0 * SENSITIVITY / epsilon
        )
    return Rival((Block(sensitive, every, table),))


def noisy_maximum(cosines: Dense, scale: float) -> Dense:
    """Returns which of many scores in [-1, 1] is the largest with Laplace noise of a scale, for scores rounded to 1/512.

    P[y] = ∫ f(t - u_y) Π_{z≠y} F(t - u_z) dt as in `noisy_max.laplace_table`, where equal scores share their factors.
    """
    places = np.rint((cosines + 1.0) * ((COSINES - 1) / 2.0)).astype(np.int64)
    scores = np.linspace(-1.0, 1.0, COSINES) / scale
    # The integrand is smooth but for its kinks and vanishes on both sides, where equal steps are exact enough.
    points = np.linspace(scores[0] - BEYOND / 4.0, scores[-1] + BEYOND, NODES)
    offset = points[:, None] - scores
    density = 0.5 * np.exp(-np.abs(offset))
    below = np.where(offset < 0, density, 1.0 - density)
    counts = np.stack([np.bincount(row, minlength=COSINES) for row in places]).astype(np.float64)
    logs = counts @ np.log(below).T
    weights = np.exp(logs - logs.max(axis=1, keepdims=True)) @ (density / below)
    table = np.take_along_axis(weights, places, axis=1)
    return (table / table.sum(axis=1, keepdims=True)).astype(np.float32)


def _softmax(scores: Dense) -> Dense:
    scores = scores - scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores
