"""Lending one row from compiled code: blind, cross, check and recover without the interpreter in between.

A decode step lends some ninety rows. Between two of them the accelerator streams megabytes of weights through the
caches, so whatever the interpreter needs for a step in Python comes back from memory each time: that cost more than blinding,
checking and unblinding together.

Covers: one crossing, for any linear of a table; the same kernels as `blinding.pads.Pad` and `Opening`, in the same order.
Guarantees: as of the gate (`enclave.outsource`). The pads come from a `RowPads`, which gives them out once. A row leaves
only after it was blinded; an answer is copied before it is checked, and used only if the check passed.
Does not cover: what to do about a failure, which is the gate's.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numba import carray, types

from cloister.arith.jit import compiled, fence, pointer_to
from cloister.blinding.kernels import OK, blind, open_product
from cloister.blinding.linear import LentLinear
from cloister.wire.exchange import ANSWERED, lend_row


class Trouble(IntEnum):
    """What stopped a pass."""

    NON_FINITE = 1
    NO_ANSWER = 2
    WRONG = 3


class Table(NamedTuple):
    """The linears of a model as compiled code reads them."""

    sizes: np.ndarray
    """int64 `[linears, 6]`: d_in, d_out, planes, checks, elements of the bias, first word."""
    reaches: np.ndarray
    """float64 `[linears]`."""
    words: np.ndarray
    """int32: of each linear the keys of its check (right, then left), the bits of its scales and of its bias."""

    @staticmethod
    def of(linears: Sequence[LentLinear]) -> "Table":
        """Returns the table of `linears`."""
        sizes, words, first = [], [], 0
        for linear in linears:
            planes, d_out = linear.scales.shape
            key = linear.check
            parts = [key.right, key.left, linear.scales.view(np.int32), linear.bias.view(np.int32)]
            sizes.append((linear.d_in, d_out, planes, len(key.right), len(linear.bias), first))
            words += [part.reshape(-1) for part in parts]
            first += sum(part.size for part in parts)
        reaches = np.array([linear.reach.value for linear in linears])
        return Table(np.array(sizes, np.int64), reaches, np.concatenate(words))


class Desk(NamedTuple):
    """What the crossings of a pass write: scratch memory, clocks, and what went wrong."""

    blinded: np.ndarray
    """int32, as long as the longest row."""
    answer: np.ndarray
    """int32, as long as the longest answer."""
    scale: np.ndarray
    """float64 `[1]`."""
    expected: np.ndarray
    """int64 `[checks]`."""
    seconds: np.ndarray
    """float64 `[3]`: spent on blinding, on waiting, on recovering."""
    trouble: np.ndarray
    """int64 `[2]`: a `Trouble`, and the outcome of the exchange."""

    @staticmethod
    def of(linears: Sequence[LentLinear]) -> "Desk":
        """Returns a desk that is large enough for `linears`."""
        return Desk(
            np.zeros(max(linear.d_in for linear in linears), np.int32),
            np.zeros(max(linear.weight.shape[0] for linear in linears), np.int32),
            np.zeros(1),
            np.zeros(max(len(linear.check.right) for linear in linears), np.int64),
            np.zeros(3),
            np.zeros(2, np.int64),
        )


_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC = 1


@compiled
def _now(pair):  # type: ignore[no-untyped-def]
    _clock_gettime(_MONOTONIC, pair.ctypes.data)
    return pair[0] + 1e-9 * pair[1]


@compiled
def cross(table, pads, line, desk, index, x, out):  # type: ignore[no-untyped-def]
    """Fills `out` float32 [1, d_out] with linear `index` of `x` float32 [1, d_in]: lent, checked and recovered.

    pads int64 [linears, 2]: the addresses of r and u. Returns whether it did; `desk.trouble` says what stopped it.
    """
    time = np.empty(2, np.int64)
    started = _now(time)
    size = table.sizes[index]
    d_in, d_out, planes, checks, biased, first = size[0], size[1], size[2], size[3], size[4], size[5]
    outputs = planes * d_out
    left = first + checks * d_in
    scales = left + checks * outputs
    bias = scales + outputs
    floats = table.words.view(np.float32)
    blinded, expected = desk.blinded[:d_in].reshape(1, d_in), desk.expected[:checks].reshape(1, checks)
    r = carray(pointer_to(pads[index, 0]), (1, d_in), np.int32)
    key = table.words[first:left].reshape(checks, d_in)
    if blind(x, table.reaches[index], r, key, blinded, desk.scale, expected) != OK:
        desk.trouble[0] = Trouble.NON_FINITE
        return False
    line.request[:d_in] = blinded[0]
    sent = _now(time)
    desk.seconds[0] += sent - started
    outcome = lend_row(line, index)
    answered = _now(time)
    desk.seconds[1] += answered - sent
    if outcome != ANSWERED:
        desk.trouble[0], desk.trouble[1] = Trouble.NO_ANSWER, outcome
        return False
    answer = desk.answer[:outputs]
    answer[:] = line.answer[:outputs]
    fence()
    u = carray(pointer_to(pads[index, 1]), (1, outputs), np.int32)
    bad = open_product(
        answer.reshape(1, outputs), u, table.words[left:scales].reshape(checks, outputs), expected, desk.scale,
        floats[scales:bias].reshape(planes, d_out), floats[bias : bias + biased], out,
    )  # fmt: skip
    desk.seconds[2] += _now(time) - answered
    if bad != OK:
        desk.trouble[0] = Trouble.WRONG
    return bad == OK
