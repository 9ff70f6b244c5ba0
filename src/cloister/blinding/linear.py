"""A linear layer as the enclave knows it: the public weight, its scales, its bound and the secrets of its check."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32

from cloister.arith.product import modular_product
from cloister.arith.team import Team
from cloister.blinding.checks import CheckKey
from cloister.blinding.kernels import OK, quantize, scale_product
from cloister.blinding.pads import Pad, PadSource, non_finite
from cloister.blinding.quantize import Reach
from cloister.wire.messages import PublicWeight


@dataclass(frozen=True)
class LentLinear:
    """One public linear layer that may be lent. With two planes, the weight stacks them: `[2 * d_out, d_in]`."""

    name: str
    weight: PublicWeight
    scales: Float32[np.ndarray, "planes d_out"] = field(repr=False)
    reach: Reach
    check: CheckKey = field(repr=False)
    bias: Float32[np.ndarray, " bias"] = field(repr=False)
    """float32 `[d_out]`, or `[0]` where the layer has none."""

    @property
    def d_in(self) -> int:
        """Length of an input row."""
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        """Length of an output row."""
        return int(self.scales.shape[1])

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

    def compute(
        self, x: Float32[np.ndarray, "tokens d_in"], out: Float32[np.ndarray, "tokens d_out"], team: Team | None = None
    ) -> None:
        """Fills `out` with the same numbers as a lent product, bit for bit, computed here.

        Raises:
            NonFiniteError: a row holds NaN or infinity.
        """
        quantized = np.empty(x.shape, np.int32)
        scales = np.empty(x.shape[0], np.float64)
        if (bad := quantize(x, self.reach.value, quantized, scales)) != OK:
            raise non_finite(self.name, bad)
        product = np.empty((x.shape[0], self.weight.shape[0]), np.int32)
        modular_product(self.weight.matrix, quantized, product, team)
        scale_product(product, scales, self.scales, self.bias, out)
