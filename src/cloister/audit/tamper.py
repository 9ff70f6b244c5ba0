"""The cheating accelerator: answers wrongly, in every way that has a name.

Every strategy changes the answer in fact (up to a chance of about 2^-31 where it draws numbers), so that each one must be caught.
"""

import time
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.api import Accelerator
from cloister.arith.modulus import HALF, P
from cloister.audit.observer import pairs_of
from cloister.blinding.field import centre
from cloister.errors import AcceleratorLostError, AcceleratorTimeoutError, SettingsError
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.pairs import PairRequest

Product = Int32[np.ndarray, "rows d_out"]
Strategy = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _off_by_one(product: np.ndarray, random: np.random.Generator) -> np.ndarray:
    row, column = random.integers(product.shape[0]), random.integers(product.shape[1])
    product[row, column] = centre(product[row, column].astype(np.int64).reshape(1) + 1)[0]
    return product


def _one_random(product: np.ndarray, random: np.random.Generator) -> np.ndarray:
    row, column = random.integers(product.shape[0]), random.integers(product.shape[1])
    changed = int(random.integers(1, HALF))
    product[row, column] = centre(product[row, column].astype(np.int64).reshape(1) + changed)[0]
    return product


def _row_random(product: np.ndarray, random: np.random.Generator) -> np.ndarray:
    product[random.integers(product.shape[0])] = random.integers(-HALF, HALF + 1, product.shape[1])
    return product


def _all_random(product: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return random.integers(-HALF, HALF + 1, product.shape, dtype=np.int32)


def _rows_swapped(product: np.ndarray, _random: np.random.Generator) -> np.ndarray:
    if product.shape[0] == 1:  # there is no other row: its outputs change places
        return np.ascontiguousarray(product[:, ::-1])
    return np.ascontiguousarray(np.roll(product, 1, axis=0))


def _outputs_swapped(product: np.ndarray, _random: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(np.roll(product, 1, axis=1))


def _zeros(product: np.ndarray, _random: np.random.Generator) -> np.ndarray:
    return np.zeros_like(product)


def _not_canonical(product: np.ndarray, _random: np.random.Generator) -> np.ndarray:
    product[0, 0] = -(2**31)
    return product


def _off_by_modulus(product: np.ndarray, random: np.random.Generator) -> np.ndarray:
    # The right residue in a form that no honest accelerator sends: an answer has one form, or it carries a message.
    row, column = random.integers(product.shape[0]), random.integers(product.shape[1])
    value = int(product[row, column])
    product[row, column] = value - P if value > 0 else value + P
    return product


def _short(product: np.ndarray, _random: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(product[:, :-1])


def _floats(product: np.ndarray, _random: np.random.Generator) -> np.ndarray:
    return np.full(product.shape, np.nan, np.float32)


STRATEGIES: Final[dict[str, Strategy]] = {
    "one element off by one": _off_by_one,
    "one element random": _one_random,
    "one row random": _row_random,
    "everything random": _all_random,
    "rows swapped": _rows_swapped,
    "outputs swapped": _outputs_swapped,
    "zeros": _zeros,
    "not canonical": _not_canonical,
    "off by the modulus": _off_by_modulus,
    "short": _short,
    "floats": _floats,
}
"""Wrong answers made from the right one."""

OTHERS: Final = ("honest", "late", "lost", "stale")
"""Strategies that concern the exchange: nothing wrong, too late, no answer, the previous answer."""


class Tamper:
    """Wraps any accelerator and spoils one answer (`at_call`, counted from 1) or, with 0, every answer."""

    def __init__(
        self, inner: Accelerator, strategy: str, *, at_call: int = 0, late_seconds: float = 0.0, seed: int = 0
    ) -> None:
        """`strategy` is a key of `STRATEGIES` or one of `OTHERS`. The spoiled answer comes after `late_seconds` more.

        Raises:
            SettingsError: no strategy has that name.
        """
        if strategy not in STRATEGIES and strategy not in OTHERS:
            raise SettingsError(
                f"No way to cheat is called {strategy!r}.", remedy=f"Known: {', '.join([*STRATEGIES, *OTHERS])}."
            )
        self._inner = inner
        self._strategy = strategy
        self._at_call = at_call
        self._late = late_seconds
        self._random = np.random.default_rng(seed)
        self._previous: np.ndarray | None = None
        self.calls = 0

    @property
    def name(self) -> str:
        """The name of what is tampered with."""
        return self._inner.name

    def register(self, weight: PublicWeight) -> None:
        """Passes a public weight on."""
        self._inner.register(weight)

    def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> np.ndarray:
        """Returns the answer, spoiled when its turn has come.

        Raises:
            AcceleratorTimeoutError: it is late, and its lateness reaches the timeout.
            AcceleratorLostError: its strategy is to be lost.
        """
        return self._spoiled(np.array(self._inner.multiply(weight_id, blinded, timeout_seconds)), timeout_seconds)

    def multiply_pair(self, request: PairRequest, timeout_seconds: float) -> np.ndarray:
        """Returns the product of two blinded matrices, spoiled when its turn has come; errors as for `multiply`."""
        answer = np.array(pairs_of(self._inner).multiply_pair(request, timeout_seconds))
        if not answer.size:  # nothing but rows to keep: not an answer that could be wrong
            return answer
        flat = self._spoiled(answer.reshape(-1, answer.shape[2]), timeout_seconds)
        return flat.reshape(*answer.shape[:2], -1) if flat.size % (answer.shape[0] * answer.shape[1]) == 0 else flat

    def release(self, operand: int, timeout_seconds: float) -> None:
        """Passes on what is to be forgotten."""
        pairs_of(self._inner).release(operand, timeout_seconds)

    def _spoiled(self, product: np.ndarray, timeout_seconds: float) -> np.ndarray:
        self.calls += 1
        previous, self._previous = self._previous, product.copy()
        if self._at_call not in (0, self.calls):
            return product
        self._delay(timeout_seconds)
        if self._strategy == "lost":
            raise AcceleratorLostError(f"The accelerator {self.name} is gone.")
        if self._strategy == "stale":
            return previous if previous is not None else np.zeros_like(product)
        if self._strategy in STRATEGIES:
            return STRATEGIES[self._strategy](product, self._random)
        return product

    def _delay(self, timeout_seconds: float) -> None:
        late = self._late or (timeout_seconds if self._strategy == "late" else 0.0)
        time.sleep(min(late, timeout_seconds))
        if late >= timeout_seconds:
            raise AcceleratorTimeoutError(f"The accelerator {self.name} did not answer within {timeout_seconds:g} s.")

    def close(self) -> None:
        """Closes what is tampered with."""
        self._inner.close()
