"""A request to multiply two blinded matrices, one of which the accelerator keeps between requests.

Covers: its numbers, how they fit each other, and their limits; both sides check them before anything is sent or used.
Does not cover: how it is encoded (`wire.codec`) and what the matrices hide (`blinding.bilinear`).

A kept operand is a stack of blinded rows for each of `heads` heads, `[heads, n, width]`: the keys or the values of one
layer. A request cuts it to its first rows, appends new ones, and multiplies fresh rows by what is kept then, so that every
row crosses once.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from cloister.arith.modulus import MAX_D_IN
from cloister.errors import AcceleratorProtocolError, WireError
from cloister.wire.messages import MAX_ROWS, Blinded

MAX_OPERANDS: Final = 2**16
"""Most operands that an accelerator keeps for one client."""

MAX_HEADS: Final = 1024
"""Most heads of one operand."""

MAX_PAIR_WORDS: Final = 2**24
"""Most elements of each part of a request, and of its answer: 64 MiB."""


class PairShape(NamedTuple):
    """The numbers of a request."""

    heads: int
    width: int
    """Length of a kept row."""
    keep: int
    """Rows of each head that stay, from the first on."""
    append: int
    """Rows of each head that are added after those."""
    start: int
    """The first kept row of each head that is multiplied; the last one is the last that is kept."""
    transposed: bool
    """Whether the product is `left @ kept^T` (rows of `width`) or `left @ kept` (rows as long as what is multiplied)."""
    rows: int
    """Rows of each head to multiply; 0: only append."""

    @property
    def stop(self) -> int:
        """Rows of each head after the request."""
        return self.keep + self.append

    @property
    def d_in(self) -> int:
        """Length of a row to multiply."""
        return self.width if self.transposed else self.stop - self.start

    @property
    def d_out(self) -> int:
        """Length of a row of the answer."""
        return self.stop - self.start if self.transposed else self.width

    @property
    def appended_words(self) -> int:
        """Elements of the rows that are added."""
        return self.heads * self.append * self.width

    @property
    def left_words(self) -> int:
        """Elements of the rows to multiply."""
        return self.heads * self.rows * self.d_in

    @property
    def answer_words(self) -> int:
        """Elements of the answer."""
        return self.heads * self.rows * self.d_out

    def check(self) -> None:
        """Raises `WireError` unless the numbers fit each other and the limits."""
        if min(self) < 0 or not (1 <= self.heads <= MAX_HEADS and 1 <= self.width <= MAX_D_IN):
            raise WireError(f"An operand of {self.heads} heads of width {self.width} exceeds the limits.")
        if self.stop > MAX_D_IN or self.heads * max(self.append, self.rows) > MAX_ROWS:
            raise WireError(
                f"{self.append} + {self.rows} rows of {self.heads} heads after {self.keep} exceed the limits."
            )
        if not (self.append or self.rows) or self.start > self.stop or (self.rows and self.start == self.stop):
            raise WireError(f"A request multiplies {self.rows} rows by rows {self.start} to {self.stop}.")
        if max(self.appended_words, self.left_words, self.answer_words) > MAX_PAIR_WORDS:
            raise WireError(
                f"A product of {self.heads} x {self.rows} rows by {self.stop} x {self.width} is beyond the limits.",
                remedy="Multiply fewer rows at once.",
            )


@dataclass(frozen=True, eq=False)
class PairRequest:
    """A product of two blinded matrices, as an accelerator is asked for it. Rows are laid out head after head.

    Raises:
        WireError: shapes contradict each other or exceed a limit.
    """

    operand: int
    """The client's number for the kept operand; one that is new begins empty."""
    shape: PairShape
    appended: Blinded | None
    """`[heads * append, width]`, or None if nothing is appended."""
    left: Blinded | None
    """`[heads * rows, d_in]`, or None if nothing is multiplied."""

    def __post_init__(self) -> None:
        if not 0 <= self.operand < MAX_OPERANDS:
            raise WireError(f"Operand {self.operand} is outside 0 to {MAX_OPERANDS - 1}.")
        shape = self.shape
        shape.check()
        for rows, count, length in (
            (self.appended, shape.append, shape.width),
            (self.left, shape.rows, shape.d_in),
        ):
            if (None if rows is None else rows.rows.shape) != ((shape.heads * count, length) if count else None):
                raise WireError(f"{rows} is not {shape.heads} x {count} rows of {length}.")


def check_pair_answer(answer: np.ndarray, shape: PairShape) -> None:
    """Raises `AcceleratorProtocolError` unless an *unverified* answer is a contiguous int32 `[heads, rows, d_out]`."""
    expected = (shape.heads, shape.rows, shape.d_out)
    if answer.dtype != np.int32 or answer.shape != expected or not answer.flags.c_contiguous:
        raise AcceleratorProtocolError(
            f"An accelerator answered {answer.dtype} {answer.shape} where int32 {expected} was asked.",
            remedy="It is quarantined; restart it or configure another.",
        )
