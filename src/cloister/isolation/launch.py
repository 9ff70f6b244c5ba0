"""Starts a module of this package confined: `python -I -B -m cloister.isolation.launch CONFINEMENT MODULE ARGUMENT...`.

Nothing but the standard library and this folder is loaded before the confinement holds, so that no library has made threads.
The module's `main` finds its arguments in sys.argv, and what holds in `cloister.isolation.launch.applied()`.
"""

import importlib
import socket
import sys

from cloister.isolation.confinement import Applied, Confinement, confine

_ALLOWED = ("cloister.local.enclave_process", "cloister.local.sanitising_process", "cloister.accelerator.worker")


def command(confinement: Confinement, module: str, *arguments: str) -> list[str]:
    """Returns the command that starts a module confined; it writes no bytecode."""
    return [sys.executable, "-I", "-B", "-m", "cloister.isolation.launch", confinement.encode(), module, *arguments]


def applied() -> Applied | None:
    """Returns what confines this process; None if it was not started by this module."""
    main = sys.modules.get("__main__")
    found = getattr(main, "_APPLIED", None)
    return found if type(found).__name__ == "Applied" else None


def inherited(number: str) -> socket.socket:
    """Returns the socket that was passed under this number."""
    return socket.socket(fileno=int(number))


def run() -> int:
    """Confines this process, then runs the module; returns its exit code."""
    text, module, *arguments = sys.argv[1:]
    if module not in _ALLOWED:
        sys.stderr.write(f"{module} is not started this way.\n")
        return 2
    made = confine(Confinement.decode(text))
    setattr(sys.modules["__main__"], "_APPLIED", made)  # noqa: B010 - for applied()
    sys.argv = [module, *arguments]
    result: int = importlib.import_module(module).main()
    return result


if __name__ == "__main__":
    sys.exit(run())
