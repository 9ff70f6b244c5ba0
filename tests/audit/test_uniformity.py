"""The tests of uniformity: their p-values are scipy's, uniform data passes, near misses do not."""

import numpy as np
import pytest

from cloister.arith.modulus import HALF, P
from cloister.audit.uniformity import SIGNIFICANCE, chi_square_p, kolmogorov_p, measure_uniformity

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.mark.parametrize("statistic", [150.0, 255.0, 300.0, 350.0, 400.0])
def test_chi_square_agrees_with_scipy(statistic: float) -> None:
    assert chi_square_p(statistic, 255) == pytest.approx(stats.chi2.sf(statistic, 255), rel=0.1)


@pytest.mark.parametrize("distance", [0.001, 0.005, 0.01, 0.02, 0.03])
def test_kolmogorov_agrees_with_scipy(distance: float) -> None:
    assert kolmogorov_p(distance, 10_000) == pytest.approx(stats.kstwo.sf(distance, 10_000), rel=0.1)


def test_uniform_elements_pass(rng: np.random.Generator) -> None:
    for _ in range(20):
        assert measure_uniformity(rng.integers(-HALF, HALF + 1, (8, 2048), dtype=np.int32)).uniform


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_digit_that_is_never_full_is_found(place: int, rng: np.random.Generator) -> None:
    values = rng.integers(0, P, 60_000)
    values[(values >> (8 * place)) & 255 == 255] -= 255 << (8 * place)
    seen = measure_uniformity(np.where(values > HALF, values - P, values)[None, :])
    assert seen.chi_square_p < SIGNIFICANCE
    assert not seen.uniform


def test_a_shorter_range_is_found(rng: np.random.Generator) -> None:
    seen = measure_uniformity(rng.integers(-HALF * 9 // 10, HALF * 9 // 10, (1, 20_000)))
    assert seen.kolmogorov_smirnov_p < SIGNIFICANCE
    assert not seen.uniform


def test_small_values_are_found_at_once(rng: np.random.Generator) -> None:
    assert not measure_uniformity(rng.normal(0, 3000, (1, 2000)).round().astype(np.int64)).uniform
