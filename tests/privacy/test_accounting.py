"""Sums of draws: three bounds against closed forms, against the truth of two draws, and against each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import PrivacyError
from cloister.privacy.accounting import Charge, compose, pure, zcdp_budget, zcdp_epsilon
from cloister.privacy.mechanism import Cost

from .ledgers import curve_of

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")


ROUNDING = 1e-9


def test_known_figures_of_128_draws_at_epsilon_1() -> None:
    # The zCDP figure is the one that an accountant which forgets to count reports as 1.006.
    exponential = compose([Charge(Cost(1.0, 1 / 8), 128)])
    assert exponential.zcdp == pytest.approx(44.29, abs=0.01)
    assert exponential.bound == "zCDP"
    assert compose([Charge(pure(1.0), 128)]).pld == pytest.approx(101.8, abs=0.2)
    assert compose([Charge(pure(1.0), 128)]).basic == pytest.approx(128)


def test_the_curve_of_a_channel_beats_what_holds_for_every_channel(rng: np.random.Generator) -> None:
    scores = rng.uniform(size=(12, 12))
    table = np.exp(scores)
    table /= table.sum(axis=1, keepdims=True)
    epsilon = float(np.log((table.max(0) / table.min(0)).max()))
    draws = [Charge(pure(epsilon), 64)]
    assert compose(draws, curve_of(table)).pld < compose(draws).pld < compose(draws).basic


def test_composition_by_curve_bounds_the_true_loss_of_two_draws() -> None:
    # The slow, obvious twin: all four outcomes of two draws of randomised response, at a delta that they can reach.
    keep = math.e / (math.e + 1)
    table = np.array([[keep, 1 - keep], [1 - keep, keep]])
    delta = 0.1
    twice = [(math.prod(p), math.prod(q)) for p, q in _pairs(table)]

    def true_delta(epsilon: float) -> float:
        return sum(max(0.0, p - math.exp(epsilon) * q) for p, q in twice)

    claimed = compose([Charge(pure(1.0), 2)], curve_of(table, 0.001), delta).pld
    assert true_delta(claimed) <= delta + ROUNDING
    assert true_delta(claimed - 0.02) > delta  # and it is not far above the truth


def _pairs(table: np.ndarray) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return [((table[0, i], table[0, j]), (table[1, i], table[1, j])) for i in (0, 1) for j in (0, 1)]


@given(st.lists(st.tuples(st.floats(0.01, 8), st.integers(1, 40)), min_size=1, max_size=4))
def test_no_bound_falls_below_one_draw_or_exceeds_the_sum(draws: list[tuple[float, int]]) -> None:
    spent = compose([Charge(pure(epsilon), count) for epsilon, count in draws])
    total = math.fsum(epsilon * count for epsilon, count in draws)
    assert spent.basic >= total
    assert 0 < spent.epsilon <= spent.basic
    assert spent.pld <= spent.basic + 0.005 * spent.draws + ROUNDING  # at most a step of its grid per draw above


@given(st.floats(0.01, 60))
def test_a_zcdp_budget_implies_its_epsilon(epsilon: float) -> None:
    assert zcdp_epsilon(zcdp_budget(epsilon)) <= epsilon


@pytest.mark.parametrize("cost", [Cost(-1, 0), Cost(math.inf, 0), Cost(math.nan, 0), Cost(1, 0.6), Cost(101, 1)])
def test_impossible_costs_are_refused(cost: Cost) -> None:
    with pytest.raises(PrivacyError):
        Charge(cost)
