"""A product of two secrets, lent: both operands under one-time pads, the answer checked, the pads taken off exactly.

Covers: `X Y` where an accelerator keeps Y, row by row as it grows (the keys or the values of an attention layer), and X is
new each time. It is given `X + R` and `Y + S`, both uniform in the field, and returns their product. Then
`X Y = (X + R)(Y + S) - (X + R) S - R Y`: the enclave computes two products of the same size to remove what the pads added.
This is why the whole affair costs more than computing `X Y` here (docs/masked_attention.md); it is built to be measured.

Guarantees: every element that leaves is uniform and independent of what it hides and of all others, as strong as AES-256
(see `blinding.pads`). A pad of X serves one attempt. A pad of a row of Y is drawn when the row is kept and hides that value
alone: sending the row again, to another accelerator, sends the same bytes. What was cut off is zeroed; rows that take its
place get new pads. No product can wrap, so the integers are exact and the result is right within `dots_error` or
`sums_error`. A wrong answer raises before anything of it is used.
Assumes: private memory, and one thread at a time for each operand.
Edge cases: zero rows are blinded like any other; NaN or infinity is an error that names the operand.
Does not cover: shapes and timing, which show the length of the context; permuted, scaled or otherwise correlated masks,
which are broken in the literature and have no place here.

The check is Freivalds', on the whole product: `answer . v == (X + R) . ((Y + S) v)` for every row, with a secret `v` of which
one element is drawn for each kept row (or, for `X Y`, each column), and the right-hand vector grown with Y. A wrong row
passes with probability 1/P for each check.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Float64, Int16, Int32

from cloister.arith.team import Team
from cloister.blinding.bilinear_kernels import (
    LENGTH,
    PEAK,
    SUM,
    add_check_rows,
    blind_kept,
    blind_left,
    check_columns,
    keep_rows,
    open_dots,
    open_sums,
)
from cloister.blinding.kernels import OK
from cloister.blinding.pads import PadSource
from cloister.blinding.quantize import LIMIT
from cloister.errors import BlindingError, NonFiniteError, PadReuseError, VerificationError
from cloister.wire.messages import _MAKER, Blinded
from cloister.wire.pairs import PairRequest, PairShape, check_pair_answer

VALUE_LEVELS: Final = 2**11
"""Largest absolute value of a quantised element of the values; what is left of the field goes to their weights."""

FIRST_ROWS: Final = 64
"""Rows of each head that a new operand has room for; it doubles when it is full."""

TEAM_WORK: Final = 2**19
"""Multiplications below which a loop stays on one thread: waking another takes as long."""

_INT16_MAX: Final = 2**15 - 1


def dots_reach(width: int) -> float:
    """Returns how long a quantised row may be on either side of a dot product: no sum can leave the field.

    By Cauchy-Schwarz `|x . y| <= |x| |y|`; rounding adds at most `sqrt(width) / 2` to a length.
    """
    return min(math.sqrt(LIMIT) - math.sqrt(width) / 2, _INT16_MAX - 0.5)


def dots_error(width: int) -> float:
    """Returns the largest error of a recovered dot product, as a share of the product of the two lengths.

    Each side is off by at most half a step in each element: `sqrt(width) / 2` steps of `length / reach`.
    """
    reach = dots_reach(width)
    return (math.sqrt(width) * reach + width / 4) / reach**2


def sums_reach(count: int) -> float:
    """Returns how large the sum of absolute quantised weights of `count` kept values may be: no sum can leave the field."""
    return LIMIT / VALUE_LEVELS - count / 2


def sums_error(count: int) -> float:
    """Returns the largest error of a recovered weighted sum, as a share of `sum_j |weight_j| max|value_j|`.

    A value is off by at most half of 1/2048 of its row's peak, and a weight by half a step, of which there are `sums_reach`.
    """
    return (0.5 + count * VALUE_LEVELS / (2 * sums_reach(count))) / VALUE_LEVELS


def attention_error(score: float, width: int, count: int) -> float:
    """Returns the largest error of attention over `count` rows, as a share of their largest element.

    `score`: the largest `|q| |k| / sqrt(width)`. Scores are off by at most `dots_error` of it, so softmax weights are by at most
    a factor `e^(2 x)`; the rest is `sums_error`. The rounding of float32 itself comes on top.
    """
    factor = math.exp(2 * dots_error(width) * score)
    return factor - 1 + factor * sums_error(count)


@dataclass(slots=True)
class BlindedPair:
    """One lent product: what to send and, privately, what checks the answer and takes the pads off, once."""

    left: Blinded
    appended: Blinded | None
    shape: PairShape
    _name: str = field(repr=False)
    _transposed: bool = field(repr=False)
    _sent: tuple[Any, Any, Any] | None = field(repr=False)
    _kept: tuple[Any, Any, Any] = field(repr=False)
    _keys: tuple[Any, Any] = field(repr=False)

    def request(self, operand: int) -> PairRequest:
        """Returns what an accelerator is asked that keeps the rows under the number `operand`."""
        return PairRequest(operand, self.shape, self.appended, self.left)

    def recover(
        self,
        unverified: Int32[np.ndarray, "heads rows d_out"],
        out: Float32[np.ndarray, "heads rows d_out"],
        spans: Int32[np.ndarray, "2 rows"] | None = None,
        team: Team | None = None,
    ) -> None:
        """Fills `out` with the float product if `unverified` (a private copy of the answer) is right.

        `spans` (for dot products): the first column of each row that is wanted, and the one after the last. Other columns
        of `out` keep what they hold; without spans all are wanted.

        Raises:
            VerificationError: the answer is wrong or not canonical; `out` is all zeros.
            PadReuseError: this product was recovered before.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            raise PadReuseError(f"A product of {self._name} was about to be opened twice.")
        shape = self.shape
        wanted = np.zeros((3, shape.rows), np.int32)
        wanted[0], wanted[2] = shape.start, shape.d_out
        if spans is not None:
            wanted[1:] = spans
        kernel = open_dots if self._transposed else open_sums
        try:
            check_pair_answer(unverified, shape)
            bad = _split(
                lambda start, stop: kernel(unverified, sent, self._kept, self._keys, wanted, out, start, stop),
                shape.heads * shape.rows,
                shape.heads * shape.rows * shape.d_in * shape.d_out,
                team,
            )
        finally:
            sent[1].fill(0)
        if bad != OK:
            out.fill(0.0)
            raise VerificationError(
                f"The accelerator's product for {self._name} is wrong (row {bad}): the check refused it.",
                remedy="It is quarantined: it is faulty or it cheats.",
            )


class KeptRows:
    """The rows of one operand that accelerators keep: quantised, with their scales, pads and check. See the two makers."""

    def __init__(self, name: str, heads: int, width: int, transposed: bool, checks: int, source: PadSource) -> None:
        """Use `kept_keys` or `kept_values`."""
        self.name, self.heads, self.width, self.rows = name, heads, width, 0
        self.transposed, self._source = transposed, source
        # Columns side by side for dot products, rows for sums: the order in which the pads are taken off.
        shape = (heads, width, 0) if transposed else (heads, 0, width)
        self._stored = np.zeros(shape, np.int16), np.zeros(shape, np.int32)
        self._scales: Float64[np.ndarray, "heads capacity"] = np.zeros((heads, 0), np.float64)
        # For dot products an element of v belongs to a row, and (Y + S) v is one vector; for sums it is the other way round.
        if transposed:
            self._keys = np.zeros((checks, 0), np.int32)
            self._sums = np.zeros((checks, heads, width), np.int32)
            self._summed = (0, 0)
        else:
            self._keys = source.elements(checks, width)
            self._sums = np.zeros((checks, heads, 0), np.int32)

    @property
    def _rows(self) -> tuple[Int16[np.ndarray, "heads capacity width"], Int32[np.ndarray, "heads capacity width"]]:
        """The quantised rows and their pads, row by row whichever way they are stored."""
        values, pads = self._stored
        return (values.transpose(0, 2, 1), pads.transpose(0, 2, 1)) if self.transposed else (values, pads)

    @property
    def nbytes(self) -> int:
        """Bytes of enclave memory."""
        return sum(a.nbytes for a in (*self._stored, self._scales, self._keys, self._sums))

    @property
    def scales(self) -> Float64[np.ndarray, "heads rows"]:
        """The scale of each row: what the weights of values must be multiplied by."""
        return self._scales[:, : self.rows]

    def append(self, x: Float32[np.ndarray, "heads count width"]) -> None:
        """Keeps more rows, under pads drawn now.

        Raises:
            NonFiniteError: a row holds NaN or infinity; nothing is kept.
        """
        first, count = self.rows, x.shape[1]
        self._reserve(first + count)
        kind, reach = (LENGTH, dots_reach(self.width)) if self.transposed else (PEAK, float(VALUE_LEVELS))
        values, pads = self._rows
        if (bad := keep_rows(x, kind, reach, values, self._scales, first)) != OK:
            values[:, first:] = 0
            raise non_finite(self.name, bad)
        pads[:, first : first + count] = self._source.elements(self.heads * count, self.width).reshape(x.shape)
        if self.transposed:
            self._keys[:, first : first + count] = self._source.elements(self._keys.shape[0], count)
        else:
            check_columns(values, pads, self._keys, first, first + count, self._sums)
        self.rows += count

    def cut(self, rows: int) -> None:
        """Forgets all but the first `rows` rows; what is cut off is zeroed, and never blinded again."""
        if rows >= self.rows:
            return
        for array in (*self._rows, self._scales):
            array[:, rows : self.rows] = 0
        if self.transposed:
            if self._summed[1] > rows:
                self._sums[:], self._summed = 0, (0, 0)
            self._keys[:, rows : self.rows] = 0
        else:
            self._sums[:, :, rows : self.rows] = 0
        self.rows = rows

    def blinded(self, first: int, stop: int) -> Blinded:
        """Returns rows [first, stop), head after head, as any accelerator may see them: the same bytes every time."""
        if not 0 <= first < stop <= self.rows:
            raise BlindingError(f"{self.name} keeps {self.rows} rows: there are no rows {first} to {stop}.")
        out = np.empty((self.heads * (stop - first), self.width), np.int32)
        blind_kept(*self._rows, first, stop, out)
        return Blinded(out, _MAKER)

    def pair(self, x: Float32[np.ndarray, "n inner"], first: int, keep: int, team: Team | None = None) -> BlindedPair:
        """Returns the product of `x` (head after head) and the rows kept from `first` on, under a fresh pad.

        `keep`: how many rows the accelerator holds already; the others travel with the product.

        Raises:
            NonFiniteError: a row of `x` holds NaN or infinity.
            WireError: the product is beyond the limits of a request.
        """
        count, rows = self.rows - first, x.shape[0] // self.heads
        shape = PairShape(self.heads, self.width, keep, self.rows - keep, first, self.transposed, rows)
        shape.check()
        if x.shape != (self.heads * rows, shape.d_in):
            raise BlindingError(
                f"Rows of shape {x.shape} do not fit {count} rows of {self.heads} heads of {self.name}."
            )
        kind, reach = (LENGTH, dots_reach(self.width)) if self.transposed else (SUM, sums_reach(count))
        pad = self._source.elements(*x.shape)
        left = np.empty(x.shape, np.int32)
        scales = np.empty(x.shape[0], np.float64)
        bad = _split(lambda a, b: blind_left(x, kind, reach, pad, left, scales, a, b), x.shape[0], x.size, team)
        if bad != OK:
            pad.fill(0)
            raise non_finite(f"what multiplies {self.name}", bad)
        kept = (*self._stored, self._scales)
        keys = self._keys, self._check_sums(first) if self.transposed else self._sums
        appended = self.blinded(keep, self.rows) if shape.append else None
        sent = left, pad, scales
        shown = left.view()
        shown.flags.writeable = False  # the check and the recovery read `left` after the accelerator had it
        return BlindedPair(Blinded(shown, _MAKER), appended, shape, self.name, self.transposed, sent, kept, keys)

    def _check_sums(self, first: int) -> Int32[np.ndarray, "checks heads width"]:
        """Returns `v[first:] @ (Y + S)[first:]`: grown by the rows that came, less those that a window left behind."""
        start, stop = self._summed
        if first < start or first >= stop:
            self._sums[:] = 0
            start = stop = first
        parts = (*self._rows, self._keys)
        add_check_rows(*parts, start, first, -1, self._sums)
        add_check_rows(*parts, stop, self.rows, 1, self._sums)
        self._summed = (first, self.rows)
        return self._sums

    def _reserve(self, rows: int) -> None:
        capacity = self._scales.shape[1]
        if rows <= capacity:
            return
        more = max(FIRST_ROWS, 1 << (rows - 1).bit_length()) - capacity
        values, pads = self._stored
        axis = 2 if self.transposed else 1
        outgrown: list[np.ndarray] = [values, pads, self._scales, self._keys if self.transposed else self._sums]
        grown = [
            _grown(array, at, more)
            for array, at in zip(outgrown, (axis, axis, 1, 1 if self.transposed else 2), strict=True)
        ]
        # From here on nothing can fail: values without their pads, or pads without their values, must never be kept.
        self._stored, self._scales = (grown[0], grown[1]), grown[2]
        if self.transposed:
            self._keys = grown[3]
        else:
            self._sums = grown[3]
        for array in outgrown:
            array.fill(0)


def kept_keys(name: str, heads: int, width: int, checks: int, source: PadSource) -> KeptRows:
    """Returns an empty operand for dot products `x . y` with each of its rows, exact to `dots_error`."""
    return KeptRows(name, heads, width, True, checks, source)


def kept_values(name: str, heads: int, width: int, checks: int, source: PadSource) -> KeptRows:
    """Returns an empty operand for weighted sums of its rows, exact to `sums_error`.

    Rows are divided by their scales when they are kept, so weights must be multiplied by `scales` before `pair`.
    """
    return KeptRows(name, heads, width, False, checks, source)


def non_finite(name: str, row: int) -> NonFiniteError:
    """Returns the error for a row that cannot be quantised, naming the operand."""
    return NonFiniteError(
        f"Row {row} of {name} holds NaN or infinity.",
        remedy="The checkpoint is damaged or the activations overflowed: check it with the float32 model.",
    )


def _grown(array: Any, axis: int, more: int) -> Any:
    """Returns a copy with `more` zeros at the end of an axis."""
    shape = list(array.shape)
    shape[axis] += more
    grown = np.zeros(shape, array.dtype)
    grown[tuple(slice(size) for size in array.shape)] = array
    return grown


def _split(loop: Callable[[int, int], int], total: int, work: int, team: Team | None) -> int:
    """Runs a loop over rows, on a team if it is worth the hand-off; returns OK, or the first bad row that a part found."""
    found: list[int] = []

    def part(start: int, stop: int) -> None:
        found.append(loop(start, stop))

    if team is None or work < TEAM_WORK:
        part(0, total)
    else:
        team.run(part, total)
    bad = [row for row in found if row != OK]
    return min(bad) if bad else OK
