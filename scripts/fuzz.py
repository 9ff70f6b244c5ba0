"""Fuzzes every parser of bytes that somebody else wrote, with coverage feedback (atheris, libFuzzer).

Usage: fuzz.py [--seconds N] [TARGET ...]      every target for N seconds (default 60), one process each
       fuzz.py --list

The targets are those of `tests/attest/fuzzing.py` and `tests/foreign`; each begins with well-formed inputs and with what
the conformance vectors have for it. A line of JSON per target says how many inputs were tried.
Needs `pip install 'cloister[fuzz]'` (wheels for CPython 3.11 to 3.13 on Linux). A crash, an unexpected exception, an
input that takes longer than 5 seconds or more than 1 GiB ends with exit code 1 and leaves the
input under build/fuzz.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)]

KINDS = ("sgx", "tdx", "snp", "tpm", "nitro", "gpu", "sim")
FINDINGS = ROOT / "build" / "fuzz"


def targets() -> list[str]:
    """Returns the names of all targets."""
    import foreign
    from attest.fuzzing import PARSERS

    return [*PARSERS, *(f"verify {kind}" for kind in KINDS), *foreign.NAMES]


def prepared(name: str, folder: Path) -> tuple[Callable[[bytes], object], list[bytes]]:
    """Returns what takes one input, and the inputs to begin with. Raises what is not a clean refusal."""
    from attest import fuzzing

    if name in fuzzing.PARSERS:
        found = fuzzing.samples()
        good = fuzzing.good_inputs(found)
        seeds = [good[name]] if name in good else []
        return fuzzing.PARSERS[name], seeds + fuzzing.of_vectors(name)
    if name.startswith("verify "):
        kind = name.removeprefix("verify ")
        sample = fuzzing.samples()[kind]
        known = sample.judge(sample.evidence).require()

        def judge(data: bytes) -> object:
            verdict = sample.judge(fuzzing.damaged(sample, "report", data))
            if verdict.claims not in (None, known):
                raise AssertionError("a damaged report is authentic and says something else")
            return verdict

        return judge, [sample.evidence.report, *fuzzing.reports_of_vectors(kind)]
    import foreign

    chosen = foreign.all_targets(folder)[name]
    return chosen.target, list(chosen.seeds)


def run_one(name: str, seconds: int) -> None:
    """Fuzzes one target in this process; libFuzzer ends the process."""
    import atheris

    scratch = tempfile.mkdtemp()  # libFuzzer ends the process: `run_apart` removes it
    with atheris.instrument_imports(include=["cloister"]):
        from cloister.errors import CloisterError

        target, seeds = prepared(name, Path(scratch))

    def one(data: bytes) -> None:
        with suppress(CloisterError):
            target(data)

    FINDINGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds or [b""]):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=1024", "-max_len=70000", "-verbosity=0"]
        options += [f"-artifact_prefix={FINDINGS}/{name.replace(' ', '-').replace(':', '')}-", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


def run_apart(name: str, seconds: int) -> bool:
    """Fuzzes one target in a process of its own, prints what came of it, and returns whether nothing was found."""
    command = [sys.executable, __file__, "--here", "--seconds", str(seconds), name]
    with tempfile.TemporaryDirectory(prefix="cloister-fuzz-") as scratch:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": scratch},
        )
    stats = dict(re.findall(r"^stat::(\w+):\s*(\d+)", done.stderr, re.MULTILINE))
    tried = int(stats.get("number_of_executed_units", 0))
    print(json.dumps({"target": name, "inputs": tried, "seconds": seconds, "found": done.returncode != 0}), flush=True)
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-8000:], file=sys.stderr)
    return done.returncode == 0


def main() -> int:
    """Fuzzes what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="names from --list; default: all")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(targets()))
        return 0
    if chosen.here:
        run_one(chosen.targets[0], chosen.seconds)
        return 0
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: pip install 'cloister[fuzz]' (CPython 3.11 to 3.13, Linux)", file=sys.stderr)
        return 2
    failed = [name for name in chosen.targets or targets() if not run_apart(name, chosen.seconds)]
    print(f"failed: {', '.join(failed)}" if failed else "no crash, no hang")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
