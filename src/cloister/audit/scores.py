"""Turns what an attack achieved into numbers with bounds: proportions with exact intervals, and bits by Fano's inequality.

Covers: the one place where a count of successes becomes a claim.
Assumes: trials are independent draws from what the claim speaks of. Positions of one text are not quite that; an interval
over them is somewhat too narrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

CONFIDENCE: Final = 0.95
"""Of an interval when none is named."""

_HALVINGS: Final = 60


@dataclass(frozen=True)
class Proportion:
    """`successes` of `trials`, and what they say about the rate behind them."""

    successes: int
    trials: int

    @property
    def rate(self) -> float:
        """The share of successes; 0 without a trial."""
        return self.successes / self.trials if self.trials else 0.0

    @cached_property
    def lower(self) -> float:
        """Lower end of the 95 % interval."""
        return self.interval()[0]

    @cached_property
    def upper(self) -> float:
        """Upper end of the 95 % interval."""
        return self.interval()[1]

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns the exact two-sided interval of Clopper and Pearson (1934), to 12 digits; (0, 1) without a trial."""
        if not self.trials:
            return 0.0, 1.0
        tail = (1.0 - confidence) / 2.0
        lower, upper = 0.0, 1.0
        if self.successes:  # the rate at which so many successes or more have the chance `tail`
            lower = _bisect(lambda rate: binomial_tail(self.successes, self.trials, rate) < tail)
        if self.successes < self.trials:  # the rate at which so few or fewer have it
            upper = _bisect(lambda rate: 1.0 - binomial_tail(self.successes + 1, self.trials, rate) > tail)
        return lower, upper


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """Returns the chance of at least `successes` in `trials` independent trials of `rate`."""
    if successes <= 0:
        return 1.0
    if rate <= 0.0 or rate >= 1.0:
        return float(rate >= 1.0 and successes <= trials)
    counts = np.arange(trials + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    logs = factorials[trials] - factorials[counts] - factorials[trials - counts]
    chances = np.exp(logs + counts * math.log(rate) + (trials - counts) * math.log1p(-rate))
    below, above = float(chances[:successes].sum()), float(chances[successes:].sum())
    return above if above < below else 1.0 - below


def entropy_bits(tokens: Sequence[int]) -> float:
    """Returns the entropy, in bits, of the token at a position drawn uniformly from `tokens`."""
    if not len(tokens):
        return 0.0
    shares = np.bincount(np.asarray(tokens)) / len(tokens)
    shares = shares[shares > 0]
    return max(0.0, float(-(shares * np.log2(shares)).sum()))


def fano_bits(entropy: float, kinds: int, recovery: float) -> float:
    """Returns a lower bound, in bits, on what an observation says about a token that is guessed right with chance `recovery`.

    By Fano's inequality (Cover and Thomas, theorem 2.10.1): I(T; X) = H(T) - H(T|X) >= H(T) - h(e) - e log2(kinds), with
    e = 1 - recovery and h the binary entropy. `kinds`: how many tokens T may be; a guess may be none of them, so `kinds`
    stands where the textbook has one less. `entropy`: H(T) in bits. For a claim with confidence, give the lower end of an
    interval of the recovery. Never negative; 0 says that this attack proves nothing, not that there is nothing.
    """
    error = 1.0 - recovery
    if error <= 0.0:
        return entropy
    spread = -error * math.log2(error) - (recovery * math.log2(recovery) if recovery > 0.0 else 0.0)
    if error > kinds / (kinds + 1):  # h(e) + e log2(kinds) falls again beyond: no better than guessing
        return 0.0
    return max(0.0, entropy - spread - error * math.log2(kinds))


def best_guess(tokens: Sequence[int]) -> Proportion:
    """Returns how often the most common of `tokens` is right: the most that a guess without an observation achieves."""
    counts = np.bincount(np.asarray(tokens)) if len(tokens) else np.zeros(1, np.int64)
    return Proportion(int(counts.max()), len(tokens))


def _bisect(still_below: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if still_below(middle) else (low, middle)
    return (low + high) / 2
