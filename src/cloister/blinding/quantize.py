"""Turns float weights into int8 rows, and says how finely an activation may be quantised so that nothing wraps.

Covers: the numbers of the blinded linear (protocol, "Numbers"). Weights are symmetric int8 per output column, with an
optional second plane for the residual. The scale of an activation row comes from a bound, never from its maximum:
by Cauchy-Schwarz no output can leave the field for any input, so the integer product is recovered exactly.
Does not cover: secrecy. Nothing here is secret except activations, which pass through and are not kept.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32, Int8

from cloister.arith.jit import compiled
from cloister.arith.modulus import HALF
from cloister.errors import CheckpointError

LEVELS: Final = 127
"""Largest absolute value of a quantised weight."""

LIMIT: Final = HALF * (1.0 - 2.0**-30)
"""Largest absolute output of a product: below P/2 by more than the float64 arithmetic of a scale can round."""


@dataclass(frozen=True)
class Reach:
    """How long a quantised row of one linear may be: `||x_q||_2 <= reach`, so that no output can wrap.

    `column_norm` is C, the largest Euclidean norm of a quantised output column over all planes.
    """

    value: float
    column_norm: float

    @staticmethod
    def of(column_norm: float, d_in: int) -> "Reach":
        """Returns the largest `reach` with `(reach + sqrt(d_in)/2) * C < P/2`."""
        norm = max(column_norm, 1.0)
        return Reach(LIMIT / norm - math.sqrt(d_in) / 2, norm)


def quantize_rows(
    rows: Float32[np.ndarray, "d_out d_in"],
    planes: Int8[np.ndarray, "planes d_out d_in"],
    scales: Float32[np.ndarray, "planes d_out"],
) -> float:
    """Fills `planes` and `scales` so that `rows ~= sum_p planes[p] * scales[p]`; returns the largest column norm.

    The first plane holds round(w / s) with s = max|w| / 127 per row; a second one does the same for what is left.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    norm = float(_quantize_rows(rows, planes, scales))
    if norm < 0:
        raise CheckpointError("A weight is NaN or infinite.", remedy="The checkpoint is damaged: fetch it again.")
    return norm


@compiled
def _quantize_rows(rows, planes, scales):  # type: ignore[no-untyped-def]
    largest = 0.0
    d_in = rows.shape[1]
    rest = np.empty(d_in, np.float32)
    for j in range(rows.shape[0]):
        for k in range(d_in):
            rest[k] = rows[j, k]
        for plane in range(planes.shape[0]):
            peak = np.float32(0.0)
            total = np.float32(0.0)
            for k in range(d_in):
                peak = max(peak, abs(rest[k]))
                total += abs(rest[k]) * np.float32(0.0)  # NaN or infinity turns this into NaN
            if total != np.float32(0.0):
                return -1.0
            scale = np.float32(peak / np.float32(LEVELS))
            scales[plane, j] = scale
            inverse = np.float32(0.0) if scale == np.float32(0.0) else np.float32(1.0) / scale
            if not np.isfinite(inverse):  # a denormal peak: too small to matter, and its inverse overflows
                inverse = np.float32(0.0)
            square = np.int64(0)
            for k in range(d_in):
                level = min(max(np.int32(np.rint(rest[k] * inverse)), np.int32(-LEVELS)), np.int32(LEVELS))
                planes[plane, j, k] = level
                rest[k] -= np.float32(level) * scale
                square += level * level
            largest = max(largest, math.sqrt(square))
    return largest


def quantize_rows_reference(
    rows: Float32[np.ndarray, "d_out d_in"], planes: int
) -> tuple[Int8[np.ndarray, "planes d_out d_in"], Float32[np.ndarray, "planes d_out"], float]:
    """The NumPy twin of `quantize_rows`: returns planes, scales and the largest column norm."""
    rest = rows.astype(np.float32).copy()
    quantized, scales = [], []
    for _ in range(planes):
        scale = (np.abs(rest).max(axis=1) / np.float32(LEVELS)).astype(np.float32)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale).astype(np.float32)
        inverse = np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)
        level = np.clip(np.rint(rest * inverse[:, None]), -LEVELS, LEVELS).astype(np.int8)
        rest = rest - level.astype(np.float32) * scale[:, None]
        quantized.append(level)
        scales.append(scale)
    stacked = np.stack(quantized)
    norm = float(np.sqrt((stacked.astype(np.int64) ** 2).sum(axis=2).max()))
    return stacked, np.stack(scales), norm
