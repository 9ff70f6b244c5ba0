"""The best low-rank approximation of a matrix, to a rank or to a share of its energy.

Source: truncated SVD (Eckart and Young 1936); large matrices by random projection with power iterations (Halko, Martinsson
and Tropp 2011, algorithms 4.4 and 5.1), whose error is within a few percent of the best.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32

from cloister.errors import AdapterError

EXACT_UP_TO: Final = 1024
"""Matrices whose smaller side is at most this long are decomposed exactly: it takes a second or so."""

OVERSAMPLING: Final = 16
"""Random directions beyond the rank: they make it unlikely that a large one is missed (Halko et al., section 4.2)."""

POWER_ITERATIONS: Final = 4
"""Sharpen the spectrum: the error approaches the best one exponentially fast (Halko et al., theorem 9.2)."""

FIRST_RANK: Final = 64
"""Where the search for a rank with enough energy begins."""


@dataclass(frozen=True)
class Criterion:
    """How much to keep: a rank, or the smallest rank with a share of the energy; exactly one of the two."""

    rank: int | None = None
    energy: float | None = None
    """Share of the squared norm, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise AdapterError("Slices need a rank or an energy, not both.", remedy="Give --rank or --energy.")
        if self.rank is not None and not 1 <= self.rank <= 2**16:
            raise AdapterError(f"rank is {self.rank}.", remedy="Allowed: 1 to 65536.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy is {self.energy}.", remedy="Allowed: above 0, at most 1.")


def factorise(
    matrix: Float32[np.ndarray, "d_out d_in"], criterion: Criterion
) -> tuple[Float32[np.ndarray, "rank d_in"], Float32[np.ndarray, "d_out rank"]]:
    """Returns (A, B) with `B @ A ~= matrix`, of a rank of at least one; both carry the square roots of singular values."""
    left, values, right = _decompose(matrix, criterion)
    rank = values.size if criterion.energy is None else _rank_for(values, criterion.energy * _energy(matrix))
    root = np.sqrt(values[:rank])
    a = np.ascontiguousarray(root[:, None] * right[:rank], np.float32)
    return a, np.ascontiguousarray(left[:, :rank] * root, np.float32)


def _decompose(matrix: np.ndarray, criterion: Criterion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns enough singular vectors and values for the criterion."""
    small = min(matrix.shape)
    if criterion.rank is not None:
        rank = min(criterion.rank, small)
        if small > EXACT_UP_TO and 3 * (rank + OVERSAMPLING) < small:
            return _projected(matrix, rank)
    elif criterion.energy is not None and small > EXACT_UP_TO:
        rank, wanted = FIRST_RANK, criterion.energy * _energy(matrix)
        while 3 * (rank + OVERSAMPLING) < small:
            found = _projected(matrix, rank)
            if np.square(found[1], dtype=np.float64).sum() >= wanted:
                return found
            rank *= 2
        rank = small
    else:
        rank = small
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _projected(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the `rank` largest singular values and their vectors, by projection on a random subspace."""
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + OVERSAMPLING), np.float32)
    basis = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def _rank_for(values: np.ndarray, wanted: float) -> int:
    """Returns how many of the largest values hold `wanted` of squares (all, where rounding leaves them just short)."""
    held = np.cumsum(np.square(values, dtype=np.float64))
    return min(values.size, int(np.searchsorted(held, wanted * (1 - 1e-9))) + 1)


def _energy(matrix: np.ndarray) -> float:
    return (
        float(np.square(matrix, dtype=np.float64).sum()) if matrix.size < 2**20 else float(np.linalg.norm(matrix)) ** 2
    )
