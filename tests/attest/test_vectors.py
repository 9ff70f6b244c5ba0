"""The project's own conformance vectors, through the library and through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.attest.evidence import Check, Result
from cloister.attest.receipt import ReceiptCheck
from cloister.attest.vector import ReceiptVector, Vector
from cloister.attest.verify import verify
from cloister.errors import EvidenceError, EvidenceUnsupportedError, SettingsError

FOLDER = Path(__file__).resolve().parents[1] / "vectors"
ALL = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
RECEIPTS = [name for name in ALL if name.startswith("receipt-")]
CASES = [name for name in ALL if name not in RECEIPTS]
SCRIPTS = FOLDER.parents[1] / "scripts"


@pytest.mark.parametrize("name", CASES)
def test_vector(name: str) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_bytes())
    case = Vector.decode((FOLDER / name / "input.json").read_bytes())
    verdict = verify(case.evidence, case.expectations.policy, case.time, case.expectations.roots)
    assert verdict.result.value == expected["result"]
    assert sorted({check.value for check in verdict.failed}) == expected["failed"]
    assert (verdict.claims.measurement.hex() if verdict.claims else None) == expected["measurement"]


@pytest.mark.parametrize("name", RECEIPTS)
def test_vector_of_a_receipt(name: str) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_bytes())
    case = ReceiptVector.decode((FOLDER / name / "input.json").read_bytes())
    if expected["failed"] == ["format"]:
        kind = EvidenceUnsupportedError if expected["result"] == "unsupported" else EvidenceError
        with pytest.raises(kind):
            case.verdict()
        return
    verdict = case.verdict()
    assert (verdict.result.value, list(verdict.failed)) == (expected["result"], expected["failed"])
    claims = verdict.evidence.claims
    assert (claims.measurement.hex() if claims else None) == expected["measurement"]


@pytest.mark.parametrize("script", ["make_vectors.py", "make_receipt_vectors.py"])
def test_the_vectors_are_those_that_the_script_states(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_vectors_of_receipts_cover_every_result_and_every_check_of_one() -> None:
    expected = [json.loads((FOLDER / name / "expected.json").read_bytes()) for name in RECEIPTS]
    assert {case["result"] for case in expected} == {result.value for result in Result}
    failed = {check for case in expected for check in case["failed"]}
    assert {check.value for check in ReceiptCheck} - {"evidence"} <= failed


def test_the_vectors_cover_every_result_and_every_check_of_a_report() -> None:
    expected = [json.loads((FOLDER / name / "expected.json").read_bytes()) for name in CASES]
    assert {case["result"] for case in expected} == {result.value for result in Result}
    failed = {check for case in expected for check in case["failed"]}
    assert failed == {check.value for check in Check} - {"platform", "nonce"}


RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from cloister.cli.main import app
for path in sys.stdin.read().split():
    done = CliRunner().invoke(app, ["verify", "--vector", path, "--json"])
    print(json.dumps([done.exit_code, json.loads(done.stdout)]))
done = CliRunner().invoke(app, ["verify", path, "--measurement", "any"])
print(done.exit_code)
"""


def test_the_command_line_agrees_and_believes_a_vector_only_when_told_to() -> None:
    """In one process of its own: the program as users start it, without the type checks of the tests."""
    paths = "\n".join(str(FOLDER / name / "input.json") for name in ALL)
    done = subprocess.run([sys.executable, "-c", RUN_ALL], input=paths, capture_output=True, text=True, check=True)
    *lines, without_the_option = done.stdout.splitlines()
    assert len(lines) == len(ALL)
    for name, line in zip(ALL, lines, strict=True):
        expected = json.loads((FOLDER / name / "expected.json").read_bytes())
        code, printed = json.loads(line)
        assert (code, printed["exit_code"]) == (expected["exit_code"],) * 2, name
        assert (printed["result"], printed["failed"]) == (expected["result"], expected["failed"]), name
        assert (printed["claims"] or {}).get("measurement") == expected["measurement"], name
    assert without_the_option == "30"


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"time": "2026-01-01T00:00:00"}, {"report_data": "zz"}, {"more": 1}]
)
def test_what_is_no_vector_is_refused(change: dict[str, object]) -> None:
    document = json.loads((FOLDER / "sgx-accepted" / "input.json").read_bytes()) | change
    with pytest.raises(SettingsError):
        Vector.decode(json.dumps(document).encode())


@pytest.mark.parametrize(
    "change", [{"format": "cloister-vector/1"}, {"time": "2026-01-01T00:00:00"}, {"model_roots": ["zz"]}, {"more": 1}]
)
def test_what_is_no_vector_of_a_receipt_is_refused(change: dict[str, object]) -> None:
    document = json.loads((FOLDER / "receipt-accepted" / "input.json").read_bytes()) | change
    with pytest.raises(SettingsError):
        ReceiptVector.decode(json.dumps(document).encode())
