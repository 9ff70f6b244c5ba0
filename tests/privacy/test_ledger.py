"""The ledger: its sums against closed forms, its refusals, and what a kill, a second process or a damaged file do to it."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import BudgetError, LedgerError, PrivacyError
from cloister.privacy.accounting import Charge, compose, pure, zcdp_budget, zcdp_epsilon
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost, DominatingCurve

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")

ROUNDING = 1e-9


def entry(epsilon: float = 2.0, count: int = 1) -> Entry:
    return Entry("word", Charge(pure(epsilon), count))


def opened(path: Path, budget: float = 16.0) -> Ledger:
    ledger = Ledger.open(path)
    ledger.open_session("s", budget, pure(2.0), "words in place")
    return ledger


def curve_of(table: np.ndarray, gap: float = 0.01) -> DominatingCurve:
    epsilon = float(np.log((table.max(0) / table.min(0)).max()))
    edge = math.ceil(epsilon / gap)
    deltas = [
        max(float(np.maximum(0, a - math.exp(i * gap) * b).sum()) for a in table for b in table)
        for i in range(-edge, edge + 1)
    ]
    deltas[-1] = 0.0
    return DominatingCurve(-edge * gap, gap, tuple(float(d) for d in np.minimum.accumulate(deltas)))


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


def test_budget_is_spent_to_its_end_and_not_beyond(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.db")
    for _ in range(4):
        ledger.charge("s", [entry(2.0, 2)])
    with pytest.raises(BudgetError, match=r"needs ε = 2 and 0 of 16 is left.*Nothing was sent"):
        ledger.charge("s", [entry(2.0)])
    assert ledger.charge("s", [], repeated=3).left == 0.0  # repeating what was said costs nothing
    report = ledger.report("s")
    assert (report.prompts, report.spans, report.repeated) == (5, 8, 3)
    assert report.spent.basic == pytest.approx(16)
    ledger.close()


def test_a_prompt_is_charged_whole_or_not_at_all(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.db", budget=5.0)
    with pytest.raises(BudgetError):
        ledger.charge("s", [entry(2.0, 2), entry(1.5)])
    assert ledger.report("s").spent.draws == 0
    ledger.charge("s", [entry(2.0, 2), entry(1.0)])
    ledger.close()


def test_many_cheap_draws_are_filtered_by_zcdp(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db")
    cheap = Cost(0.5, 0.25 / 8)
    ledger.open_session("s", 16.0, cheap, "words")
    ledger.charge("s", [Entry("word", Charge(cheap, 64))])  # twice what basic composition would admit
    report = ledger.report("s")
    assert report.rule == "zCDP"
    assert report.spent.basic == pytest.approx(32)
    assert report.spent.epsilon < 16
    with pytest.raises(BudgetError):
        ledger.charge("s", [Entry("word", Charge(cheap, 64))])
    ledger.close()


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_admits_nothing_or_everything_is_refused(tmp_path: Path, budget: float) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db")
    with pytest.raises(BudgetError, match="admits no prompt"):
        ledger.open_session("s", budget, pure(2.0), "words")
    assert ledger.sessions() == []
    ledger.close()


def test_a_session_keeps_its_budget_and_policy(tmp_path: Path) -> None:
    opened(tmp_path / "ledger.db").close()
    ledger = opened(tmp_path / "ledger.db")
    with pytest.raises(BudgetError, match="opened with a budget of 16"):
        ledger.open_session("s", 32.0, pure(2.0), "words in place")
    with pytest.raises(BudgetError, match="policy"):
        ledger.open_session("s", 16.0, pure(2.0), "nothing")
    ledger.close()


def test_kill_forgets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    script = """
        import sys
        from pathlib import Path
        from cloister.privacy.accounting import Charge, pure
        from cloister.privacy.ledger import Entry, Ledger
        ledger = Ledger.open(Path(sys.argv[1]))
        ledger.open_session("s", 1e6, pure(2.0), "words in place")
        while True:
            ledger.charge("s", [Entry("word", Charge(pure(2.0)))])
            print("charged", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    seen = sum(1 for _ in zip(range(5), child.stdout, strict=False))
    os.kill(child.pid, signal.SIGKILL)
    seen += len(child.stdout.read().splitlines())
    child.stdout.close()
    child.wait()
    ledger = Ledger.open(path)
    assert seen <= ledger.report("s").spent.draws <= seen + 1  # the last may be on the disk and not yet said
    ledger.close()


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    opened(path, budget=40.0).close()
    script = """
        import sys
        from pathlib import Path
        from cloister.errors import BudgetError
        from cloister.privacy.accounting import Charge, pure
        from cloister.privacy.ledger import Entry, Ledger
        ledger, paid = Ledger.open(Path(sys.argv[1])), 0
        try:
            while True:
                ledger.charge("s", [Entry("word", Charge(pure(2.0)))])
                paid += 1
        except BudgetError:
            print(paid)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sum(int(child.communicate(timeout=60)[0]) for child in children) == 20


@pytest.mark.parametrize("damage", ["text", "cut", "flipped", "other program", "directory"])
def test_a_damaged_ledger_stops_everything(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.db"
    ledger = opened(path, budget=1000.0)
    for _ in range(40):
        ledger.charge("s", [entry()])
    ledger.close()
    if damage == "text":
        path.write_text("this is no database, but it is quite long enough to be mistaken for the header of one" * 20)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[4096 : 3 * 4096] = os.urandom(2 * 4096)
        path.write_bytes(data)
    elif damage == "other program":
        path.unlink()
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE t (x)")
        other.commit()
        other.close()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(LedgerError) as raised:
        Ledger.open(path)
    assert raised.value.remedy
    assert path.exists()  # nothing was "repaired" away


def test_an_absent_ledger_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    opened(tmp_path / "deep" / "ledger.db").close()
    assert (tmp_path / "deep" / "ledger.db").stat().st_mode & 0o077 == 0
