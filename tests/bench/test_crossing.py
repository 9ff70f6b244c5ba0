"""The cost of the sanitising enclave's own process is measured with a real one."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cloister.assets import demo_model
from tests.demo_candidates import write_candidates

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
pytest.importorskip("lemminflect", reason="lemminflect is not installed")


def test_both_ways_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister.bench.crossing import run

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    write_candidates(tmp_path / "candidates")
    console = Console(file=io.StringIO())
    record = run(Path(demo_model()), tmp_path / "candidates", ["rules"], 300, True, console)
    assert [row["what"] for row in record.rows] == ["a letter", "a chat of up to 8", "a token of a split"]
    assert all(row["here"] > 0 and row["there"] > 0 for row in record.rows)
