"""The enclave's side of the ring: posts orders, rings the doorbell, waits for answers. Trusts no word of the ring.

Covers: which order comes next in the step, skipping what is not needed, and waiting with a limit.
Guarantees: every wait ends within its limit. An answer counts only if the device's counter says exactly what was asked.
Does not cover: wrong numbers, which the check of the gate catches; the caller copies an answer before it checks it.
"""

import time
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cuda.ring import ANSWERED, REQUESTED, ROWS, SLOTS, STATUS, WEIGHT, Answer, Ring, wrapped
from cloister.accelerator.cuda.words import watch_word
from cloister.errors import AcceleratorProtocolError, AcceleratorTimeoutError

LOOKS: Final = 100_000
"""Looks at the answer counter between two looks at the clock and at the worker: about a millisecond."""


class Requests:
    """Posts the products of decode steps, in the order that the device expects."""

    def __init__(self, ring: Ring, nodes: int, name: str, check_alive: Callable[[], None]) -> None:
        """`check_alive` raises if whoever runs the device is gone; it is called about every millisecond of waiting."""
        self._ring = ring
        self._nodes = nodes
        self._name = name
        self._check_alive = check_alive
        self._posted = 0
        self._answered = 0

    def distance(self, node: int) -> int:
        """Returns how many orders would be skipped to get to `node`."""
        return (node - self._posted) % self._nodes

    def multiply(
        self, node: int, rows: Int32[np.ndarray, "rows d_in"], d_out: int, timeout_seconds: float
    ) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the unverified product of `node`, in memory that the device can still write.

        Raises:
            AcceleratorTimeoutError: no answer within `timeout_seconds`.
            AcceleratorProtocolError: the device counted an answer that was not asked, or refused the order.
        """
        deadline = time.monotonic() + timeout_seconds
        for _ in range(self.distance(node)):
            if self._posted - self._answered == SLOTS:
                self._await(self._answered + 1, deadline, timeout_seconds)
            self._post(0)
        if self._posted - self._answered == SLOTS:
            self._await(self._answered + 1, deadline, timeout_seconds)
        turn, ring = self._posted, self._ring
        np.copyto(ring.request(turn, *rows.shape), rows)
        self._post(rows.shape[0])
        self._await(self._posted, deadline, timeout_seconds)
        status = int(ring.words[ring.order(turn) + STATUS])
        if status != Answer.DONE:
            raise AcceleratorProtocolError(f"The worker {self._name} refused order {turn} of its ring ({status}).")
        return ring.answer(turn, rows.shape[0], d_out)

    def _post(self, rows: int) -> None:
        ring, order = self._ring, self._ring.order(self._posted)
        ring.words[order + WEIGHT] = self._posted % self._nodes
        ring.words[order + ROWS] = rows
        ring.words[order + STATUS] = 0
        self._posted += 1
        ring.store(REQUESTED, wrapped(self._posted))

    def _await(self, count: int, deadline: float, timeout_seconds: float) -> None:
        """Waits until at least `count` orders are answered."""
        ring = self._ring
        while self._answered < count:
            seen = wrapped(self._answered)
            if watch_word(ring.address(ANSWERED), np.int32(seen), LOOKS):
                news = (ring.load(ANSWERED) - seen) % 2**32
                if news > self._posted - self._answered:
                    raise AcceleratorProtocolError(
                        f"The worker {self._name} counted an answer to an order that was never posted."
                    )
                self._answered += news
                continue
            self._check_alive()
            if time.monotonic() > deadline:
                raise AcceleratorTimeoutError(
                    f"The worker {self._name} did not answer within {timeout_seconds:g} s.",
                    remedy="Raise accelerator.timeout_seconds if the machine is merely slow.",
                )
