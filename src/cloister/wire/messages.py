"""The types that may cross the boundary between the enclave and an accelerator.

Covers: the two things an accelerator is ever given (a public weight and blinded rows) and the one it returns.
Does not cover: how they are encoded (`wire.codec`), how rows are blinded (`blinding.pads`, `blinding.bilinear`), or what a
request for a product of two blinded matrices says (`wire.pairs`).

`Blinded` is the gate of the whole product: an accelerator accepts nothing else, and only `blinding.pads` and
`blinding.bilinear` (which blind) and the codec (which decodes, on the accelerator's side) can make one. Compiled code has no
such type: `enclave.crossing` alone writes rows to a `wire.exchange.Line`, those that its kernel has just blinded.
"""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from jaxtyping import Int8, Int32

from cloister.arith.modulus import MAX_D_IN
from cloister.errors import AcceleratorProtocolError, WireError

if TYPE_CHECKING:
    from cloister.wire.sealed_memory import SealedMatrix

MAX_ROWS: Final = 4096
"""Most rows in one product; longer prompts are sent in pieces."""

MAX_D_OUT: Final = 2**20
"""Most output columns of one weight (the largest vocabularies are about 2^18)."""

_MAKER: Final = object()
"""Held by `blinding.pads`, `blinding.bilinear` and `wire.codec` alone; a test reads every import to keep it so."""


class Blinded:
    """Rows that an accelerator may see: each element uniform in the field, independent of what it hides.

    Shape: int32 `[tokens, d_in]`, C-contiguous, centred elements.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Int32[np.ndarray, "tokens d_in"], maker: object) -> None:
        if maker is not _MAKER:
            raise WireError(
                "Only blinding and the codec can make Blinded rows.",
                remedy="Blind the rows with a pad from the pantry.",
            )
        if rows.ndim != 2 or rows.dtype != np.int32 or not rows.flags.c_contiguous:
            raise WireError(f"Blinded rows must be contiguous int32 [tokens, d_in], not {rows.dtype} {rows.shape}.")
        if not (1 <= rows.shape[0] <= MAX_ROWS and 1 <= rows.shape[1] <= MAX_D_IN):
            raise WireError(f"Blinded rows of shape {rows.shape} exceed the limits {MAX_ROWS} x {MAX_D_IN}.")
        self.rows = rows

    def __repr__(self) -> str:
        return f"Blinded(tokens={self.rows.shape[0]}, d_in={self.rows.shape[1]})"


@dataclass(frozen=True)
class PublicWeight:
    """A quantised weight that everyone may know: int8 `[d_out, d_in]`, values in [-127, 127].

    `weight_id` is the SHA-256 of its shape and bytes: both sides name it by what it is.
    """

    matrix: Int8[np.ndarray, "d_out d_in"] = field(repr=False)
    weight_id: bytes
    backing: "SealedMatrix | None" = field(default=None, repr=False, compare=False)
    """The sealed memory that `matrix` lies in, if a worker of this host can map it as it is."""

    @staticmethod
    def of(matrix: Int8[np.ndarray, "d_out d_in"]) -> "PublicWeight":
        """Returns the weight with its identity computed; refuses shapes and values outside the limits."""
        check_weight(matrix)
        return PublicWeight(matrix, weight_hash(matrix))

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.matrix.shape[0], self.matrix.shape[1]


def weight_hash(matrix: Int8[np.ndarray, "d_out d_in"]) -> bytes:
    """Returns the 32-byte identity of a quantised weight: SHA-256 over a tag, its shape and its bytes."""
    digest = hashlib.sha256(b"cloister/weight/1")
    digest.update(matrix.shape[0].to_bytes(8, "little") + matrix.shape[1].to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(matrix).data)
    return digest.digest()


def check_weight(matrix: np.ndarray) -> None:
    """Raises `WireError` unless `matrix` is a contiguous int8 `[d_out, d_in]` inside the limits, without -128."""
    if matrix.ndim != 2 or matrix.dtype != np.int8 or not matrix.flags.c_contiguous:
        raise WireError(f"A weight must be contiguous int8 [d_out, d_in], not {matrix.dtype} {matrix.shape}.")
    if not (1 <= matrix.shape[0] <= MAX_D_OUT and 1 <= matrix.shape[1] <= MAX_D_IN):
        raise WireError(
            f"A weight of shape {matrix.shape} exceeds the limits {MAX_D_OUT} x {MAX_D_IN}.",
            remedy="Split its input dimension into pieces that fit.",
        )
    if int(matrix.min()) < -127:
        raise WireError("A quantised weight holds -128.", remedy="Quantise symmetrically to [-127, 127].")


def check_product(product: np.ndarray, rows: int, d_out: int) -> None:
    """Raises `AcceleratorProtocolError` unless an *unverified* answer is a contiguous int32 `[rows, d_out]`."""
    if product.dtype != np.int32 or product.shape != (rows, d_out) or not product.flags.c_contiguous:
        raise AcceleratorProtocolError(
            f"An accelerator answered {product.dtype} {product.shape} where int32 {(rows, d_out)} was asked.",
            remedy="It is quarantined; restart it or configure another.",
        )
