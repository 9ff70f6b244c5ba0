"""Checks and measures the CUDA backend within ten minutes: `make bench-gpu`. With `--smoke`, the same code at toy sizes on a CPU.

Each part writes its record into the folder --out as soon as it has one. Exit code 0: measured. 1: the GPU gave a wrong product.
2: there is no GPU, or something is not installed. 3: a part failed; the others ran.
"""

import argparse
import os
import sys
from pathlib import Path

PARTS = ("checks", "roundtrip", "kernels", "models", "confined", "sanitizer")
"""As `cloister.bench.gpu.run` has them, which is imported only after the environment is set."""


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the records")
    parser.add_argument("--minutes", type=float, default=9.5, help="what is not begun by then is skipped")
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(PARTS)}; without it, all")
    parser.add_argument("--model", default="demo", help="model to check whole, bit for bit: demo, or a folder")
    parser.add_argument("--smoke", action="store_true", help="toy sizes in Triton's interpreter: does it run at all?")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="instead: measure tile sizes and write a family file")
    parser.add_argument("--commit", default="", help="what the records name, where the checkout has no history")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1" if options.smoke else "0"  # before anything imports triton

    try:
        from rich.console import Console

        from cloister.errors import SettingsError
    except ModuleNotFoundError as error:
        return _missing(error)

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    try:
        if options.tune:
            from cloister.bench.gpu.tune import tune

            tune(options.tune, 60 * options.minutes, options.smoke, console, options.out)
            return 0
        from cloister.bench.gpu.run import Wanted, run

        parts = tuple(options.only.split(",")) if options.only else PARTS
        command = "make bench-gpu" if not options.only else f"python scripts/bench_gpu.py --only {options.only}"
        seconds = 60 * options.minutes
        wanted = Wanted(options.out, seconds, parts, options.smoke, options.model, command, options.commit)
        return run(wanted, console)
    except SettingsError as error:
        console.print(f"[bold red]error:[/bold red] {error}")
        return 2
    except ModuleNotFoundError as error:
        return _missing(error)


def _missing(error: ModuleNotFoundError) -> int:
    sys.stderr.write(f"error: {error}\n  Install it with: pip install 'cloister[cuda]' matplotlib transformers\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
