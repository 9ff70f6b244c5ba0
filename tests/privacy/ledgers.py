"""What the tests of the ledger begin with: a session, an entry of some draws, and the curve of a table."""

import math
from pathlib import Path

import numpy as np

from cloister.privacy.accounting import Charge, pure
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import DominatingCurve


def entry(epsilon: float = 2.0, count: int = 1) -> Entry:
    return Entry("word", Charge(pure(epsilon), count))


def opened(path: Path, budget: float = 16.0) -> Ledger:
    ledger = Ledger.open(path)
    ledger.open_session("s", budget, pure(2.0), "words in place")
    return ledger


def curve_of(table: np.ndarray, gap: float = 0.01) -> DominatingCurve:
    epsilon = float(np.log((table.max(0) / table.min(0)).max()))
    edge = math.ceil(epsilon / gap)
    deltas = [
        max(float(np.maximum(0, a - math.exp(i * gap) * b).sum()) for a in table for b in table)
        for i in range(-edge, edge + 1)
    ]
    deltas[-1] = 0.0
    return DominatingCurve(-edge * gap, gap, tuple(float(d) for d in np.minimum.accumulate(deltas)))
