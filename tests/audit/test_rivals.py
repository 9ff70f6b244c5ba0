"""The published sanitisers: tables that are what their papers describe."""

import math

import numpy as np
import pytest

from cloister.audit import rivals
from cloister.privacy.noisy_max import exact_epsilon, laplace_table
from cloister.privacy.published import PublishedNoisyMax


def words(rng: np.random.Generator, count: int = 60) -> np.ndarray:
    return rng.normal(size=(count, 6)).astype(np.float32)


def test_santext_is_the_exponential_mechanism_over_distances(rng: np.random.Generator) -> None:
    vectors = words(rng)
    table = rivals.santext(rivals.distances(vectors), 3.0)
    row = [math.exp(-1.5 * float(np.linalg.norm(vectors[4] - other))) for other in vectors]
    assert np.allclose(table[4], np.array(row) / sum(row), atol=1e-4)
    worst = max(
        abs(math.log(table[a, y] / table[b, y])) - 3.0 * float(np.linalg.norm(vectors[a] - vectors[b]))
        for a in range(0, 60, 7) for b in range(0, 60, 7) for y in range(60)
    )  # fmt: skip
    assert worst < 1e-3, "metric privacy: the log-ratio stays below ε times the distance"


def test_tem_is_gumbel_noise_with_a_fallback(rng: np.random.Generator) -> None:
    """Against its literal description, simulated."""
    vectors, epsilon = words(rng, 30), 6.0
    far = rivals.distances(vectors)
    table = rivals.tem(far, epsilon)
    radius = 2 / epsilon * math.log((1 - rivals.TEM_BETA) * 30 / rivals.TEM_BETA)
    inside = np.flatnonzero(far[3] <= radius)
    outside = np.flatnonzero(far[3] > radius)
    assert len(outside) > 0
    seen, draws = np.zeros(30), 40_000
    for _ in range(draws):
        scores = [-far[3, y] for y in inside] + [-radius + 2 * math.log(len(outside)) / epsilon]
        winner = int(np.argmax(np.array(scores) + rng.gumbel(scale=2 / epsilon, size=len(scores))))
        seen[inside[winner] if winner < len(inside) else rng.choice(outside)] += 1
    assert np.abs(seen / draws - table[3]).max() < 6 * math.sqrt(0.25 / draws)


def test_cmif_is_laplace_noise_over_all_words(rng: np.random.Generator) -> None:
    vectors, sensitive, epsilon = words(rng), np.array([3, 40, 17]), 6.0
    (block,) = rivals.cmif_rival(vectors, sensitive, epsilon).blocks
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = np.rint((unit[sensitive] @ unit.T).astype(np.float64) * 512) / 512
    assert np.allclose(np.log(block.table), np.log(laplace_table(cosines, 2 * 2 / epsilon)), atol=1e-4)
    assert block.outputs.tolist() == list(range(60))
    assert exact_epsilon(block.table) <= epsilon
    drawn = PublishedNoisyMax(vectors, epsilon, rng.bytes).replace_tokens([40] * 20_000)
    assert np.abs(np.bincount(drawn, minlength=60) / 20_000 - block.table[1]).max() < 6 * math.sqrt(0.05 / 20_000)


def test_custext_groups_are_a_partition_of_twenties(rng: np.random.Generator) -> None:
    groups = rivals.custext_groups(words(rng, 130))
    assert sorted(np.concatenate(groups).tolist()) == list(range(130))
    assert [len(group) for group in groups] == [20] * 5 + [30]
    assert groups[0][0] == 0, "the most frequent word begins the first group"


def test_custext_uses_the_whole_range_of_similarity_for_each_word(rng: np.random.Generator) -> None:
    vectors = words(rng, 20)
    table = rivals.custext(vectors, np.arange(20), 2.0)
    assert np.allclose(table.max(axis=1) / table.min(axis=1), math.e)
    assert (table.argmax(axis=1) == np.arange(20)).all()
    assert exact_epsilon(table) <= 2.0


@pytest.mark.parametrize("make", [rivals.santext_plus, rivals.tem_rival, rivals.custext_plus])
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_a_calibrated_rival_spends_what_it_is_given(make, epsilon: float, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    spent = make(words(rng), np.arange(10, 60), epsilon).epsilon
    assert 0.97 * epsilon < spent <= epsilon * 1.001


def test_rantext_has_no_finite_epsilon_where_its_radius_cuts(rng: np.random.Generator) -> None:
    vectors = (rng.normal(size=(60, 64)) * 3).astype(np.float32)
    rival = rivals.rantext_rival(vectors, np.arange(60), 6.0, rng)
    assert np.allclose(rival.blocks[0].table.sum(axis=1), 1.0, atol=1e-5)
    far = rivals.distances(vectors)
    assert math.isinf(rival.epsilon) == bool((rival.blocks[0].table == 0).any())
    assert far.shape == (60, 60)


def test_santext_can_be_set_by_the_attack_instead_of_epsilon(rng: np.random.Generator) -> None:
    vectors = words(rng)
    for attack in (0.05, 0.4, 0.9):
        (block,) = rivals.santext_at_attack(vectors, np.arange(60), attack).blocks
        assert float(block.table.max(axis=0).sum()) / 60 == pytest.approx(attack, rel=0.02)
        assert block.table.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
