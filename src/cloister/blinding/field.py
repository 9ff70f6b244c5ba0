"""Arithmetic in F_p, p = 2^31 - 1, on arrays of centred int32 elements: slow, obvious twins of the fused kernels.

Covers: what a product, a dot product and a centring are. Does not cover: speed (see `blinding.kernels`) or secrecy.
"""

import numpy as np
from jaxtyping import Int, Int32

from cloister.arith.modulus import HALF, P


def centre(values: Int[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
    """Returns each value's representative modulo P in [-HALF, HALF], as int32."""
    residue = values.astype(np.int64) % P
    return np.where(residue > HALF, residue - P, residue).astype(np.int32)


def dot(left: Int[np.ndarray, " n"], right: Int[np.ndarray, " n"]) -> int:
    """Returns the dot product modulo P, in [0, P), by Python integers."""
    return sum(int(a) * int(b) for a, b in zip(left, right, strict=True)) % P


def product(
    rows: Int[np.ndarray, "tokens d_in"], weight: Int[np.ndarray, "d_out d_in"]
) -> Int32[np.ndarray, "tokens d_out"]:
    """Returns `rows @ weight.T` modulo P, centred, by exact Python integers."""
    return centre((rows.astype(object) @ weight.T.astype(object) % P).astype(np.int64))
