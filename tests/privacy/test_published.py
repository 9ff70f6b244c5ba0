"""CMIF's published sanitiser: its distribution, its noise, its refusals."""

import math
from collections import Counter

import numpy as np
import pytest

from cloister.errors import CandidatesError
from cloister.privacy.noisy_max import exact_epsilon, laplace_table
from cloister.privacy.published import SENSITIVITY, PublishedNoisyMax, laplace, low_frequency


def test_draws_follow_the_exact_table_of_laplace_noise(rng: np.random.Generator) -> None:
    table = rng.normal(size=(7, 5)).astype(np.float32)
    unit = table.astype(np.float64) / np.linalg.norm(table, axis=1, keepdims=True)
    epsilon, draws = 8.0, 30_000
    expected = laplace_table(np.clip(unit @ unit.T, -1, 1), 2 * SENSITIVITY / epsilon)
    assert exact_epsilon(expected) <= epsilon
    seen = Counter(PublishedNoisyMax(table, epsilon).replace_tokens([3] * draws))
    for token in range(7):
        assert abs(seen[token] / draws - expected[3, token]) < 6 * math.sqrt(0.25 / draws)


def test_the_noise_is_laplace() -> None:
    from scipy.stats import kstest

    noise = laplace((50_000,), 1.5)
    assert kstest(noise, "laplace", args=(0.0, 1.5)).pvalue > 1e-6
    assert np.isfinite(laplace((4,), 1.0, lambda count: b"\x00" * count)).all()
    assert np.isfinite(laplace((4,), 1.0, lambda count: b"\xff" * count)).all()


def test_bad_input_is_refused(rng: np.random.Generator) -> None:
    table = rng.normal(size=(7, 5)).astype(np.float32)
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(CandidatesError, match="ε is"):
            PublishedNoisyMax(table, epsilon)
    for token in (-1, 7):
        with pytest.raises(CandidatesError, match="vocabulary"):
            PublishedNoisyMax(table, 1.0).replace_tokens([token])
    assert PublishedNoisyMax(table, 1.0).replace_tokens([]) == []


def test_the_low_frequency_selector_takes_the_rarest_half() -> None:
    assert low_frequency([5, 0, 3, 9, 1, 7]) == {1, 4, 2}
    assert low_frequency([1, 1, 1, 1], 0.25) == {0}
