"""Plain 8-bit products, as unprotected int8 serving computes them: what every baseline computes, wherever it runs.

Covers: activations in int8, scaled by each row's maximum; the integer product; its rescaling to float.
Does not cover: secrecy or checks. `PlainGate` computes everything here and exposes nothing; the baselines expose.
"""

import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int8, Int32

from cloister.arith.jit import compiled
from cloister.arith.product import int8_product
from cloister.arith.team import Team
from cloister.blinding.kernels import OK
from cloister.blinding.linear import Linear
from cloister.blinding.pads import non_finite


class PlainGate:
    """Computes linear layers as unprotected int8 serving does, in this process: the baselines' oracle."""

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
        """Fills `out` with the product in W8A8.

        Raises:
            NonFiniteError: a row holds NaN or infinity.
        """
        started = time.perf_counter()
        linear = self.linears[index]
        rows, scales = quantize_by_maximum(linear.name, x)
        rescale(plain_product(linear, rows, self._team), scales, linear, out)
        self.seconds += time.perf_counter() - started


def quantize_by_maximum(
    name: str, x: Float32[np.ndarray, "tokens d_in"]
) -> tuple[Int8[np.ndarray, "tokens d_in"], Float32[np.ndarray, " tokens"]]:
    """Returns `round(127 x / max|x|)` and the scales `max|x| / 127` of the rows; a zero row stays zero.

    Raises:
        NonFiniteError: a row holds NaN or infinity; the error names the layer.
    """
    rows = np.empty(x.shape, np.int8)
    scales = np.empty(x.shape[0], np.float32)
    if (bad := _quantize_by_maximum(x, rows, scales)) != OK:
        raise non_finite(name, bad)
    return rows, scales


def plain_product(
    linear: Linear, rows: Int8[np.ndarray, "tokens d_in"], team: Team | None
) -> Int32[np.ndarray, "tokens outputs"]:
    """Returns the integer product of int8 rows with a linear, computed here."""
    product = np.empty((rows.shape[0], linear.matrix.shape[0]), np.int32)
    int8_product(linear.matrix, rows, product, team)
    return product


def rescale(
    product: Int32[np.ndarray, "tokens outputs"],
    scales: Float32[np.ndarray, " tokens"],
    linear: Linear,
    out: Float32[np.ndarray, "tokens d_out"],
) -> None:
    """Fills `out` with the float product, the bias added, from the integer one."""
    _rescale(product, scales, linear.scales, linear.bias, out)


@compiled
def _quantize_by_maximum(x, quantized, scales):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        peak = np.float32(1e-30)
        wild = False
        for k in range(x.shape[1]):
            peak = max(peak, abs(x[t, k]))
            wild |= not abs(x[t, k]) < np.inf
        if wild:
            return t
        scales[t] = peak / np.float32(127.0)
        inverse = np.float32(127.0) / peak
        for k in range(x.shape[1]):
            quantized[t, k] = np.int8(np.rint(x[t, k] * inverse))
    return OK


@compiled
def _rescale(product, scales, weight_scales, bias, out):  # type: ignore[no-untyped-def]
    d_out = out.shape[1]
    for t in range(out.shape[0]):
        for j in range(d_out):
            out[t, j] = np.float32(product[t, j]) * (scales[t] * weight_scales[0, j])
        for p in range(1, weight_scales.shape[0]):
            for j in range(d_out):
                out[t, j] += np.float32(product[t, p * d_out + j]) * (scales[t] * weight_scales[p, j])
        if bias.shape[0] > 0:
            for j in range(d_out):
                out[t, j] += bias[j]
