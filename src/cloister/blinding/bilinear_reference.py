"""The slow, obvious twin of `blinding.bilinear`: Python integers and fractions, written from its docstring."""

from fractions import Fraction

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cloister.arith.modulus import HALF, P


def measure(row: Float32[np.ndarray, " n"], kind: str) -> float:
    """Returns the length, the peak or the sum of absolute elements of a row."""
    wide = row.astype(np.float64)
    if kind == "length":
        return float(np.sqrt((wide**2).sum()))
    return float(np.abs(wide).max() if kind == "peak" else np.abs(wide).sum())


def quantize(
    x: Float32[np.ndarray, "rows width"], kind: str, reach: float
) -> tuple[Int64[np.ndarray, "rows width"], list[float]]:
    """Returns `round(x / s)` and the scales `s = measure / reach`, row by row."""
    scales = [measure(row, kind) / reach for row in x]
    inverses = np.array([reach / measure(row, kind) if measure(row, kind) else 0.0 for row in x])
    return np.rint(x.astype(np.float64) * inverses[:, None]).astype(np.int64), scales


def blind(
    values: Int64[np.ndarray, "rows width"], pads: Int32[np.ndarray, "rows width"]
) -> Int32[np.ndarray, "rows width"]:
    """Returns `values + pads` modulo P, centred."""
    residue = (values.astype(object) + pads.astype(object)) % P
    return np.where(residue > HALF, residue - P, residue).astype(np.int32)


def recover(
    answer: Int32[np.ndarray, "rows outer"],
    left: Int32[np.ndarray, "rows inner"],
    pad: Int32[np.ndarray, "rows inner"],
    values: Int64[np.ndarray, "inner outer"],
    pads: Int32[np.ndarray, "inner outer"],
) -> list[list[int]]:
    """Returns `answer - left pads - pad values` modulo P, centred: the integers of the product of the two secrets."""
    exact = (
        answer.astype(object) - left.astype(object) @ pads.astype(object) - pad.astype(object) @ values.astype(object)
    )
    return [[int(v) - P if int(v) > HALF else int(v) for v in row] for row in exact % P]


def exact_product(x: Float32[np.ndarray, "rows inner"], y: Float32[np.ndarray, "inner outer"]) -> list[list[Fraction]]:
    """Returns the product of two float matrices without any rounding."""
    left = [[Fraction(float(v)) for v in row] for row in x]
    right = [[Fraction(float(v)) for v in column] for column in y.T]
    return [[sum((a * b for a, b in zip(r, c, strict=True)), Fraction(0)) for c in right] for r in left]
