"""Slalom, for comparison: 8-bit activations under one-time pads in its own 24-bit field, checked over the integers.

Covers: the linear layers of a model, each product: quantise by the row's maximum, add a fresh pad modulo q, lend, take the
pad's product off, check, rescale. Source: Tramer and Boneh, ICLR 2019 (1806.03287), sections 3.1 to 3.3 and its code.
Guarantees: rows that reach the accelerator are uniform modulo q, as strong as AES-256. Numbers are those of the plain W8A8
model bit for bit. A wrong answer is refused: the check is over the integers modulo an unrelated prime (2^31 - 1), so it
catches a lie and a sum that wrapped around q alike, each missed with probability 2^-31 per check.
Assumes: public weights: the accelerator has them (a private linear is computed in the enclave). Its rows are hidden, so it
is not an insecure baseline and asks for no consent.
Edge cases: a sum outside [-q/2, q/2] wraps. Such rows are computed again in the enclave and counted; 8-bit rows of a trained
model do it rarely (never below 325 inputs), but the time it takes is seen by the accelerator, and depends on activations.
Does not cover: a transport. The accelerator is an object of this process: the wire protocol carries another field, and is
not widened for a comparison. Nor is the choice of a bound on activations: the blinded policy has one, and cannot wrap.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int8, Int32

from cloister.arith.team import Team
from cloister.audit.baselines.exposure import ExposedWeight, ExposureObserver
from cloister.audit.baselines.slalom_field import HALF, Q, add, field_product, subtract, uniform_elements
from cloister.audit.baselines.w8a8 import plain_product, quantize_by_maximum, rescale
from cloister.blinding.kernels import dots
from cloister.blinding.linear import LentLinear, Linear
from cloister.blinding.pads import PadSource
from cloister.enclave.outsource import GateCounters
from cloister.errors import VerificationError

NEVER_WRAPS: Final = HALF // (127 * 127)
"""Longest row whose 8-bit product cannot leave the field: 325 inputs."""


@runtime_checkable
class SlalomAccelerator(Protocol):
    """Something that multiplies rows of Slalom's field by public weights; it may answer anything."""

    def register(self, index: int, weight: ExposedWeight) -> None:
        """Makes a public weight available under the index of its linear."""
        ...

    def multiply(self, index: int, rows: Int32[np.ndarray, "tokens d_in"]) -> np.ndarray:
        """Returns the *unverified* product modulo q, centred."""
        ...


class InProcessSlalomAccelerator:
    """The honest accelerator, in this process; an observer may watch it."""

    def __init__(self, team: Team | None = None, observer: ExposureObserver | None = None) -> None:
        self._team = team
        self._observer = observer
        self._weights: dict[int, Int8[np.ndarray, "outputs d_in"]] = {}

    def register(self, index: int, weight: ExposedWeight) -> None:
        """Keeps a weight for products."""
        self._weights[index] = weight.matrix
        if self._observer is not None:
            self._observer.saw_weight(index, weight)

    def multiply(self, index: int, rows: Int32[np.ndarray, "tokens d_in"]) -> Int32[np.ndarray, "tokens outputs"]:
        """Returns the product of blinded rows with weight `index`, modulo q."""
        if self._observer is not None:
            self._observer.saw_rows(index, rows)
        return field_product(self._weights[index], rows, self._team)


class SlalomGate:
    """Computes linear layers as Slalom does. One thread."""

    def __init__(
        self,
        linears: Sequence[Linear],
        accelerator: SlalomAccelerator,
        team: Team | None = None,
        source: PadSource | None = None,
    ) -> None:
        """Registers every weight; `team` works for the enclave, `source` makes the pads (default: a fresh key)."""
        self.linears = tuple(linears)
        self.counters = GateCounters()
        self.wrapped_rows = 0
        """Rows that left the field and were computed again in the enclave."""
        self._accelerator = accelerator
        self._team = team
        self._source = source or PadSource()
        self._pads: list[deque[tuple[np.ndarray, np.ndarray]]] = [deque() for _ in self.linears]
        self._quarantined = False
        for index, linear in enumerate(self.linears):
            if isinstance(linear, LentLinear):
                accelerator.register(index, ExposedWeight(linear.name, linear.matrix, None))

    @property
    def accelerators(self) -> tuple[str, ...]:
        """Names of the accelerators in use."""
        return () if self._quarantined else ("in process (slalom: rows uniform modulo 2^23 + 2^21 + 7)",)

    @property
    def pad_bytes_per_token(self) -> int:
        """Bytes of precomputed pads that one token takes."""
        return sum(linear.pad_bytes for linear in self.linears if isinstance(linear, LentLinear))

    def lends(self, tokens: int) -> bool:
        """Whether a pass over `tokens` rows would be lent: as long as no answer was wrong."""
        return not self._quarantined

    def stock(self, tokens: int) -> None:
        """Makes pads for `tokens` rows of every linear ahead of time: uniform r, and u = r W modulo q."""
        for index, (linear, shelf) in enumerate(zip(self.linears, self._pads, strict=True)):
            if isinstance(linear, LentLinear):
                r, u = self._make_pads(index, tokens)
                shelf.extend((r[t : t + 1], u[t : t + 1]) for t in range(tokens))

    def linear(
        self,
        index: int,
        x: Float32[np.ndarray, "tokens d_in"],
        out: Float32[np.ndarray, "tokens d_out"],
        lend: bool = True,
    ) -> None:
        """Fills `out` with linear `index` of `x` in W8A8, lent under fresh pads and checked if `lend`, else computed here.

        Raises:
            NonFiniteError: `x` holds NaN or infinity; nothing was sent.
            VerificationError: the answer is wrong; the accelerator gets no more work.
        """
        linear, counters = self.linears[index], self.counters
        started = time.perf_counter()
        rows, scales = quantize_by_maximum(linear.name, x)
        if lend and not self._quarantined and isinstance(linear, LentLinear):
            product = self._lent(index, linear, rows, started)
        else:
            product = plain_product(linear, rows, self._team)
            counters.enclave_products += 1
            counters.enclave_seconds += time.perf_counter() - started
        rescale(product, scales, linear, out)

    def _lent(
        self, index: int, linear: LentLinear, rows: Int8[np.ndarray, "tokens d_in"], started: float
    ) -> np.ndarray:
        counters = self.counters
        r, u = self._take_pads(index, rows.shape[0])
        wide = rows.astype(np.int32)
        blinded = add(wide, r)
        lent = time.perf_counter()
        answer = self._accelerator.multiply(index, blinded)
        answered = time.perf_counter()
        self._check_form(answer, u, linear)
        product = subtract(answer, u)
        wrong = self._wrong_rows(wide, product, linear)
        if wrong.size:
            self._compute_wrapped_again(rows, product, wrong, linear)
        counters.products += 1
        counters.rows += rows.shape[0]
        counters.bytes_sent += blinded.nbytes
        counters.bytes_received += answer.nbytes
        counters.blind_seconds += lent - started
        counters.lent_seconds += answered - lent
        counters.recover_seconds += time.perf_counter() - answered
        return product

    def _check_form(self, answer: np.ndarray, u: np.ndarray, linear: LentLinear) -> None:
        if answer.dtype != np.int32 or answer.shape != u.shape or not answer.flags.c_contiguous:
            raise self._refused(linear, f"is {answer.dtype} {answer.shape}, not int32 {u.shape}")
        if int(answer.max(initial=0)) > HALF or int(answer.min(initial=0)) < -HALF:
            raise self._refused(linear, "is not made of elements of the field")

    def _wrong_rows(self, rows: np.ndarray, product: np.ndarray, linear: LentLinear) -> np.ndarray:
        """Returns the rows of which `product . v == rows . (v W)` fails modulo 2^31 - 1: wrong, or wrapped."""
        key = linear.check
        left = np.empty((rows.shape[0], key.left.shape[0]), np.int64)
        right = np.empty_like(left)
        dots(product, key.left, left)
        dots(rows, key.right, right)
        return np.flatnonzero((left != right).any(axis=1))

    def _compute_wrapped_again(
        self, rows: np.ndarray, product: np.ndarray, wrong: np.ndarray, linear: LentLinear
    ) -> None:
        """Puts the true integers in place of rows that wrapped; refuses rows that no wrapping explains."""
        truth = plain_product(linear, np.ascontiguousarray(rows[wrong]), self._team)
        if ((truth.astype(np.int64) - product[wrong]) % Q).any():
            raise self._refused(linear, "is wrong")
        product[wrong] = truth
        self.wrapped_rows += wrong.size

    def _refused(self, linear: LentLinear, why: str) -> VerificationError:
        self._quarantined = True
        return VerificationError(
            f"The accelerator's product for {linear.name} {why}: the check refused it.",
            remedy="It is quarantined: it is faulty or it cheats.",
        )

    def _take_pads(self, index: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns pads that no other product gets: stocked ones as far as they reach, else made now."""
        shelf = self._pads[index]
        if len(shelf) < tokens:
            self.counters.pads_made_late += tokens
            return self._make_pads(index, tokens)
        pieces = [shelf.popleft() for _ in range(tokens)]
        return np.concatenate([r for r, _ in pieces]), np.concatenate([u for _, u in pieces])

    def _make_pads(self, index: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        linear = self.linears[index]
        r = uniform_elements(self._source, tokens, linear.d_in)
        return r, field_product(linear.matrix, r, self._team)


def open_slalom(
    linears: Sequence[Linear],
    team: Team,
    *,
    observer: ExposureObserver | None = None,
    source: PadSource | None = None,
) -> SlalomGate:
    """Returns a gate that runs a model under Slalom, its accelerator in this process and watched by `observer`."""
    return SlalomGate(linears, InProcessSlalomAccelerator(team, observer), team, source)
