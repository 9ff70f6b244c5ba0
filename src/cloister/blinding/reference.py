"""The slow, obvious twins of `blinding.kernels`, in NumPy and Python integers, written from the protocol's table."""

import numpy as np
from jaxtyping import Float32, Float64, Int32

from cloister.arith.modulus import HALF
from cloister.blinding import field
from cloister.errors import VerificationError


def sum_of_squares(x: Float32[np.ndarray, "tokens d_in"]) -> Float64[np.ndarray, " tokens"]:
    """Returns each row's sum of squares in float64, added in eight lanes one after the other."""
    wide = x.astype(np.float64)
    whole = x.shape[1] - x.shape[1] % 8
    lanes = np.zeros((x.shape[0], 8))
    for k in range(0, whole, 8):
        lanes += wide[:, k : k + 8] ** 2
    a, b, c, d, e, f, g, h = lanes.T
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for k in range(whole, x.shape[1]):
        total = total + wide[:, k] ** 2
    return total


def quantize(
    x: Float32[np.ndarray, "tokens d_in"], reach: float
) -> tuple[Int32[np.ndarray, "tokens d_in"], Float64[np.ndarray, " tokens"]]:
    """Returns `x_q` and the row scales with `x ~= x_q * scale`.

    Edge cases: a zero row stays zero with scale 0; denormal and huge rows are scaled like any other, in float64.
    """
    norm = np.sqrt(sum_of_squares(x))
    inverse = np.divide(reach, norm, out=np.zeros_like(norm), where=norm > 0)
    return np.rint(x.astype(np.float64) * inverse[:, None]).astype(np.int32), norm / reach


def blind(
    x: Float32[np.ndarray, "tokens d_in"], reach: float, pad: Int32[np.ndarray, "tokens d_in"]
) -> tuple[Int32[np.ndarray, "tokens d_in"], Float64[np.ndarray, " tokens"]]:
    """Returns `round(x / s) + pad` modulo P, centred, and the scales s."""
    quantized, scales = quantize(x, reach)
    return field.centre(quantized.astype(np.int64) + pad), scales


def verify(
    blinded: Int32[np.ndarray, "tokens d_in"],
    product: Int32[np.ndarray, "tokens d_out"],
    left: Int32[np.ndarray, "checks d_out"],
    right: Int32[np.ndarray, "checks d_in"],
) -> None:
    """Raises `VerificationError` unless every row satisfies `product . left == blinded . right` modulo P."""
    for row, answer in zip(blinded, product, strict=True):
        if np.abs(answer.astype(np.int64)).max() > HALF:
            raise VerificationError("An answer is not canonical.")
        for key, expected in zip(left, right, strict=True):
            if field.dot(answer, key) != field.dot(row, expected):
                raise VerificationError("An answer is wrong.")


def unblind(
    product: Int32[np.ndarray, "tokens outputs"],
    pad_product: Int32[np.ndarray, "tokens outputs"],
    scales: Float64[np.ndarray, " tokens"],
    weight_scales: Float32[np.ndarray, "planes d_out"],
) -> Float32[np.ndarray, "tokens d_out"]:
    """Returns `centre(product - pad_product) * s_x * s_w`, summed over the planes."""
    opened = field.centre(product.astype(np.int64) - pad_product)
    planes, d_out = weight_scales.shape
    total = np.zeros((product.shape[0], d_out), np.float32)
    for plane in range(planes):
        part = opened[:, plane * d_out : (plane + 1) * d_out]
        total = (total + part * (scales[:, None] * weight_scales[plane].astype(np.float64))).astype(np.float32)
    return total
