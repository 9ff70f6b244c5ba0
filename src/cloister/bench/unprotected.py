"""The unprotected baseline: the same engine with plain int8 products, no blinding, no check, no second process."""

import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from cloister.arith.jit import compiled
from cloister.arith.product import int8_product
from cloister.arith.team import Team
from cloister.blinding.linear import Linear


class PlainGate:
    """Computes linear layers as unprotected int8 serving does: 8-bit activations scaled by each row's maximum."""

    def __init__(self, linears: Sequence[Linear], team: Team) -> None:
        self.linears = tuple(linears)
        self.seconds = 0.0
        self._team = team

    def lends(self, tokens: int) -> bool:
        """Nothing is lent."""
        return False

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` with the product in W8A8."""
        started = time.perf_counter()
        linear = self.linears[index]
        quantized = np.empty(x.shape, np.int8)
        scales = np.empty(x.shape[0], np.float32)
        _quantize_by_maximum(x, quantized, scales)
        product = np.empty(out.shape, np.int32)
        int8_product(linear.matrix, quantized, product, self._team)
        _rescale(product, scales, linear.scales[0], out)
        self.seconds += time.perf_counter() - started


@compiled
def _quantize_by_maximum(x, quantized, scales):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        peak = np.float32(1e-30)
        for k in range(x.shape[1]):
            peak = max(peak, abs(x[t, k]))
        scales[t] = peak / np.float32(127.0)
        inverse = np.float32(127.0) / peak
        for k in range(x.shape[1]):
            quantized[t, k] = np.int8(np.rint(x[t, k] * inverse))


@compiled
def _rescale(product, scales, weight_scales, out):  # type: ignore[no-untyped-def]
    for t in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[t, j] = np.float32(product[t, j]) * (scales[t] * weight_scales[j])
