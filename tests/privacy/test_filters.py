"""The rule that ends a session: what it admits is private, counted by hand for randomised response."""

import contextlib
import math
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import BudgetError, PrivacyError
from cloister.privacy.accounting import DELTA, Charge, compose, pld_dominates, pld_draws, pure, top
from cloister.privacy.certificate import hockey_stick
from cloister.privacy.filters import Filter, chosen
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost, DominatingCurve

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")

GAP = 1 / 64


def response_curve(epsilon: Fraction) -> DominatingCurve:
    """The curve of randomised response at a multiple of the grid, exactly."""
    edge = int(epsilon * 64)
    keep = 1 / (1 + math.exp(-float(epsilon)))
    points = [step * GAP for step in range(-edge, edge + 1)]
    deltas = [max(0.0, keep - math.exp(t) * (1 - keep)) + max(0.0, 1 - keep - math.exp(t) * keep) for t in points]
    return DominatingCurve(-edge * GAP, GAP, (*deltas[:-1], 0.0))


def true_delta(epsilon: float, draws: int, target: float) -> float:
    """The slow, obvious twin: δ at `target` of `draws` randomised responses, summed over the number of true answers."""
    keep = 1 / (1 + math.exp(-epsilon))
    total = 0.0
    for kept in range(draws + 1):
        loss = (2 * kept - draws) * epsilon
        if loss > target:
            log = math.lgamma(draws + 1) - math.lgamma(kept + 1) - math.lgamma(draws - kept + 1)
            total += math.exp(log + kept * math.log(keep) + (draws - kept) * math.log(1 - keep)) * -math.expm1(
                target - loss
            )
    return total


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2)]), st.integers(4, 60))
def test_the_draws_that_fit_are_private_and_not_far_from_all_that_are(epsilon: Fraction, budget: int) -> None:
    draws = pld_draws(float(budget), response_curve(epsilon))
    assert true_delta(float(epsilon), draws, float(budget)) <= DELTA * (1 + 1e-6)
    assert true_delta(float(epsilon), draws + 2, float(budget)) > DELTA * 0.9


@pytest.mark.parametrize(
    ("count", "epsilon"), [(1, 0.9), (1, 1.0), (2, 1.0), (3, 1.0), (2, 1.5), (3, 2.0), (2, 2.2), (1, 1.1), (3, 3.1)]
)
def test_draws_that_are_said_to_dominate_do(count: int, epsilon: float) -> None:
    # The twin compares all points of a fine grid, not only where the curve bends.
    grid = np.linspace(0, 4, 4001)
    worst = np.maximum(0, (math.exp(epsilon) - np.exp(grid)) / (math.exp(epsilon) + 1))
    really = all(true_delta(1.0, count, float(t)) >= w - 1e-12 for t, w in zip(grid, worst, strict=True))
    said = pld_dominates(response_curve(Fraction(1)), count, epsilon)
    assert not said or really
    if (count, epsilon) in {(3, 1.0), (1, 0.9)}:  # two tie with one at t = 0, and a tie is not said to dominate
        assert said


def test_adaptively_chosen_draws_stay_within_what_the_count_promises() -> None:
    # An adversary who looks at each answer before he asks again, and stops when he likes, over all his strategies: the loss at
    # δ is never above that of the full number of draws. (Strategies: go on after a true answer or not, after a false one or not.)
    epsilon, most, target = 1.0, 6, 3.0
    keep = 1 / (1 + math.exp(-epsilon))
    full = true_delta(epsilon, most, target)
    for strategy in product((False, True), repeat=2):
        worst = 0.0
        stack = [(0, 1.0, 0.0)]
        while stack:
            asked, chance, loss = stack.pop()
            if asked == most:
                worst += chance * max(0.0, -math.expm1(target - loss))
                continue
            for truth, likely in ((True, keep), (False, 1 - keep)):
                more = (
                    asked + 1 if strategy[truth] else most,
                    chance * likely,
                    loss + (epsilon if truth else -epsilon),
                )
                stack.append(more)
        assert worst <= full + 1e-12


def test_the_rule_that_admits_most_is_chosen() -> None:
    curve = response_curve(Fraction(1, 2))
    assert chosen(16.0, pure(2.0), None).rule == "basic"
    assert chosen(16.0, Cost(0.5, 0.25 / 8), None).rule == "zCDP"
    counted = chosen(40.0, pure(0.5), curve)
    assert counted.rule == "PLD"
    assert counted.most > 80  # what basic composition admits
    assert chosen(4.0, pure(0.5), curve).rule == "basic"  # too few draws to gain


def several_spans_curve(epsilon: float, members: int) -> DominatingCurve:
    """The curve of randomised response over some members."""
    table = np.ones((members, members)) + math.expm1(epsilon) * np.eye(members)
    deltas = hockey_stick(table / table.sum(1, keepdims=True), np.arange(-64, 65) * (epsilon / 64)) + 1e-12
    deltas = np.minimum(1, np.maximum.accumulate(deltas[::-1])[::-1])
    return DominatingCurve(-epsilon, epsilon / 64, (*deltas.tolist()[:-1], 0.0))


@pytest.mark.parametrize(
    "members", [4, 64]
)  # three draws of 4 dominate any mechanism of their ε; of 64, not even eight
@pytest.mark.parametrize("per_span", [pure(0.5), Cost(0.5, 0.5**2 / 8)])
def test_a_session_admits_as_many_numbers_as_words_leave_under_the_other_rules(
    members: int, per_span: Cost, tmp_path: Path
) -> None:
    curve = several_spans_curve(0.5, members)
    assert pld_draws(32.0, curve) > 2 * 64  # by words alone, draws would be counted
    rule = chosen(32.0, per_span, curve)
    assert rule.rule in ("basic", "zCDP")
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.open_session("s", 32.0, per_span, "words", curve)
    ledger.charge(
        "s", [Entry("number", Charge(pure(0.5), int(rule.most / rule.price(Charge(pure(0.5)))), sampled=False))]
    )
    ledger.close()


def test_a_curve_that_cannot_be_one_is_refused_before_a_rule_is_chosen(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db")
    for height in (0.0, 1e-9):
        forged = DominatingCurve(-0.5, 0.5 / 64, (*(height,) * 128, 0.0))
        with pytest.raises(PrivacyError, match="no.* privacy profile"):
            ledger.open_session("s", 32.0, pure(0.5), "words", forged)
    with pytest.raises(PrivacyError, match="no.* privacy profile"):
        chosen(32.0, pure(0.5), DominatingCurve(-math.inf, 0.5, (1.0, 0.0)))
    assert ledger.sessions() == []
    ledger.close()


def test_what_a_draw_counts_under_each_rule() -> None:
    curve = response_curve(Fraction(1))
    assert top(curve) == 1.0
    counted = Filter("PLD", 100.0, curve)
    assert counted.price(Charge(pure(1.0))) == 1.0
    assert counted.price(Charge(pure(0.2))) == 1.0
    assert counted.price(Charge(pure(2.0))) == math.inf  # one draw of the sampler costs no more than its curve says
    assert counted.price(Charge(pure(0.9), sampled=False)) == 1.0
    assert counted.price(Charge(pure(1.0), sampled=False)) == 1.0
    assert counted.price(Charge(pure(1.2), sampled=False)) in (2.0, 3.0)
    assert counted.price(Charge(pure(90.0), sampled=False)) == math.inf
    assert Filter("basic", 1.0).price(Charge(Cost(2.0, 0.5))) == 2.0
    assert Filter("zCDP", 1.0).price(Charge(Cost(2.0, 0.5))) == 0.5


def test_a_session_counted_by_draws_ends_at_its_number_and_is_resumed(tmp_path: Path) -> None:
    curve = response_curve(Fraction(1, 2))
    each, number = Entry("word", Charge(pure(0.5))), Entry("number", Charge(pure(0.4), sampled=False))
    most = int(chosen(40.0, pure(0.5), curve).most)
    paid = 0
    for part in range(2):
        ledger = Ledger.open(tmp_path / "ledger.db")
        ledger.open_session("s", 40.0, pure(0.5), "words", curve)
        with contextlib.suppress(BudgetError):
            while paid < most // 2 or part:
                assert ledger.charge("s", [number if paid % 2 else each]).used == paid + 1
                paid += 1
        ledger.close()
    assert paid == most
    ledger = Ledger.open(tmp_path / "ledger.db")
    report = ledger.report("s")
    assert (report.rule, report.used, report.most) == ("PLD", most, most)
    assert report.spent.pld <= 40.0
    with pytest.raises(BudgetError, match=r"needs draws = 1 and 0 of"):
        ledger.charge("s", [each])
    with pytest.raises(BudgetError, match=r"draw of ε = 50 cannot be counted by the rule PLD.*Nothing was sent"):
        ledger.charge("s", [Entry("number", Charge(pure(50.0), sampled=False))])
    with pytest.raises(BudgetError, match=r"draw of ε = 1 cannot be counted"):
        ledger.charge("s", [Entry("person", Charge(pure(1.0)))])  # a span in two parts, charged as one draw
    ledger.close()


def test_a_span_in_parts_that_is_charged_as_one_draw_is_not_composed_as_one() -> None:
    curve = response_curve(Fraction(1, 2))
    assert compose([Charge(pure(1.0), 20)], curve).pld >= compose([Charge(pure(0.5), 40)], curve).pld
