"""The interface of an accelerator: register public weights by hash, multiply blinded rows by one of them; and, for those
that can, multiply two blinded matrices.

Covers: the whole vocabulary between the enclave and an accelerator. Does not cover: trust. Whatever implements this
may be malicious: it may read, keep and answer anything. The enclave checks every product (`enclave.outsource`).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from cloister.wire.exchange import Line
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest


@runtime_checkable
class Accelerator(Protocol):
    """Something that multiplies blinded rows by public weights. One request at a time."""

    @property
    def name(self) -> str:
        """A short label for messages, e.g. `worker-0 (cpu: vnni)`."""
        ...

    def register(self, weight: PublicWeight) -> None:
        """Makes `weight` available for products under its `weight_id`; registering twice is harmless.

        Raises:
            AcceleratorError: it cannot be reached, refuses, or runs out of memory.
        """
        ...

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the *unverified* product of `blinded` and the weight, modulo P, centred.

        The array may be memory that the accelerator can still write: copy it before checking it.

        Raises:
            AcceleratorTimeoutError: no answer within `timeout_seconds`.
            AcceleratorLostError: the process or connection is gone.
            AcceleratorProtocolError: the answer is not the answer to this request.
        """
        ...

    def close(self) -> None:
        """Frees what the accelerator holds; harmless when already closed."""
        ...


@runtime_checkable
class PairAccelerator(Accelerator, Protocol):
    """An accelerator that also multiplies two blinded matrices, one of which it keeps between requests."""

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> Int32[np.ndarray, "heads rows d_out"]:
        """Keeps the rows that `request` appends, then returns its *unverified* product modulo P, centred.

        The array may be memory that the accelerator can still write: copy it before checking it.

        Raises:
            AcceleratorTimeoutError: no answer within `timeout_seconds`.
            AcceleratorLostError: the process or connection is gone.
            AcceleratorProtocolError: it refuses (an operand is unknown or too large), or answers another request.
        """
        ...

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Forgets a kept operand; harmless if there is none of that number.

        Raises:
            AcceleratorError: as for `multiply_pair`.
        """
        ...


@runtime_checkable
class LineAccelerator(Accelerator, Protocol):
    """An accelerator that compiled code can lend single rows to, without calling it for each."""

    def line(self, weights: Sequence[PublicWeight], timeout_seconds: float) -> Line:
        """Returns a line to lend one row for each of `weights`, in turn; it ends when anything else is asked of this.

        Raises:
            AcceleratorError: it is closed, or a weight is not registered.
        """
        ...

    def settle(self, line: Line, index: int, outcome: int) -> None:
        """Raises the error behind the `outcome` of an exchange on a line; returns if a signal interrupted it, no more.

        Raises:
            AcceleratorError: as for `multiply`.
        """
        ...
