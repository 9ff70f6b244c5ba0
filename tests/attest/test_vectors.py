"""The project's own conformance vectors, through the library and through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister.attest.evidence import Check, Result
from cloister.attest.vector import Vector
from cloister.attest.verify import verify
from cloister.cli.main import app
from cloister.errors import SettingsError

FOLDER = Path(__file__).resolve().parents[1] / "vectors"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
SCRIPT = FOLDER.parents[1] / "scripts" / "make_vectors.py"


@pytest.mark.parametrize("name", CASES)
def test_vector(name: str) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_bytes())
    case = Vector.decode((FOLDER / name / "input.json").read_bytes())
    verdict = verify(case.evidence, case.expectations.policy, case.time, case.expectations.roots)
    assert verdict.result.value == expected["result"]
    assert sorted({check.value for check in verdict.failed}) == expected["failed"]
    assert (verdict.claims.measurement.hex() if verdict.claims else None) == expected["measurement"]


def test_the_vectors_are_those_that_the_script_states() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_vectors_cover_every_result_and_every_check_of_a_report() -> None:
    expected = [json.loads((FOLDER / name / "expected.json").read_bytes()) for name in CASES]
    assert {case["result"] for case in expected} == {result.value for result in Result}
    failed = {check for case in expected for check in case["failed"]}
    assert failed == {check.value for check in Check} - {"platform", "nonce"}


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_agrees(name: str) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_bytes())
    done = CliRunner().invoke(app, ["verify", "--vector", str(FOLDER / name / "input.json"), "--json"])
    assert done.exit_code == expected["exit_code"]
    printed = json.loads(done.stdout)
    assert (printed["result"], printed["failed"]) == (expected["result"], expected["failed"])
    assert (printed["claims"] or {}).get("measurement") == expected["measurement"]


def test_a_vector_is_not_taken_for_evidence() -> None:
    """It brings its own policy: without --vector it must not be believed."""
    path = str(FOLDER / "sgx-accepted" / "input.json")
    assert CliRunner().invoke(app, ["verify", path, "--measurement", "any"]).exit_code == 30


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"time": "2026-01-01T00:00:00"}, {"report_data": "zz"}, {"more": 1}]
)
def test_what_is_no_vector_is_refused(change: dict[str, object]) -> None:
    document = json.loads((FOLDER / "sgx-accepted" / "input.json").read_bytes()) | change
    with pytest.raises(SettingsError):
        Vector.decode(json.dumps(document).encode())
