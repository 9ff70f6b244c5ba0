"""How each baseline computes one linear's integer product: in the enclave, exposed, split, or exposed in disguise.

Guarantees: every way returns the same integers as `w8a8.plain_product`, exactly; they differ in what the accelerator sees.
Does not cover: secrecy. Each class says what it exposes; `schemes` says which attack that falls to.
"""

from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from cloister.arith.jit import compiled
from cloister.arith.product import int8_product
from cloister.arith.team import Team
from cloister.audit.baselines.exposure import ExposedAccelerator, ExposedWeight
from cloister.audit.baselines.w8a8 import plain_product
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.pads import PadSource

SPARSE_UP_TO: Final = 0.01
"""Largest shielded fraction that is computed weight by weight: at 10 %, that takes 13 times a dense int8 product."""


@runtime_checkable
class Product(Protocol):
    """One linear's integer product."""

    @property
    def exposed(self) -> bool:
        """Whether rows of this linear reach the accelerator."""
        ...

    def __call__(self, rows: Int8[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns `rows @ weight.T` in integers."""
        ...


class EnclaveProduct:
    """Computed in the enclave; the accelerator has neither the weight nor a row."""

    exposed = False

    def __init__(self, linear: Linear, team: Team | None) -> None:
        self._linear = linear
        self._team = team

    def __call__(self, rows: Int8[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns the product."""
        return plain_product(self._linear, rows, self._team)


class ExposedProduct:
    """Computed by the accelerator, which has the weight, its scales, and every row."""

    exposed = True

    def __init__(self, index: int, linear: LentLinear, accelerator: ExposedAccelerator) -> None:
        self._index = index
        self._accelerator = accelerator
        accelerator.register(index, ExposedWeight(linear.name, linear.weight.matrix, linear.scales.reshape(-1)))

    def __call__(self, rows: Int8[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns the product."""
        return self._accelerator.multiply(self._index, rows)


class MagnitudeProduct:
    """The largest weights stay in the enclave, apart from the rest; the accelerator has the rest, and every row.

    "Large" is by |quantised weight x its scale|; exactly `round(fraction * size)` weights stay, at least one. The enclave
    computes its share from a list of weights if they are few, and else, which is faster, as a product with zeros in it.
    """

    exposed = True

    def __init__(
        self, index: int, linear: LentLinear, accelerator: ExposedAccelerator, fraction: float, team: Team | None
    ) -> None:
        matrix = linear.weight.matrix
        kept = largest(matrix, linear.scales.reshape(-1, 1), fraction)
        few = fraction <= SPARSE_UP_TO
        self._inside: _SparseShare | _DenseShare = (
            _SparseShare(matrix, kept, team) if few else _DenseShare(matrix, kept, team)
        )
        self.shielded_weights = int(np.count_nonzero(kept))
        """How many weights stay in the enclave."""
        rest = np.where(kept, np.int8(0), matrix)
        self._index = index
        self._accelerator = accelerator
        accelerator.register(index, ExposedWeight(linear.name, rest, linear.scales.reshape(-1)))

    def __call__(self, rows: Int8[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns the product: the accelerator's share, and the enclave's on top."""
        product = self._accelerator.multiply(self._index, rows)
        self._inside.add(rows, product)
        return product


class _SparseShare:
    """Weights as a list per output."""

    def __init__(self, matrix: np.ndarray, kept: np.ndarray, team: Team | None) -> None:
        self._starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int64)
        self._columns = np.nonzero(kept)[1].astype(np.int32)
        self._values = matrix[kept]
        self._team = team

    def add(self, rows: np.ndarray, out: np.ndarray) -> None:
        def loop(start: int, stop: int) -> None:
            _add_sparse(self._starts, self._columns, self._values, rows, out, start, stop)

        if self._team is None:
            loop(0, out.shape[1])
        else:
            self._team.run(loop, out.shape[1])


class _DenseShare:
    """Weights in a matrix that is zero elsewhere."""

    def __init__(self, matrix: np.ndarray, kept: np.ndarray, team: Team | None) -> None:
        self._matrix = np.where(kept, matrix, np.int8(0))
        self._team = team

    def add(self, rows: np.ndarray, out: np.ndarray) -> None:
        share = np.empty_like(out)
        int8_product(self._matrix, rows, share, self._team)
        out += share


class ObfuscatedProduct:
    """The accelerator has the weight with outputs and inputs permuted and each output's scale multiplied by a secret.

    The secrets are drawn once, as in TransLinkGuard and ShadowNet; the enclave permutes each row, and puts the answer back
    into order and scale. Quantised, an output's scale is a number beside its int8 row, so the disguise costs no rounding.
    """

    exposed = True

    def __init__(self, index: int, linear: LentLinear, accelerator: ExposedAccelerator, source: PadSource) -> None:
        matrix = linear.weight.matrix
        outputs, d_in = matrix.shape
        rows, self._columns = _permutation(outputs, source), _permutation(d_in, source)
        self._back = np.argsort(rows)
        disguised = np.ascontiguousarray(matrix[rows][:, self._columns])
        # Log-uniform in [1/2, 2): elements are uniform in (-2^30, 2^30).
        factors = np.exp2(source.elements(1, outputs)[0] / np.float32(2**30)).astype(np.float32)
        self._index = index
        self._accelerator = accelerator
        scales = linear.scales.reshape(-1)[rows] * factors
        accelerator.register(index, ExposedWeight(linear.name, disguised, scales))

    def __call__(self, rows: Int8[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns the product, its outputs back in order."""
        answer = self._accelerator.multiply(self._index, np.ascontiguousarray(rows[:, self._columns]))
        return np.ascontiguousarray(answer[:, self._back])


def largest(
    matrix: Int8[np.ndarray, "outputs d_in"], scales: np.ndarray, fraction: float
) -> Bool[np.ndarray, "outputs d_in"]:
    """Returns a mask of the largest `fraction` of the weights by magnitude: exactly that many, at least one."""
    magnitude = np.abs(matrix.astype(np.float32)) * scales
    count = max(1, round(fraction * magnitude.size))
    kept = np.zeros(magnitude.size, np.bool_)
    kept[np.argpartition(magnitude.reshape(-1), magnitude.size - count)[magnitude.size - count :]] = True
    return kept.reshape(matrix.shape)


def _permutation(length: int, source: PadSource) -> Int64[np.ndarray, " length"]:
    return np.argsort(source.elements(1, length)[0], kind="stable")


@compiled
def _add_sparse(starts, columns, values, rows, out, first, last):  # type: ignore[no-untyped-def]
    for t in range(rows.shape[0]):
        for j in range(first, last):
            total = np.int32(0)
            for i in range(starts[j], starts[j + 1]):
                total += np.int32(values[i]) * np.int32(rows[t, columns[i]])
            out[t, j] += total
