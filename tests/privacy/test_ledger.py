"""The ledger: its sums against closed forms, its refusals, and what a kill, a second process or a damaged file do to it."""

import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import BudgetError, LedgerError, PrivacyError
from cloister.privacy.accounting import Charge, compose, pure, zcdp_budget, zcdp_epsilon
from cloister.privacy.filters import Filter
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost, DominatingCurve
from cloister.privacy.reservation import MOST_DRAWS

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


@pytest.mark.parametrize("keep", [0.8, None])
def test_a_session_keeps_the_curve_that_its_rule_counts_by(tmp_path: Path, keep: float | None) -> None:
    first = curve_of(np.array([[0.7, 0.3], [0.3, 0.7]]))
    other = None if keep is None else curve_of(np.array([[keep, 1 - keep], [1 - keep, keep]]))
    with contextlib.closing(Ledger.open(tmp_path / "ledger.db")) as ledger:
        ledger.open_session("s", 16.0, pure(2.0), "words", first)
        with pytest.raises(BudgetError, match="privacy loss is another"):
            ledger.open_session("s", 16.0, pure(2.0), "words", other)
        ledger.open_session("s", 16.0, pure(2.0), "words", first)


def test_the_rule_is_chosen_while_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "ledger.db", []

    def watched(*arguments: object) -> Filter:
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            asked.append(arguments)
        return Filter("basic", 16.0)

    monkeypatch.setattr("cloister.privacy.ledger.chosen", watched)
    opened(path).close()
    opened(path).close()
    assert len(asked) == 1  # a session that is there has its rule


CHARGING = """
    import sys
    from pathlib import Path
    from cloister.errors import BudgetError
    from cloister.privacy.accounting import Charge, pure
    from cloister.privacy.ledger import Entry, Ledger
    ledger = Ledger.open(Path(sys.argv[1]))
    ledger.open_session("s", float(sys.argv[2]), pure(2.0), "words in place")
    paid = 0
    try:
        while True:
            ledger.charge("s", [Entry("word", Charge(pure(2.0)))])
            paid += 1
            if len(sys.argv) > 3:
                print("charged", flush=True)
    except BudgetError:
        print(paid)
"""


def charging(path: Path, budget: float, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(CHARGING), str(path), str(budget), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("after", [1, 5, 300])
def test_kill_forgets_nothing(tmp_path: Path, after: int) -> None:
    path = tmp_path / "ledger.db"
    child = charging(path, 1e6, "loud")
    assert child.stdout is not None
    seen = sum(1 for _ in zip(range(after), child.stdout, strict=False))
    os.kill(child.pid, signal.SIGKILL)
    seen += len(child.stdout.read().splitlines())
    child.stdout.close()
    child.wait()
    ledger = Ledger.open(path)
    report = ledger.report("s")
    assert report.spent.draws <= seen + 1  # the last may be written down and not yet said
    assert report.used >= 2.0 * seen
    assert report.at_most.basic >= 2.0 * seen
    assert report.used == pytest.approx(report.spent.basic + report.reserved.epsilon)
    assert report.reserved.epsilon <= 2.0 * MOST_DRAWS
    ledger.close()


def test_what_a_kill_leaves_reserved_is_spent_for_good(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    child = charging(path, 1e3, "loud")
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with contextlib.closing(opened(path, 1e3)) as ledger:
        before = ledger.report("s")
        admitted = 0
        with contextlib.suppress(BudgetError):
            while True:
                ledger.charge("s", [entry()])
                admitted += 1
    assert before.reserved.epsilon > 0
    assert before.memos == 1  # it was noted before it drew
    assert admitted == (1000 - before.used) // 2


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    opened(path, budget=400.0).close()
    children = [charging(path, 400.0) for _ in range(2)]
    assert sum(int(child.communicate(timeout=60)[0]) for child in children) == 200
    ledger = Ledger.open(path)
    report = ledger.report("s")
    assert (report.spent.draws, report.reserved.epsilon) == (200, 0.0)
    ledger.close()


FORKING = """
    import os, sys
    from pathlib import Path
    from cloister.errors import LedgerError
    from cloister.privacy.accounting import Charge, pure
    from cloister.privacy.ledger import Entry, Ledger
    ledger = Ledger.open(Path(sys.argv[1]))
    ledger.open_session("s", 100.0, pure(2.0), "words in place")
    for _ in range(2):
        ledger.charge("s", [Entry("word", Charge(pure(2.0)))])
    child = os.fork()
    if child == 0:
        try:
            ledger.charge("s", [Entry("word", Charge(pure(2.0)))])
        except LedgerError as error:
            print(error.message, flush=True)
        ledger.close()  # must leave the reservation to the parent
        os._exit(0)
    os.waitpid(child, 0)
    held = ledger._db.execute("SELECT COUNT(*) FROM reservations").fetchone()[0]
    ledger.charge("s", [Entry("word", Charge(pure(2.0)))])
    print(held, ledger.report("s").spent.draws)
    ledger.close()
"""


def test_a_forked_process_does_not_spend_its_parents_reservation(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKING), str(tmp_path / "ledger.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    refusal, kept = done.stdout.splitlines()
    assert "before this process was forked; nothing was sent" in refusal
    assert kept == "1 3"


def test_a_prompt_within_a_reservation_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.db", budget=1000.0)
    ledger.charge("s", [entry()])  # this one reserves for others
    watcher = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    watcher.execute("BEGIN IMMEDIATE")  # nothing can be written now
    for number in range(20):
        receipt = ledger.charge("s", [entry()])
        assert receipt.used == 4.0 + 2.0 * number
    watcher.execute("ROLLBACK")
    watcher.close()
    assert ledger.report("s").spent.draws == 21
    ledger.close()


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger.db", budget=64.0)
    paid = 0
    ledger.charge("s", [entry()])
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk: SQLite says SQLITE_FULL
    with pytest.raises(LedgerError, match=r"cannot be written.*nothing was sent"):
        while True:
            ledger.charge("s", [Entry("word" * 400, Charge(pure(0.01)))])
            paid += 1
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert ledger.charge("s", [entry()]).used == pytest.approx(4.0 + 0.01 * paid)  # it goes on, and knows what was paid
    ledger.close()
    ledger = Ledger.open(tmp_path / "ledger.db")
    assert ledger.report("s").spent.draws == 2 + paid
    ledger.close()


class Model:
    """The slow, obvious twin: every prompt ever admitted, summed anew each time, in exact arithmetic."""

    def __init__(self, most: int) -> None:
        self.most = Fraction(most)
        self.prompts: list[list[tuple[Fraction, int]]] = []

    @property
    def used(self) -> Fraction:
        return sum((price * count for prompt in self.prompts for price, count in prompt), Fraction(0))

    def admits(self, prompt: list[tuple[Fraction, int]]) -> bool:
        return self.used + sum((p * n for p, n in prompt), Fraction(0)) <= self.most


PROMPT = st.lists(
    st.tuples(st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(2), Fraction(5)]), st.integers(1, 3)),
    max_size=2,
)


@settings(max_examples=20)
@given(st.integers(1, 60), st.lists(st.tuples(PROMPT, st.sampled_from(["", "write", "reopen"])), max_size=30))
def test_reservations_change_no_decision_and_no_sum(
    most: int, steps: list[tuple[list[tuple[Fraction, int]], str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "ledger.db", Model(most)
        ledger = opened(path, float(most))
        for prompt, then in steps:
            entries = [entry(float(price), count) for price, count in prompt]
            if model.admits(prompt):
                model.prompts.append(prompt)
                assert ledger.charge("s", entries).used == float(model.used)
            else:
                with pytest.raises(BudgetError):
                    ledger.charge("s", entries)
            if then == "write":
                assert ledger.report("s").prompts == len(model.prompts)
            elif then == "reopen":
                ledger.close()
                ledger = opened(path, float(most))
                assert ledger.report("s").reserved == Cost(0.0, 0.0)
        report = ledger.report("s")
        assert report.spent.draws == sum(count for prompt in model.prompts for _, count in prompt)
        assert [len(p.kinds) > 0 for p in ledger.prompts("s", 1000)] == [bool(prompt) for prompt in model.prompts]
        assert report.used == float(model.used) + report.reserved.epsilon <= most
        ledger.close()


@settings(max_examples=20)
@given(
    st.integers(4, 80),
    st.lists(st.tuples(st.integers(0, 1), PROMPT, st.sampled_from(["", "write", "close", "crash"])), max_size=30),
)
def test_gateways_that_share_a_ledger_and_die_never_overspend(
    most: int, steps: list[tuple[int, list[tuple[Fraction, int]], str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "ledger.db", Model(most)
        ledgers = [opened(path, float(most)), opened(path, float(most))]
        for which, prompt, then in steps:
            with contextlib.suppress(BudgetError):
                ledgers[which].charge("s", [entry(float(price), count) for price, count in prompt])
                model.prompts.append(prompt)
            assert model.used <= most
            if then == "write":
                assert ledgers[which].report("s").used >= float(model.used)
            elif then:
                if then == "crash":
                    with ledgers[which]._file:  # its thread may be writing: SQLite is not closed under that
                        ledgers[which]._db.close()  # what it had not written down is lost
                with contextlib.suppress(LedgerError):
                    ledgers[which].close()
                ledgers[which] = opened(path, float(most))
                assert ledgers[which].report("s").used >= float(model.used)
        for ledger in ledgers:
            ledger.close()
        ledger = Ledger.open(path)
        report = ledger.report("s")
        assert float(model.used) <= report.used <= most
        if all(then != "crash" for _, _, then in steps):
            assert report.used == float(model.used)  # all that was reserved is given back
        ledger.close()


def test_a_span_costs_as_many_draws_as_there_were_memos(tmp_path: Path) -> None:
    """Every memo draws once for a span, so a span that is drawn again after a restart costs again."""
    path = tmp_path / "ledger.db"
    for memos in range(1, 4):
        ledger = opened(path, budget=100.0)
        ledger.charge("s", [], repeated=1)  # draws nothing, as the gateway does that is started and not used
        assert ledger.report("s").memos == memos - 1
        for _ in range(3):
            ledger.charge("s", [entry(2.0)])
        report = ledger.report("s")
        assert (report.memos, report.largest, report.of_a_span) == (memos, 2.0, 2.0 * memos)
        ledger.close()
    ledger = opened(path, budget=100.0)
    assert ledger.report("s").memos == 3
    ledger.open_session("s", 100.0, pure(2.0), "words in place")  # another sanitiser of the same process
    ledger.charge("s", [entry(2.0)])
    assert ledger.report("s").memos == 5  # either may have drawn
    ledger.close()


def test_a_memo_is_counted_by_the_prompt_that_draws_first_and_by_no_refused_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = opened(path, budget=3.0)
    with pytest.raises(BudgetError):
        ledger.charge("s", [entry(2.0, 2)])
    assert ledger.report("s").memos == 0
    ledger.charge("s", [entry(2.0)])
    report = ledger.report("s")
    assert (report.memos, report.of_a_span) == (1, 2.0)
    ledger.close()


@pytest.mark.parametrize("version", [1, 2])
def test_a_ledger_of_a_version_before_is_taken_over(tmp_path: Path, version: int) -> None:
    path = tmp_path / "ledger.db"
    ledger = opened(path, budget=20.0)
    ledger.charge("s", [entry(2.0, 3)])
    ledger.close()
    old = sqlite3.connect(path, isolation_level=None)
    for table in ("memos", "totals", "reservations", "next_prompt")[: 4 if version == 1 else 1]:
        old.execute(f"DROP TABLE {table}")
    old.execute(f"PRAGMA user_version = {version}")
    old.close()
    ledger = opened(path, budget=20.0)
    assert ledger.report("s").used == 6.0
    assert ledger.report("s").memos == 1
    assert ledger.charge("s", [entry(2.0, 7)]).left == 0.0
    with pytest.raises(BudgetError):
        ledger.charge("s", [entry(0.25)])
    assert [prompt.prompt for prompt in ledger.prompts("s")] == [1, 2]
    ledger.close()


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
