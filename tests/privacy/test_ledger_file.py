"""The ledger's file: versions before, damage, another program's file, absence, and who may read it."""

import os
import sqlite3
from pathlib import Path

import pytest

from cloister.errors import BudgetError, LedgerError
from cloister.privacy.ledger import Ledger

from .ledgers import entry, opened

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")


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
