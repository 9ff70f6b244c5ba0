"""Privacy profiles of tables: how far any two rows are apart at every ε, and whether a curve bounds that.

Covers: a curve that comes with tables from a file. Guarantees: a curve that `check_dominates` lets pass is nowhere below the
hockey-stick divergence of two rows of one table, by more than the rounding of one number.
Assumes: the tables are certified (`privacy.certificate`), so a column is all zero or has no zero.
Does not cover: composing (`privacy.accounting`).
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float64

from cloister.errors import CertificateError, PrivacyError
from cloister.privacy.accounting import check_curve
from cloister.privacy.certificate import TOTAL, AnyWeights
from cloister.privacy.mechanism import DominatingCurve

REMEDY: Final = "Build the candidates again."

ROUNDING: Final = 1e-13
"""More than the rounding of a sum of probabilities; curves are built 1e-12 above what is computed."""


def work(curve: DominatingCurve, tables: Sequence[AnyWeights]) -> int:
    """Returns how many ratios of weights, or points of pairs where there are more, `check_dominates` looks at."""
    return sum(len(table) ** 2 * max(len(table), len(curve.deltas)) for table in tables)


def check_dominates(curve: DominatingCurve, tables: Sequence[AnyWeights]) -> None:
    """Raises `CertificateError` unless `curve` bounds the divergence of any two rows of each table, at all its points.

    Between its points both are convex in e^ε, so a line between two points is above.
    """
    try:
        check_curve(curve)
    except PrivacyError as error:
        raise CertificateError(error.message, remedy=error.remedy) from None
    first = round(curve.first / curve.gap)
    steps = np.arange(len(curve.deltas)) + first
    aligned = math.isclose(first * curve.gap, curve.first, rel_tol=1e-9, abs_tol=1e-12)
    if not (aligned and steps[0] <= 0 <= steps[-1]):
        raise CertificateError(
            "A dominating curve has other points than the multiples of its step around 0.", remedy=REMEDY
        )
    reach = int(np.abs(steps).max())
    worst = np.zeros(reach + 1)
    for table in tables:
        np.maximum(worst, profile(table, curve.gap, reach), out=worst)
    shrink = np.exp(-np.abs(steps) * curve.gap)
    positive = worst[np.abs(steps)]
    needed = np.where(steps < 0, 1.0 - shrink + shrink * positive, positive)  # δ(-ε) = 1 - e^-ε + e^-ε δ(ε)
    if (np.array(curve.deltas) < needed - ROUNDING).any():
        raise CertificateError("A table reveals more than its dominating curve says.", remedy=REMEDY)


def profile(weights: AnyWeights, gap: float, steps: int) -> Float64[np.ndarray, " points"]:
    """Returns δ(ε) = max over pairs of Σ_y max(0, P[x,y] - e^ε P[x',y]) at 0, gap, ..., steps·gap.

    As `certificate.hockey_stick`, in one pass: each y counts at every ε below its loss ln(P[x,y] / P[x',y]), so a
    histogram of the losses, weighted by P[x,y] and by P[x',y], holds all points.
    """
    table = weights[:, weights.max(axis=0) > 0] / TOTAL
    logs = np.log(table) / gap
    cells = steps + 2
    factors = np.exp(np.arange(steps + 1) * gap)
    offsets = cells * np.arange(len(table))[:, None]
    others = table.ravel()
    highest = np.zeros(steps + 1)
    for row, own in zip(table, logs, strict=True):
        # A loss in (c - 1, c] steps counts at the points 0 to c - 1.
        cell = (np.clip(np.ceil(own - logs), 0, steps + 1).astype(np.intp) + offsets).ravel()
        mine = np.bincount(cell, np.broadcast_to(row, table.shape).ravel(), cells * len(table))
        theirs = np.bincount(cell, others, cells * len(table))
        above = [part.reshape(-1, cells)[:, :0:-1].cumsum(axis=1)[:, ::-1] for part in (mine, theirs)]
        np.maximum(highest, (above[0] - factors * above[1]).max(axis=0), out=highest)
    return highest


def of_any(epsilon: float, gap: float) -> DominatingCurve:
    """Returns the curve that dominates every ε-private mechanism: randomised response (Kairouz et al. 2015)."""
    edge = math.ceil(epsilon / gap)
    points = np.arange(-edge, edge + 1) * gap
    worst = np.clip((math.exp(epsilon) - np.exp(points)) / (math.exp(epsilon) + 1), 0.0, 1.0)
    deltas = np.where(points < -epsilon, -np.expm1(points), worst + (points < epsilon) * ROUNDING)
    return DominatingCurve(-edge * gap, gap, tuple(np.minimum(deltas, 1.0).tolist()))
