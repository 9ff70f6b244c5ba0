"""Weights in disguise are recovered against a public base; weights that were never shown are not."""

import numpy as np
import pytest

from cloister.audit.weight_matching import (
    arrow_match,
    filled_from_base,
    score,
    simulated_base,
    true_weight,
    undisguise,
)
from tests.blinding.test_blinded_product import integer_product, make_linear


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(80, 64)).astype(np.float32)


@pytest.mark.parametrize("shape", [(80, 64), (50, 120), (33, 33)])
@pytest.mark.parametrize("change", [0.0, 0.05, 0.2])
def test_arrow_match_undoes_permutations_and_scales(
    shape: tuple[int, int], change: float, rng: np.random.Generator
) -> None:
    truth = rng.normal(size=shape).astype(np.float32)
    base = simulated_base(truth, change, 1)
    rows, columns = rng.permutation(shape[0]), rng.permutation(shape[1])
    disguised = truth[rows][:, columns] * rng.uniform(0.5, 2, (shape[0], 1)).astype(np.float32)
    arrows = arrow_match(disguised, base)
    np.testing.assert_array_equal(arrows.rows, rows)
    np.testing.assert_array_equal(arrows.columns, columns)
    found = score(undisguise(disguised, base, arrows), truth, base)
    assert found.rows.rate == 1.0
    assert found.known > 0.95
    assert score(disguised, truth, base).known == 0.0


def test_a_base_that_has_nothing_to_do_with_the_weight_does_not_help(rng: np.random.Generator) -> None:
    truth, base = rng.normal(size=(2, 80, 64)).astype(np.float32)
    disguised = truth[rng.permutation(80)][:, rng.permutation(64)]
    found = score(undisguise(disguised, base, arrow_match(disguised, base)), truth, base)
    nothing = score(np.zeros_like(truth), truth, base)
    assert found.rows.successes == 0
    assert found.known < nothing.known, "of an unrelated base, zeros come nearer"


def test_scores_are_one_for_the_weight_itself_and_zero_for_the_base(weight: np.ndarray) -> None:
    base = simulated_base(weight, 0.1, 3)
    np.testing.assert_allclose(np.linalg.norm(base - weight, axis=1), 0.1 * np.linalg.norm(weight, axis=1), rtol=1e-4)
    assert (score(weight, weight, base).known, score(weight, weight, base).rows.rate) == (1.0, 1.0)
    assert (score(base, weight, base).known, score(base, weight, base).rows.rate) == (pytest.approx(0.0, abs=1e-6), 0.0)
    half = np.where(np.arange(80)[:, None] < 40, weight, base)
    assert score(half, weight, base).rows.successes == 40
    assert score(half, weight, base).known == pytest.approx(0.5, abs=0.05)


def test_what_is_missing_is_filled_from_the_base(weight: np.ndarray, rng: np.random.Generator) -> None:
    base = simulated_base(weight, 0.1, 3)
    shown = np.where(rng.random(weight.shape) < 0.8, weight, 0).astype(np.float32)
    found = score(filled_from_base(shown, base), weight, base)
    assert found.known == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("planes", [1, 2])
def test_the_true_weight_is_what_the_linear_multiplies_by(planes: int, rng: np.random.Generator) -> None:
    linear = make_linear(rng.normal(size=(12, 30)), planes=planes)
    rows = rng.integers(-50, 50, (2, 30), dtype=np.int32)
    expected = integer_product(linear, rows) * linear.scales.reshape(-1)
    np.testing.assert_allclose(rows @ true_weight(linear).T, expected, rtol=1e-4, atol=1e-3)
