"""What the makers of conformance vectors share: writing vectors that our verifier agrees with, and checking a folder of them."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors"
EXIT = {"accepted": 0, "refused": 10, "unsupported": 20, "malformed": 30}
RECEIPTS = "receipt-"
"""How the names of vectors of receipts begin; all others are of evidence."""

Judged = Callable[[bytes], tuple[str, list[str], str | None]]
"""From an input.json to result, failed checks and measurement, as our verifier finds them."""


class Case(Protocol):
    """One vector, with what must come of it."""

    @property
    def name(self) -> str:
        """Its folder."""

    @property
    def result(self) -> str:
        """A key of `EXIT`."""

    @property
    def failed(self) -> tuple[str, ...]:
        """The checks that fail."""

    def document(self) -> bytes:
        """Returns input.json."""


def run(usage: str | None, receipts: bool, cases: Callable[[], Sequence[Case]], judged: Judged) -> None:
    """Writes the vectors of receipts or of evidence; with --check on the command line it only compares."""
    arguments = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing")
    check_only = arguments.parse_args().check
    check(cases(), receipts) if check_only else write(cases(), receipts, judged)


def write(found: Sequence[Case], receipts: bool, judged: Judged) -> None:
    """Writes every vector, if our verifier agrees with what is stated."""
    made: dict[str, tuple[bytes, bytes]] = {}
    for case in found:
        document = case.document()
        result, failed, measurement = judged(document)
        if (result, sorted(failed)) != (case.result, sorted(case.failed)):
            sys.exit(f"{case.name}: stated {case.result} {sorted(case.failed)}, found {result} {failed}")
        made[case.name] = document, _expected(case, measurement)
    for old in _folders(receipts):
        shutil.rmtree(old)
    for name, (document, expected) in made.items():
        (FOLDER / name).mkdir()
        (FOLDER / name / "input.json").write_bytes(document + b"\n")
        (FOLDER / name / "expected.json").write_bytes(expected)
    print(f"{len(made)} vectors written to {FOLDER}")


def check(found: Sequence[Case], receipts: bool) -> None:
    """Ends with an error when the folder is not as stated."""
    names = {path.name for path in _folders(receipts)}
    stated = {case.name: case for case in found}
    if names != set(stated):
        sys.exit(f"left over or missing: {sorted(names ^ set(stated))}")
    for name, case in stated.items():
        expected = json.loads((FOLDER / name / "expected.json").read_bytes())
        if (expected["result"], expected["failed"]) != (case.result, sorted(case.failed)):
            sys.exit(f"{name} expects something else than is stated")
    print(f"{len(names)} vectors are as stated")


def _expected(case: Case, measurement: str | None) -> bytes:
    """Returns expected.json."""
    stated = {
        "result": case.result,
        "exit_code": EXIT[case.result],
        "failed": sorted(case.failed),
        "measurement": measurement,
    }
    return json.dumps(stated, indent=1).encode() + b"\n"


def _folders(receipts: bool) -> list[Path]:
    return [path for path in FOLDER.iterdir() if path.is_dir() and path.name.startswith(RECEIPTS) is receipts]
