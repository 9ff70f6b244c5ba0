"""A linear layer as the enclave knows it: with a public weight it may be lent, with a private one it is computed here.

Guarantees: only a `LentLinear` can make pads, and only its `PublicWeight` is of the type that an accelerator is given.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int8, Int32

from cloister.arith.product import modular_product
from cloister.arith.team import Team
from cloister.blinding.checks import CheckKey
from cloister.blinding.kernels import OK, quantize, scale_product
from cloister.blinding.pads import Pad, PadSource, non_finite
from cloister.blinding.quantize import Reach
from cloister.wire.messages import PublicWeight


class Linear(ABC):
    """A quantised linear layer. With two planes, the matrix stacks them: `[2 * d_out, d_in]`."""

    name: str
    scales: Float32[np.ndarray, "planes d_out"]
    reach: Reach
    bias: Float32[np.ndarray, " bias"]

    @property
    @abstractmethod
    def matrix(self) -> Int8[np.ndarray, "outputs d_in"]:
        """The quantised weight."""

    @property
    def d_in(self) -> int:
        """Length of an input row."""
        return int(self.matrix.shape[1])

    @property
    def d_out(self) -> int:
        """Length of an output row."""
        return int(self.scales.shape[1])

    def compute(
        self, x: Float32[np.ndarray, "tokens d_in"], out: Float32[np.ndarray, "tokens d_out"], team: Team | None = None
    ) -> None:
        """Fills `out` with the product, computed here: the same numbers as a lent product, bit for bit.

        Raises:
            NonFiniteError: a row holds NaN or infinity.
        """
        quantized = np.empty(x.shape, np.int32)
        scales = np.empty(x.shape[0], np.float64)
        if (bad := quantize(x, self.reach.value, quantized, scales)) != OK:
            raise non_finite(self.name, bad)
        product = np.empty((x.shape[0], self.matrix.shape[0]), np.int32)
        modular_product(self.matrix, quantized, product, team)
        scale_product(product, scales, self.scales, self.bias, out)


@dataclass(frozen=True)
class LentLinear(Linear):
    """A linear layer with a public weight: it may be lent under pads."""

    name: str
    weight: PublicWeight
    scales: Float32[np.ndarray, "planes d_out"] = field(repr=False)
    reach: Reach
    check: CheckKey = field(repr=False)
    bias: Float32[np.ndarray, " bias"] = field(repr=False)
    """float32 `[d_out]`, or `[0]` where the layer has none."""

    @property
    def matrix(self) -> Int8[np.ndarray, "outputs d_in"]:
        """The public weight."""
        return self.weight.matrix

    @property
    def pad_bytes(self) -> int:
        """Bytes that the pad of one row takes in the pantry: `r` and `u`, int32."""
        return 4 * (self.d_in + self.weight.shape[0])

    def make_pad(self, tokens: int, source: PadSource, team: Team | None = None) -> Pad:
        """Returns a fresh pad for `tokens` rows: draws r and computes u = r W, one exact integer product."""
        r = np.empty((tokens, self.d_in), np.int32)
        u = np.empty((tokens, self.weight.shape[0]), np.int32)
        self.fill_pad(r, u, source, team)
        return Pad(self, r, u)

    def fill_pad(
        self,
        r: Int32[np.ndarray, "tokens d_in"],
        u: Int32[np.ndarray, "tokens outputs"],
        source: PadSource,
        team: Team | None = None,
    ) -> None:
        """Overwrites `r` with fresh uniform rows and `u` with `r W` modulo P."""
        source.fill(r)
        modular_product(self.weight.matrix, r, u, team)


@dataclass(frozen=True)
class PrivateLinear(Linear):
    """A linear layer with a private weight: computed in the enclave, known to nobody else."""

    name: str
    private: Int8[np.ndarray, "outputs d_in"] = field(repr=False)
    scales: Float32[np.ndarray, "planes d_out"] = field(repr=False)
    reach: Reach
    bias: Float32[np.ndarray, " bias"] = field(repr=False)

    @property
    def matrix(self) -> Int8[np.ndarray, "outputs d_in"]:
        """The private weight."""
        return self.private
