"""Reservations: they change no decision, and a kill, a fork, a second process or a full disk forgets nothing."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import BudgetError, LedgerError
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost
from cloister.privacy.reservation import MOST_DRAWS

from .ledgers import entry, opened

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")


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
