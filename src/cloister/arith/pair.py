"""Exact products of two matrices of field elements, a batch of heads at once: what an accelerator is asked for when both
operands are secret and blinded.

Elements are 31 bits wide on both sides, so the int8 product does not serve: each multiplication is a 32 x 32 -> 64 bit
one (`vpmuldq` on this family of processors, eight at once).
"""

import numpy as np
from jaxtyping import Int32

from cloister.arith.modulus import HALF, MAX_D_IN, P
from cloister.arith.pair_kernels import pair_rows, pair_rows_transposed
from cloister.arith.team import Team
from cloister.errors import WireError


def pair_product(
    left: Int32[np.ndarray, "heads rows inner"],
    right: Int32[np.ndarray, "heads capacity width"],
    first: int,
    transposed: bool,
    out: Int32[np.ndarray, "heads rows outer"],
    team: Team | None = None,
) -> None:
    """Fills `out` with `left @ right[first:]` (or, transposed, with `left @ right[first:]^T`) modulo P, head by head.

    As many rows of `right` are used, from `first` on, as the shapes of `left` and `out` ask for; exact for all centred
    elements, and the results are centred.

    Raises:
        WireError: shapes do not fit, an inner dimension exceeds 65536, or an array is not contiguous.
    """
    heads, capacity, width = right.shape
    inner, outer = left.shape[2], out.shape[2]
    used = outer if transposed else inner
    fits = left.shape[0] == out.shape[0] == heads and left.shape[1] == out.shape[1]
    if not fits or (inner if transposed else outer) != width or first < 0 or first + used > capacity:
        raise WireError(f"A product of {left.shape} and {right.shape} from row {first} does not fit {out.shape}.")
    if not 1 <= inner <= MAX_D_IN:
        raise WireError(f"Rows of {inner} elements are outside 1 to {MAX_D_IN}.", remedy="Split the inner dimension.")
    if not (left.flags.c_contiguous and right.flags.c_contiguous and out.flags.c_contiguous):
        raise WireError("A product needs contiguous operands and results.", remedy="Copy them first.")
    kernel = pair_rows_transposed if transposed else pair_rows
    frozen, kept = left.view(), right.view()
    frozen.flags.writeable = kept.flags.writeable = False  # one kind of array is one compilation

    def loop(start: int, stop: int) -> None:
        kernel(frozen, kept, first, out, start, stop)

    total = heads * left.shape[1]
    if team is None:
        loop(0, total)
    else:
        team.run(loop, total)


def pair_product_reference(
    left: Int32[np.ndarray, "heads rows inner"],
    right: Int32[np.ndarray, "heads n width"],
    transposed: bool,
) -> Int32[np.ndarray, "heads rows outer"]:
    """The slow twin of `pair_product`, by Python integers, over all rows of `right`."""
    results = []
    for head_left, head_right in zip(left.astype(object), right.astype(object), strict=True):
        residue = (head_left @ (head_right.T if transposed else head_right) % P).astype(np.int64)
        results.append(np.where(residue > HALF, residue - P, residue).astype(np.int32))
    return np.stack(results)
