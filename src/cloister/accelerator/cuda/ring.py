"""The ring of requests between the enclave and a GPU of the same host: layout and counters, in memory that both map.

    counters      requested | answered | stop                      one int32 per cache line
    orders        per slot: weight, rows, status                   one cache line per slot
    requests      per slot: rows of the largest input
    answers       per slot: rows of the largest output

The enclave writes rows and an order into the next slot, then counts `requested` up: that is the doorbell. The device
serves orders strictly in turn and counts `answered` up. An order for no rows is answered at once. Counters wrap as int32
does.

Covers: where everything lies, and the arithmetic of the counters. Does not cover: trust. Every word of the ring may hold
anything at any time: the enclave counts for itself what it asked, and copies and checks what it reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from jaxtyping import Int32

from cloister.accelerator.cuda.configurations import DECODE_ROWS
from cloister.accelerator.cuda.words import load_word, store_word
from cloister.errors import WireError

LINE: Final = 16
"""Words of a cache line: each counter has one to itself."""

REQUESTED: Final = 0
ANSWERED: Final = LINE
STOP: Final = 2 * LINE
ORDERS: Final = 4 * LINE
"""Word offsets of the counters and of the first order."""

WEIGHT: Final = 0
ROWS: Final = 1
STATUS: Final = 2
"""Words of an order."""

SLOTS: Final = 4
"""Requests in flight; a power of two, so that slots go round when the counters wrap."""

STOPPED: Final = -1
MISMATCH: Final = -2
"""What a device takes for the number of rows when it is told to stop, and when an order is not the one whose turn it is."""


class Answer(IntEnum):
    """What became of an order."""

    DONE = 1
    MISMATCH = 2


@dataclass(frozen=True)
class Layout:
    """Sizes of a ring, in int32 words."""

    request_words: int
    answer_words: int

    @staticmethod
    def of(shapes: Iterable[tuple[int, int]], rows: int = DECODE_ROWS) -> "Layout":
        """Returns the layout for up to `rows` rows of any of the weights, given as (d_out, d_in)."""
        sizes = list(shapes)
        if not sizes:
            raise WireError("A ring needs weights.", remedy="Register them first.")
        return Layout(_lines(rows * max(d_in for _, d_in in sizes)), _lines(rows * max(d_out for d_out, _ in sizes)))

    @property
    def requests(self) -> int:
        """Offset of the first request."""
        return ORDERS + SLOTS * LINE

    @property
    def answers(self) -> int:
        """Offset of the first answer."""
        return self.requests + SLOTS * self.request_words

    @property
    def words(self) -> int:
        """Size of the whole ring."""
        return self.answers + SLOTS * self.answer_words


class Ring:
    """A ring in memory that someone else provides."""

    def __init__(self, words: Int32[np.ndarray, " n"], layout: Layout) -> None:
        """Takes the first words of `words`.

        Raises:
            WireError: there are too few, or they are not contiguous.
        """
        if words.size < layout.words or not words.flags.c_contiguous:
            raise WireError(f"A ring of {layout.words} words does not fit in {words.size}.")
        self.words = words
        self.layout = layout
        self._address = int(words.ctypes.data)

    def address(self, offset: int) -> int:
        """Returns where a word lies in this process."""
        return self._address + 4 * offset

    def load(self, offset: int) -> int:
        """Returns a word, and sees everything written before it."""
        return int(load_word(self.address(offset)))

    def store(self, offset: int, value: int) -> None:
        """Writes a word after everything that was written before."""
        store_word(self.address(offset), np.int32(value))

    def order(self, turn: int) -> int:
        """Returns the offset of the order of a turn."""
        return ORDERS + LINE * (turn & (SLOTS - 1))

    def request(self, turn: int, rows: int, d_in: int) -> Int32[np.ndarray, "rows d_in"]:
        """Returns the rows of a turn's request."""
        start = self.layout.requests + self.layout.request_words * (turn & (SLOTS - 1))
        return self.words[start : start + rows * d_in].reshape(rows, d_in)

    def answer(self, turn: int, rows: int, d_out: int) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the rows of a turn's answer."""
        start = self.layout.answers + self.layout.answer_words * (turn & (SLOTS - 1))
        return self.words[start : start + rows * d_out].reshape(rows, d_out)


def wrapped(count: int) -> int:
    """Returns a count as the int32 that stands for it."""
    return (count + 2**31) % 2**32 - 2**31


def _lines(words: int) -> int:
    return -(-words // LINE) * LINE
