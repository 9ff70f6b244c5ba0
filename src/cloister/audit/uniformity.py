"""Whether integers look uniform: chi-square over digits, Kolmogorov-Smirnov over elements.

Covers: the statement "what the accelerator saw is indistinguishable from uniform" at a stated significance. Does not
cover: a proof. The proof is that a one-time pad is uniform; these tests would catch an implementation that is not.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int, Int64

from cloister.arith.modulus import P

DIGITS: Final = 256
SIGNIFICANCE: Final = 1e-6
"""A verdict of "not uniform" on truly uniform data happens once in this many trials, per test."""


@dataclass(frozen=True)
class Uniformity:
    """The p-values of both tests over some elements, and the histogram of their low digits."""

    elements: int
    chi_square_p: float
    kolmogorov_smirnov_p: float
    histogram: Int64[np.ndarray, "256"]

    @property
    def uniform(self) -> bool:
        """Whether neither test refuses uniformity."""
        return min(self.chi_square_p, self.kolmogorov_smirnov_p) >= SIGNIFICANCE


def measure_uniformity(rows: Int[np.ndarray, "tokens d_in"]) -> Uniformity:
    """Returns the tests of `rows`, elements of the field in any form.

    The three low base-256 digits of a uniform element are uniform to within 2^-31 each; the smaller of their three
    chi-square p-values is reported, corrected for having looked three times.
    """
    values = rows.reshape(-1).astype(np.int64) % P
    p_values = []
    histogram = np.zeros(DIGITS, np.int64)
    for place in range(3):
        counts = np.bincount((values >> (8 * place)) & (DIGITS - 1), minlength=DIGITS)
        expected = values.size / DIGITS
        p_values.append(chi_square_p(float(((counts - expected) ** 2).sum() / expected), DIGITS - 1))
        histogram = counts if place == 0 else histogram
    ordered = np.sort(values) / P
    steps = np.arange(1, values.size + 1) / values.size
    distance = max(float((steps - ordered).max()), float((ordered - steps + 1 / values.size).max()))
    return Uniformity(values.size, min(1.0, 3 * min(p_values)), kolmogorov_p(distance, values.size), histogram)


def chi_square_p(statistic: float, degrees: int) -> float:
    """Returns P(chi-square with `degrees` degrees of freedom >= `statistic`), by Wilson and Hilferty's approximation.

    Its relative error at 255 degrees of freedom is under 5 % down to p = 1e-6.
    """
    spread = 2.0 / (9.0 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


def kolmogorov_p(distance: float, count: int) -> float:
    """Returns the p-value of a Kolmogorov-Smirnov distance over `count` samples (Stephens' form of the limit)."""
    scaled = distance * (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count))
    if scaled < 0.2:
        return 1.0
    terms = ((-1) ** (k - 1) * math.exp(-2 * k * k * scaled * scaled) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms)))
