"""Counts become claims: intervals are Clopper and Pearson's, and Fano's bound never exceeds the information there is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.audit.scores import Proportion, best_guess, binomial_tail, entropy_bits, fano_bits

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 1), (3, 10), (10, 10), (200, 5000), (4999, 5000)])
@pytest.mark.parametrize("confidence", [0.95, 1 - 1e-6])
def test_intervals_are_scipys(successes: int, trials: int, confidence: float) -> None:
    exact = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    low, high = Proportion(successes, trials).interval(confidence)
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert low <= successes / trials <= high


def test_without_a_trial_nothing_is_claimed() -> None:
    nothing = Proportion(0, 0)
    assert (nothing.rate, nothing.lower, nothing.upper) == (0.0, 0.0, 1.0)


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(1, 40), st.floats(0, 1))
def test_the_tail_of_a_binomial_is_scipys(successes: int, trials: int, rate: float) -> None:
    assert binomial_tail(successes, trials, rate) == pytest.approx(
        stats.binom.sf(successes - 1, trials, rate), abs=1e-9
    )


def test_entropy_is_that_of_the_frequencies() -> None:
    assert entropy_bits([5] * 7) == 0
    assert entropy_bits(list(range(8)) * 3) == pytest.approx(3)
    assert entropy_bits([0, 0, 1, 2]) == pytest.approx(1.5)
    assert entropy_bits([]) == 0


@settings(max_examples=200)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_fanos_bound_is_below_the_mutual_information(kinds: int, outcomes: int, seed: int) -> None:
    joint = np.random.default_rng(seed).dirichlet(np.full(kinds * outcomes, 0.3)).reshape(kinds, outcomes)
    prior, seen = joint.sum(axis=1), joint.sum(axis=0)
    entropy = float(-(prior * np.log2(np.maximum(prior, 1e-300))).sum())
    information = float((joint * np.log2(np.maximum(joint, 1e-300) / np.outer(prior, seen).clip(1e-300))).sum())
    recovery = float(joint.max(axis=0).sum())  # of the best attack there is
    for worse in (recovery, recovery / 2, 0.0):
        assert fano_bits(entropy, kinds, worse) <= information + 1e-9


def test_fanos_bound_is_tight_where_everything_is_recovered_and_nothing_where_nothing_is() -> None:
    assert fano_bits(7.0, 200, 1.0) == 7.0
    assert fano_bits(7.0, 200, 0.0) == 0.0
    assert fano_bits(math.log2(200), 200, 1 / 200) == 0.0
    values = [fano_bits(7.0, 200, rate / 100) for rate in range(101)]
    assert values == sorted(values)


def test_guessing_is_the_most_common_token() -> None:
    assert best_guess([4, 4, 9, 4, 2]) == Proportion(3, 5)
    assert best_guess([]) == Proportion(0, 0)
