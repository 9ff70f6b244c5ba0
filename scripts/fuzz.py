"""Fuzzes the parsers and the verifier of attestation with coverage feedback (atheris, libFuzzer).

Usage: fuzz.py [--seconds N] [TARGET ...]      every target for N seconds (default 60), one process each
       fuzz.py --list

Needs `pip install 'cloister[fuzz]'` (wheels for CPython 3.11 to 3.13 on Linux). A crash, an unexpected exception, an
input that takes longer than 5 seconds or more than 1 GiB ends with exit code 1 and leaves the
input under build/fuzz.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

KINDS = ("sgx", "tdx", "snp", "tpm", "nitro", "gpu", "sim")


def targets() -> list[str]:
    """Returns the names of all targets."""
    from attest.fuzzing import PARSERS

    return [*PARSERS, *(f"verify {kind}" for kind in KINDS)]


def run_one(name: str, seconds: int) -> None:
    """Fuzzes one target in this process; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["cloister.attest"]):
        from attest import fuzzing

    found = fuzzing.samples()
    if name.startswith("verify "):
        sample = found[name.removeprefix("verify ")]
        seed = sample.evidence.report
        known = sample.judge(sample.evidence).require()

        def target(data: bytes) -> object:
            verdict = sample.judge(fuzzing.damaged(sample, "report", data))
            if verdict.claims not in (None, known):
                raise AssertionError("a damaged report is authentic and says something else")
            return verdict
    else:
        target = fuzzing.PARSERS[name]
        seed = fuzzing.good_inputs(found).get(name, b"")

    def one(data: bytes) -> None:
        with suppress(*fuzzing.EXPECTED):
            target(data)

    findings = ROOT / "build" / "fuzz"
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "good").write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=1024", "-max_len=70000", "-verbosity=0"]
        options.append(f"-artifact_prefix={findings}/")
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


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
    failed = []
    for name in chosen.targets or targets():
        print(f"{name}: {chosen.seconds} s", flush=True)
        command = [sys.executable, __file__, "--here", "--seconds", str(chosen.seconds), name]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no crash, no hang")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
