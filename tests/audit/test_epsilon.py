"""The audit of sanitisers: tight on the real ones, not fooled by the broken ones."""

import math
from fractions import Fraction

import numpy as np
import pytest

from cloister.audit import epsilon as audits
from cloister.audit.controls import CONTROLS, Control, deployed
from cloister.privacy.build import float_table
from cloister.privacy.certificate import TOTAL, certificate
from cloister.privacy.channel import Channel, quantise
from cloister.privacy.mechanism import Mechanism

DRAWS = 1_000_000


def class_of(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 16))
    vectors += vectors[0]  # neighbours in one direction, as a class has them
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


@pytest.mark.parametrize(("epsilon", "count"), [("1", 24), ("2", 64), ("4", 24)])
def test_a_million_draws_find_nearly_all_of_the_channel_epsilon_and_no_more(epsilon: str, count: int) -> None:
    claim, scores = Fraction(epsilon), class_of(count, count)
    prior = np.full(count, 1 / count)
    weights = quantise(float_table(scores, prior, Mechanism.CHANNEL, float(claim)), claim)
    pair = audits.best_pair(weights / TOTAL, DRAWS)
    verdict = audits.audit(deployed(Channel([weights])), [pair], certificate(weights).epsilon, DRAWS, count)
    assert not verdict.refuted
    assert verdict.tight, verdict


@pytest.mark.parametrize("mechanism", [Mechanism.LAPLACE_RNM, Mechanism.GUMBEL, Mechanism.PERMUTE_AND_FLIP])
def test_noise_mechanisms_are_not_refuted(mechanism: Mechanism) -> None:
    scores, prior = class_of(3, 16), np.full(16, 1 / 16)
    weights = quantise(float_table(scores, prior, mechanism, 2.0), Fraction(2))
    spent = certificate(weights).epsilon
    verdict = audits.audit(
        deployed(Channel([weights])), [audits.best_pair(weights / TOTAL, 200_000)], spent, 200_000, 16
    )
    assert 0.7 * spent < verdict.epsilon <= spent


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_broken_sanitiser_is_flagged(control: Control) -> None:
    draws = 1_000_000 if control.name == "no memo" else 200_000  # that one spends eight draws on a sequence
    verdict = control.run(class_of(5, 64), draws)
    assert verdict.refuted, f"{control.mistake} went unnoticed: {verdict}"


def test_the_limits_are_those_of_clopper_and_pearson() -> None:
    """The lower limit p of k hits solves P(X >= k | p) = tail; the upper one of k hits P(X <= k | p) = tail."""
    draws, hits, others, significance = 50, 30, 7, 0.1

    def at_least(k: int, p: float) -> float:
        return sum(math.comb(draws, i) * p**i * (1 - p) ** (draws - i) for i in range(k, draws + 1))

    def solve(function, target: float) -> float:  # type: ignore[no-untyped-def]
        low, high = 0.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if function(middle) < target else (low, middle)
        return low

    lower = solve(lambda p: at_least(hits, p), significance / 2)
    upper = solve(lambda p: at_least(others + 1, p), 1 - significance / 2)
    assert audits.lower_bound(hits, others, draws, significance) == pytest.approx(math.log(lower / upper), abs=1e-9)


def test_nothing_follows_from_equal_or_missing_counts() -> None:
    assert audits.lower_bound(10, 10, 100, 0.05) == 0.0
    assert audits.lower_bound(0, 0, 100, 0.05) == 0.0
    assert audits.lower_bound(0, 100, 100, 0.05) == 0.0
    assert audits.lower_bound(1_000_000, 0, 1_000_000, 0.05) == pytest.approx(math.log(1_000_000 / 3.69), rel=1e-3)


def test_the_confidence_is_kept() -> None:
    """A claim that is exactly right is refuted by chance in fewer than the stated share of audits."""
    rng = np.random.default_rng(1)
    table = np.array([[0.6, 0.4], [0.3, 0.7]])
    claim = math.log(2)
    wrong = sum(
        audits.audit(lambda side, n: rng.choice(2, size=n, p=table[side]), [(0, 1)], claim, 400, 2).refuted
        for _ in range(300)
    )
    assert wrong <= 300 * audits.SIGNIFICANCE + 10
