"""One-time pads: where they come from, how one hides a row, and how the answer is recovered.

Covers: steps "pad", "blind", "verify" and "unblind" of the protocol's table for one product.
Guarantees: what a `Pad` makes is uniform in the field and independent of what it hides, as strong as AES-256 in counter
mode under keys from the operating system. A pad is spent before its first byte can be sent, and blinding with it again
raises. A wrong answer raises and recovers nothing. The key of the pads rests in secret memory, and every draw replaces it by one
that does not lead back: whoever takes it later learns no earlier pad (D. J. Bernstein, "Fast-key-erasure random-number
generators", 2017). Pads themselves are bulk, and lie in ordinary memory until they are spent, as what they hide does.
Assumes: the enclave's memory is private, and the process is not forked (a fork would share the pad stream: refused).
Edge cases: a zero row is blinded like any other; NaN or infinity is an error that names the layer.
Does not cover: shapes and timing, which the accelerator sees.
"""

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from jaxtyping import Float32, Float64, Int32, Int64

from cloister.arith.modulus import HALF
from cloister.blinding.kernels import OK, blind, field_elements, open_product
from cloister.errors import BlindingError, NonFiniteError, PadReuseError, VerificationError
from cloister.isolation.secret_memory import Secret
from cloister.wire.messages import _MAKER, Blinded

if TYPE_CHECKING:
    from cloister.blinding.linear import LentLinear

_KEY_BYTES: Final = 32
_NOT_AN_ELEMENT: Final = HALF + 1
_AHEAD: Final = 2**14
"""Elements drawn at once for small requests."""

_ZEROS: Final = memoryview(bytes(2**20))
"""What is encrypted to get the bare key stream, a mebibyte at a time."""


class PadSource:
    """Uniform field elements from AES-256-CTR, under a key of the operating system's randomness that every draw replaces."""

    def __init__(self, key: bytes | None = None) -> None:
        """Draws a fresh key; `key` (32 bytes) is for tests that need the same stream twice."""
        self._key = Secret.random(_KEY_BYTES) if key is None else Secret.hold(bytearray(key))
        self._ahead = np.empty(0, np.uint32)
        """Elements drawn for the next small requests: a new key costs as much as a thousand of them."""
        self._owner = os.getpid()
        self._turn = threading.Lock()  # whoever draws at the same time waits: no two pads may share the stream

    def elements(self, rows: int, columns: int) -> Int32[np.ndarray, "rows columns"]:
        """Returns fresh uniform centred elements, by rejection: 31 random bits, redrawn when they equal P."""
        elements = np.empty((rows, columns), np.int32)
        self.fill(elements)
        return elements

    def fill(self, elements: Int32[np.ndarray, "rows columns"]) -> None:
        """Overwrites a contiguous array with fresh uniform centred elements, as `elements` returns them."""
        if os.getpid() != self._owner:
            raise BlindingError(
                "This process was forked from the one that owns the pad stream.",
                remedy="Start a new process instead: two processes must never share pads.",
            )
        words = elements.reshape(-1).view(np.uint32)
        with self._turn:
            if words.size > _AHEAD // 4:
                self._draw(words)
                return
            if words.size > self._ahead.size:
                drawn = np.empty(_AHEAD, np.uint32)
                self._draw(drawn)
                self._ahead = drawn  # only now: what an interrupted draw leaves is no pad
            words[:] = self._ahead[: words.size]
            self._ahead[: words.size] = 0
            self._ahead = self._ahead[words.size :]

    def _draw(self, words: np.ndarray) -> None:
        stream = self._stream()
        _random(stream, words)
        if field_elements(words):
            _redraw(stream, words)

    def _stream(self) -> CipherContext:
        """Returns the stream of one draw; its first bytes are the key of the next."""
        with self._key.bytes() as key:
            stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
            stream.update_into(_ZEROS[:_KEY_BYTES], key)
            self._key.replace(key)
        return stream


def _random(stream: CipherContext, words: np.ndarray) -> None:
    target = words.data.cast("B")
    for start in range(0, len(target), len(_ZEROS)):
        piece = target[start : start + len(_ZEROS)]
        stream.update_into(_ZEROS[: len(piece)], piece)


def _redraw(stream: CipherContext, words: np.ndarray) -> None:
    for index in np.flatnonzero(words == _NOT_AN_ELEMENT):
        fresh = words[index : index + 1]
        _random(stream, fresh)
        while field_elements(fresh):
            _random(stream, fresh)


class Pad:
    """A one-time pad for some rows of one linear: `r`, uniform, and `u = r W`. Use it once."""

    __slots__ = ("_linear", "_r", "_spent", "_u")

    def __init__(
        self,
        linear: "LentLinear",
        r: Int32[np.ndarray, "tokens d_in"],
        u: Int32[np.ndarray, "tokens outputs"],
    ) -> None:
        self._linear = linear
        self._r = r
        self._u = u
        self._spent = False

    def __repr__(self) -> str:
        return f"Pad({self._linear.name}, {'spent' if self._spent else 'unused'})"

    def blind(self, x: Float32[np.ndarray, "tokens d_in"]) -> "tuple[Blinded, Opening]":
        """Returns the blinded rows of `x` and what recovers their product; the pad is spent, whatever happens next.

        Raises:
            PadReuseError: this pad was used before.
            NonFiniteError: a row holds NaN or infinity.
        """
        if self._spent:
            raise PadReuseError(
                f"A pad of {self._linear.name} was about to be used twice.",
                remedy="Draw a new pad for every attempt; a retry never reuses one.",
            )
        self._spent = True
        linear, r = self._linear, self._r
        if x.shape != r.shape:
            raise BlindingError(f"A pad of {linear.name} is for rows of shape {r.shape}, not {x.shape}.")
        tokens = x.shape[0]
        rows = np.empty(r.shape, np.int32)
        scales = np.empty(tokens, np.float64)
        expected = np.empty((tokens, linear.check.right.shape[0]), np.int64)
        bad = blind(x, linear.reach.value, r, linear.check.right, rows, scales, expected)
        if bad != OK:
            r.fill(0)
            raise non_finite(linear.name, bad)
        return Blinded(rows, _MAKER), Opening(linear, self._u, scales, expected)


@dataclass(slots=True)
class Opening:
    """What the enclave keeps of one lent product: enough to check the answer and take the pad off, once."""

    linear: "LentLinear" = field(repr=False)
    _u: Int32[np.ndarray, "tokens outputs"] | None = field(repr=False)
    _scales: Float64[np.ndarray, " tokens"] = field(repr=False)
    _expected: Int64[np.ndarray, "tokens checks"] = field(repr=False)

    def recover(
        self, unverified: Int32[np.ndarray, "tokens outputs"], out: Float32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with the float product if `unverified` (a private copy of the answer) is right.

        Raises:
            VerificationError: the answer is wrong or not canonical; `out` is all zeros.
            PadReuseError: this opening was used before.
        """
        linear, u = self.linear, self._u
        if u is None:
            raise PadReuseError(f"A product of {linear.name} was about to be opened twice.")
        self._u = None
        if unverified.shape != u.shape or unverified.dtype != np.int32:
            raise VerificationError(f"An answer for {linear.name} has shape {unverified.shape}, not {u.shape}.")
        bad = open_product(
            unverified, u, linear.check.left, self._expected, self._scales, linear.scales, linear.bias, out
        )
        if bad != OK:
            u.fill(0)
            raise wrong_product(linear.name, bad)


class RowPads:
    """One-time pads of one row for each of some linears, for compiled code that lends them in turn. Use them once."""

    __slots__ = ("_addresses", "_rows", "_spent")

    def __init__(self, rows: "list[tuple[np.ndarray, np.ndarray, int, int, int]]") -> None:
        """`rows`: for each linear the arrays of `r` and `u`, which row of them, and the addresses of that row."""
        self._rows = rows  # keeps the memory
        self._addresses = np.array([(r, u) for _, _, _, r, u in rows], np.int64)
        self._spent = False

    def spend(self) -> "Int64[np.ndarray, 'linears 2']":
        """Returns the addresses of each `r` and `u`; the pads are spent, whatever happens next. Keep this object until then.

        Raises:
            PadReuseError: they were used before.
        """
        if self._spent:
            raise PadReuseError("Pads of a token were about to be used twice.", remedy="Take new ones for every pass.")
        self._spent = True
        return self._addresses

    def clear(self) -> None:
        """Zeroes what is left of the pads after a pass that failed."""
        self._spent = True
        for r, u, row, _, _ in self._rows:
            r[row] = 0
            u[row] = 0


def wrong_product(name: str, row: int) -> VerificationError:
    """Returns the error for an answer that did not pass the check, naming the layer."""
    return VerificationError(
        f"The accelerator's product for {name} is wrong (row {row}): the check refused it.",
        remedy="It is quarantined: it is faulty or it cheats.",
    )


def non_finite(name: str, row: int) -> NonFiniteError:
    """Returns the error for a row that cannot be quantised, naming the layer."""
    return NonFiniteError(
        f"Row {row} of the input of {name} holds NaN or infinity.",
        remedy="The checkpoint is damaged or the activations overflowed: check it with the float32 model.",
    )
