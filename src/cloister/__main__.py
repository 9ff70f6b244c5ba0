"""`cloister` and `python -m cloister`: the command, of which Ctrl-C makes a quiet end also while it is being loaded."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from cloister.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
