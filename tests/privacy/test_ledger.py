"""The ledger: what it charges, what it refuses, and what a session keeps once it is opened."""

import contextlib
import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import BudgetError
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.filters import Filter
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost

from .ledgers import curve_of, entry, opened

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")


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
    with contextlib.closing(Ledger.open(path)) as ledger:
        for name in ("a", "b", "c"):
            ledger.open_session(name, 16.0, pure(2.0), "words")
            ledger.open_session(f"{name}, more", 17.0, pure(2.0), "words")
    assert [arguments[0] for arguments in asked[1:]] == [16.0, 17.0]  # once for all that are alike


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
