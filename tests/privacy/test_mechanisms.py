"""The four mechanisms: exact tables against noise, OpenDP and closed forms; integers that keep their certificates."""

import math
import os
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import CertificateError
from cloister.privacy.certificate import (
    TOTAL,
    certificate,
    certify,
    exact_ratio,
    exponential_below,
    hockey_stick,
    log_up,
)  # fmt: skip
from cloister.privacy.channel import Channel, quantise
from cloister.privacy.linear_program import Attack, attack_cap, best_channel, default_cap
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.noisy_max import (
    TABLES,
    analytic_table,
    bayes_attack,
    exact_epsilon,
    exact_table,
    randomised_response,
    sensitivity,
)

NOISE = {
    Mechanism.LAPLACE_RNM: lambda rng, shape: rng.laplace(size=shape),
    Mechanism.GUMBEL: lambda rng, shape: rng.gumbel(size=shape),
    Mechanism.PERMUTE_AND_FLIP: lambda rng, shape: rng.exponential(size=shape),
}


def similarities(rng: np.random.Generator, count: int, dimensions: int = 8) -> np.ndarray:
    vectors = rng.normal(size=(count, dimensions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


@pytest.mark.parametrize("mechanism", TABLES)
def test_a_table_is_the_distribution_of_the_noisy_maximum(mechanism: Mechanism, rng: np.random.Generator) -> None:
    scores, draws = similarities(rng, 6), 200_000
    table = TABLES[mechanism](scores, 0.4)
    for row, expected in zip(scores, table, strict=True):
        winners = (row + 0.4 * NOISE[mechanism](rng, (draws, 6))).argmax(axis=1)
        seen = np.bincount(winners, minlength=6) / draws
        assert np.abs(seen - expected).max() < 6 * math.sqrt(0.25 / draws)  # six standard deviations


def test_permute_and_flip_is_its_textbook_loop(rng: np.random.Generator) -> None:
    accept = np.exp(np.array([-2.0, -0.5, 0.0, -0.1]))
    counts = np.zeros(4)
    for _ in range(40_000):
        for candidate in rng.permutation(4):
            if rng.random() < accept[candidate]:
                counts[candidate] += 1
                break
    table = TABLES[Mechanism.PERMUTE_AND_FLIP](np.log(accept)[None, :], 1.0)[0]
    assert np.abs(counts / 40_000 - table).max() < 0.015


def test_the_tables_of_opendp_are_ours(rng: np.random.Generator) -> None:
    dp = pytest.importorskip("opendp.prelude", reason="opendp is not installed")
    dp.enable_features("contrib")
    scores = similarities(rng, 8)[:1]
    epsilon, spread = 2.0, 1.0
    space = dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.linf_distance(T=float)
    measures = {
        Mechanism.PERMUTE_AND_FLIP: dp.max_divergence(),
        Mechanism.GUMBEL: dp.zero_concentrated_divergence(),
    }
    for mechanism, measure in measures.items():
        theirs = dp.m.make_noisy_max(*space, measure, scale=2 * spread / epsilon)
        spent = theirs.map(spread)
        assert spent == pytest.approx(epsilon if mechanism is Mechanism.PERMUTE_AND_FLIP else epsilon**2 / 8)
        draws = 8_000
        seen = np.bincount([theirs(scores[0].tolist()) for _ in range(draws)], minlength=8)
        expected = TABLES[mechanism](scores, 2 * spread / epsilon)[0] * draws
        statistic = float(((seen - expected) ** 2 / expected).sum())
        assert statistic < 35  # chi-square with 7 degrees of freedom exceeds this once in 90,000


@pytest.mark.parametrize("mechanism", TABLES)
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_the_analytic_scale_keeps_its_promise_and_the_exact_one_spends_it(
    mechanism: Mechanism, epsilon: float, rng: np.random.Generator
) -> None:
    scores = similarities(rng, 20)
    analytic = exact_epsilon(analytic_table(mechanism, scores, epsilon))
    assert analytic <= epsilon * (1 + 1e-9)
    exact = exact_table(mechanism, scores, epsilon)
    assert exact_epsilon(exact) == pytest.approx(epsilon, rel=1e-6)
    assert analytic < 0.9 * epsilon, "the worst case of the formula is not reached by real similarities"


def test_half_the_scale_spends_twice_the_epsilon() -> None:
    # One candidate gains Δ while a thousand others lose it: similarities are not monotone, so Δ/ε breaks the promise.
    first = np.concatenate([[1.0], np.zeros(999)])
    scores = np.stack([first, 1.0 - first])
    for mechanism, table in TABLES.items():
        assert exact_epsilon(table(scores, 2 * sensitivity(scores) / 1.0)) <= 1.0
        assert exact_epsilon(table(scores, sensitivity(scores) / 1.0)) > 1.5, mechanism


def test_the_linear_program_beats_the_exponential_mechanism_at_equal_epsilon_and_attack(
    rng: np.random.Generator,
) -> None:
    scores, prior = similarities(rng, 20), np.full(20, 0.05)
    for epsilon in (0.5, 1.0, 2.0, 4.0):
        exponential = exact_table(Mechanism.GUMBEL, scores, epsilon)
        attack = bayes_attack(exponential, prior)
        ours = best_channel(scores, prior, epsilon, [Attack(prior, attack)])
        assert bayes_attack(ours, prior) <= attack + 1e-7
        assert exact_epsilon(ours) <= epsilon
        gained = (prior[:, None] * ours * scores).sum() - (prior[:, None] * exponential * scores).sum()
        assert gained > 0.02


def test_the_compact_program_is_the_obvious_one(rng: np.random.Generator) -> None:
    """The obvious one compares every pair of spans."""
    from scipy.optimize import linprog

    count, epsilon = 5, 1.0
    scores, prior = similarities(rng, count), np.array([0.3, 0.25, 0.2, 0.15, 0.1])
    attackers = [Attack(prior, 0.4), Attack(np.full(count, 1 / count), 0.3)]
    cells, width = count * count, count * (count + len(attackers))
    factor = math.exp(epsilon * (1 - 5e-4))
    rows, limits = [], []
    for y in range(count):
        for x in range(count):
            for other in range(count):
                row = np.zeros(width)
                row[x * count + y] += 1.0
                row[other * count + y] -= factor
                rows.append(row)
                limits.append(0.0)
    for place, attacker in enumerate(attackers):
        first = cells + place * count
        for y in range(count):
            for x in range(count):
                row = np.zeros(width)
                row[x * count + y], row[first + y] = attacker.prior[x], -1.0
                rows.append(row)
                limits.append(0.0)
        total = np.zeros(width)
        total[first : first + count] = 1.0
        rows.append(total)
        limits.append(attacker.success)
    sums = np.zeros((count, width))
    for x in range(count):
        sums[x, x * count : (x + 1) * count] = 1.0
    obvious = linprog(
        np.concatenate([-(prior[:, None] * scores).ravel(), np.zeros(width - cells)]),
        A_ub=np.array(rows), b_ub=np.array(limits), A_eq=sums, b_eq=np.ones(count), bounds=(0, None),
    )  # fmt: skip
    ours = best_channel(scores, prior, epsilon, attackers)
    assert (prior[:, None] * ours * scores).sum() == pytest.approx(-obvious.fun, abs=1e-8)
    for attacker in attackers:
        assert bayes_attack(ours, attacker.prior) <= attacker.success + 1e-9


def test_a_cap_goes_from_a_guess_over_the_exponential_mechanism_to_all_that_epsilon_allows(
    rng: np.random.Generator,
) -> None:
    scores, prior = similarities(rng, 12), rng.dirichlet(np.ones(12))
    for known in (prior, np.full(12, 1 / 12)):
        steps = [attack_cap(scores, known, 2.0, cap).success for cap in (0.0, 0.5, 1.0, 1.5, 2.0)]
        assert steps == sorted(steps)
        assert steps[0] == pytest.approx(known.max())
        assert steps[2] == pytest.approx(bayes_attack(exact_table(Mechanism.GUMBEL, scores, 2.0), known), abs=1e-6)
    assert steps[4] == pytest.approx(math.e**2 / (math.e**2 + 11)), "equally frequent spans: the ceiling"
    assert exact_epsilon(randomised_response(12, 2.0)) == pytest.approx(2.0)
    assert [default_cap(epsilon) for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)] == [0.5, 0.5, 0.5, 1.0, 1.5, 2.0]


def test_epsilon_is_certified_whatever_the_frequencies(rng: np.random.Generator) -> None:
    """Frequencies shape the table, and what the attacker knows; the certificate looks at the integers alone."""
    scores, claim = similarities(rng, 16), Fraction(1)
    uniform = np.full(16, 1 / 16)
    gains = {}
    for name, prior in (("frequent", rng.dirichlet(np.full(16, 0.2))), ("uniform", uniform)):
        attackers = [attack_cap(scores, known, 1.0, 0.5) for known in (prior, uniform)]
        weights = quantise(best_channel(scores, prior, 1.0, attackers), claim)
        assert certify(weights, claim) <= exponential_below(claim)
        for attacker in attackers:
            assert bayes_attack(weights / TOTAL, attacker.prior) <= attacker.success + 1e-6
        gains[name] = (prior[:, None] * weights / TOTAL * scores).sum()
    assert gains["frequent"] > gains["uniform"], "spans that are frequent count for more"


@settings(max_examples=15)
@given(count=st.integers(2, 16), epsilon=st.sampled_from(["1/2", "1", "2", "4", "8"]), seed=st.integers(0, 10_000))
def test_integers_keep_the_epsilon_exactly(count: int, epsilon: str, seed: int) -> None:
    claim = Fraction(epsilon)
    scores = similarities(np.random.default_rng(seed), count)
    for mechanism in TABLES:
        table = exact_table(mechanism, scores, float(claim) * (1 - 5e-4))
        weights = quantise(table, claim)
        assert (weights.sum(axis=1) == TOTAL).all()
        assert certify(weights, claim) <= exponential_below(claim)
        assert np.abs(weights / TOTAL - table).max() < 1e-6


def test_a_channel_from_the_program_is_certified_and_close_to_its_claim(rng: np.random.Generator) -> None:
    for count, epsilon in ((2, "1/2"), (20, "1"), (40, "4"), (20, "8")):
        scores, prior = similarities(rng, count), np.full(count, 1 / count)
        claim = Fraction(epsilon)
        cap = attack_cap(scores, prior, float(claim), 0.5)
        weights = quantise(best_channel(scores, prior, float(claim), [cap]), claim)
        spent = certificate(weights)
        assert 0.99 * claim < spent.epsilon <= float(claim)
        assert spent.rho <= spent.epsilon**2 / 2 * (1 + 1e-9)
        assert bayes_attack(weights / TOTAL, prior) <= cap.success + 1e-6


def test_the_exponential_mechanism_is_of_bounded_range_and_permute_and_flip_is_not(rng: np.random.Generator) -> None:
    scores = similarities(rng, 20)
    gumbel = certificate(quantise(exact_table(Mechanism.GUMBEL, scores, 0.9995), Fraction(1)))
    flip = certificate(quantise(exact_table(Mechanism.PERMUTE_AND_FLIP, scores, 0.9995), Fraction(1)))
    assert log_up(gumbel.spread) > 0
    assert gumbel.rho < 0.5 * gumbel.epsilon**2
    assert flip.rho > gumbel.rho * 0.99


def test_a_table_that_spends_more_than_it_claims_is_refused() -> None:
    fair = np.array([[TOTAL // 2, TOTAL // 2], [TOTAL // 2, TOTAL // 2]])
    assert certify(fair, Fraction(0)) == 1
    double = np.array([[TOTAL // 3, TOTAL - TOTAL // 3], [2 * (TOTAL // 3), TOTAL - 2 * (TOTAL // 3)]])
    assert exact_ratio(double) == 2
    certify(double, Fraction(7, 10))
    with pytest.raises(CertificateError, match=r"ε = 0\.69.* more than the 0\.69 "):
        certify(double, Fraction(69, 100))
    with pytest.raises(CertificateError, match="infinite"):
        certify(np.array([[TOTAL, 0], [TOTAL // 2, TOTAL // 2]]), Fraction(16))
    with pytest.raises(CertificateError, match="sum"):
        certify(fair + np.array([[1, 0], [0, 0]]), Fraction(1))
    with pytest.raises(CertificateError, match="sum"):
        certify(np.array([[-1, TOTAL + 1], [TOTAL // 2, TOTAL // 2]]), Fraction(1))
    with pytest.raises(CertificateError, match="shape"):
        certify(fair[:1], Fraction(1))
    with pytest.raises(CertificateError, match="Allowed"):
        certify(fair, Fraction(-1))


def test_the_rational_exponential_is_below_the_real_one_and_close() -> None:
    for epsilon in (Fraction(0), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(8), Fraction(16)):
        below = exponential_below(epsilon)
        real = Fraction((Decimal(epsilon.numerator) / epsilon.denominator).exp(Context(prec=60)))
        assert real * (1 - Fraction(1, 2**60)) < below <= real


def test_a_draw_is_the_obvious_walk_through_the_weights(rng: np.random.Generator) -> None:
    tables = [
        quantise(exact_table(Mechanism.GUMBEL, similarities(rng, count), 2.0), Fraction(3)) for count in (5, 9, 3)
    ]
    script = os.urandom(4 * 3000)
    position = 0

    def source(count: int) -> bytes:
        nonlocal position
        position += count
        return script[position - count : position]

    classes = rng.integers(0, 3, 3000).tolist()
    members = [int(rng.integers(0, len(tables[c]))) for c in classes]
    drawn = Channel(tables, source).draw(classes, members)
    for index, (c, m) in enumerate(zip(classes, members, strict=True)):
        bits = int.from_bytes(script[4 * index : 4 * index + 4], "little")
        candidate = 0
        for weight in tables[c][m].tolist():
            if bits < weight:
                break
            bits -= weight
            candidate += 1
        assert drawn[index] == candidate
    with pytest.raises(IndexError):
        Channel(tables).draw([2], [3])


def test_the_edges_of_a_row_belong_to_the_right_candidate() -> None:
    table = np.array([[0, 1, TOTAL - 1], [0, TOTAL, 0], [0, 0, TOTAL]])
    for bits, member, expected in ((0, 0, 1), (1, 0, 2), (2**32 - 1, 0, 2), (2**32 - 1, 1, 1), (0, 2, 2)):
        channel = Channel([table], lambda count, b=bits: b.to_bytes(count, "little"))
        assert channel.draw([0], [member]) == [expected]


def test_the_hockey_stick_curve_is_the_worst_pair(rng: np.random.Generator) -> None:
    table = exact_table(Mechanism.GUMBEL, similarities(rng, 5), 1.0)
    grid = np.linspace(-1.0, 1.0, 9)
    curve = hockey_stick(table, grid)
    for epsilon, delta in zip(grid, curve, strict=True):
        worst = max(
            sum(max(0.0, p - math.exp(epsilon) * q) for p, q in zip(table[a], table[b], strict=True))
            for a in range(5)
            for b in range(5)
        )
        assert delta == pytest.approx(worst, abs=1e-12)
    assert curve[-1] == pytest.approx(0.0, abs=1e-6), "nothing exceeds e^ε at the ε of the table"
