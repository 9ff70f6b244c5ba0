"""Checks and measures the CUDA backend within ten minutes: `make bench-gpu`. With `--smoke`, the same code at toy sizes on a CPU.

Exit code 0: measured. 1: the GPU gave a wrong product. 2: there is no GPU, or something is not installed.
"""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the records")
    parser.add_argument("--seconds", type=float, default=570.0, help="what is not begun by then is skipped")
    parser.add_argument("--model", default="demo", help="model to check whole, bit for bit: demo, or a folder")
    parser.add_argument("--smoke", action="store_true", help="toy sizes in Triton's interpreter: does it run at all?")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="instead: measure tile sizes and write a family file")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1" if options.smoke else "0"  # before anything imports triton

    from rich.console import Console

    from cloister.errors import SettingsError

    console = Console(stderr=True)
    try:
        if options.tune:
            from cloister.bench.gpu.tune import tune

            tune(options.tune, options.seconds, options.smoke, console)
            return 0
        from cloister.bench.gpu.run import run

        return run(options.out, options.seconds, options.smoke, options.model, console)
    except (SettingsError, ModuleNotFoundError) as error:
        console.print(f"[bold red]error:[/bold red] {error}")
        if isinstance(error, ModuleNotFoundError):
            console.print("  Install it with: pip install 'cloister[cuda]' matplotlib transformers", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
