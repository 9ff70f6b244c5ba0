"""Integer channels: a table of probabilities with the denominator 2³², and draws from it in constant work.

Covers: making integers of a float table without exceeding ε; drawing with integers only.
Does not cover: the proof of ε, which is `privacy.certificate` and looks at the integers alone.

Guarantees: a draw reads the same number of random bits and touches every cell of its row, whatever the row and the
outcome (no early exit, no rejection, no floating point), and its distribution is exactly the table's.
Assumes: the caller's random bytes are uniform and never used twice.
Edge cases: a weight of 0 is never drawn; a weight of 2³² always.
"""

import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from cloister.errors import CertificateError
from cloister.privacy.certificate import TOTAL, AnyWeights, Weights, certify, exponential_below
from cloister.privacy.mechanism import RandomSource

DEAD_COLUMN = 2.0**-30
"""A column that no span reaches with more than this probability is emptied: its ratio could not be kept in integers."""


def quantise(table: Float64[np.ndarray, "spans candidates"], epsilon: Fraction) -> Weights:
    """Returns integers close to a float table whose exact ε does not exceed `epsilon`.

    Each column's least weight sets the range its others may take; what rounding leaves of a row goes to cells with room.

    Raises:
        CertificateError: the table is too far from ε for rounding to mend (it should be made for slightly less).
    """
    bound = exponential_below(epsilon)
    alive = np.where(table.max(axis=0) > DEAD_COLUMN, np.maximum(table, 0.0), 0.0)
    scaled = alive / alive.sum(axis=1, keepdims=True) * TOTAL
    low = np.floor(scaled.min(axis=0)).astype(np.int64)
    low = np.where(alive.max(axis=0) > 0, np.maximum(low, 1), 0)
    high = np.array([least * bound.numerator // bound.denominator for least in low.tolist()], dtype=np.int64)
    weights = np.clip(np.rint(scaled).astype(np.int64), low, np.minimum(high, TOTAL))
    for row in weights:
        _settle(row, low, high)
    certify(weights, epsilon)
    return weights


def _settle(row: Int64[np.ndarray, " candidates"], low: np.ndarray, high: np.ndarray) -> None:
    """Makes a row sum to 2³² within [low, high], moving most where there is most room."""
    missing = TOTAL - int(row.sum())
    room = high - row if missing > 0 else row - low
    for cell in np.argsort(-room, kind="stable"):
        if missing == 0:
            return
        step = min(abs(missing), int(room[cell]))
        row[cell] += step if missing > 0 else -step
        missing -= step if missing > 0 else -step
    if missing != 0:
        raise CertificateError("A table leaves no room to round.", remedy="Make it for a slightly smaller ε.")


class Channel:
    """Tables of several classes, ready to draw from."""

    def __init__(self, tables: Sequence[AnyWeights], source: RandomSource = os.urandom) -> None:
        """Takes certified tables; `source` other than `os.urandom` is for tests."""
        self._source = source
        sizes = np.array([len(table) for table in tables], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        self._sizes = sizes
        width = int(sizes.max(initial=1))
        # Row r of class c is row first[c] + r. Beyond a class's size the cumulative weight stays 2³²: never reached.
        self._cumulative = np.full((int(sizes.sum()), width), TOTAL, dtype=np.uint64)
        for first, table in zip(self._first, tables, strict=True):
            self._cumulative[first : first + len(table), : len(table)] = np.cumsum(table, axis=1)

    def draw(self, classes: Sequence[int], members: Sequence[int]) -> list[int]:
        """Returns one member of each class, drawn from the row of the given member: 32 random bits each.

        Raises:
            IndexError: a member that its class does not have.
        """
        which = np.asarray(classes, dtype=np.int64)
        member = np.asarray(members, dtype=np.int64)
        if ((member < 0) | (member >= self._sizes[which])).any():
            raise IndexError("A class has no such member.")
        bits = np.frombuffer(self._source(4 * len(which)), dtype="<u4").astype(np.uint64)
        return invert(self._cumulative[self._first[which] + member], bits).tolist()


def invert(cumulative: UInt64[np.ndarray, "draws candidates"], bits: UInt64[np.ndarray, " draws"]) -> np.ndarray:
    """Returns how many cumulative weights are not above each draw's 32 bits: the candidate that the bits name."""
    return (cumulative <= bits[:, None]).sum(axis=1)
