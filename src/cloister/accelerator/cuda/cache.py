"""Where Triton keeps compiled kernels: the one folder that a confined worker with a GPU writes, temporary files included."""

import os
from pathlib import Path


def compiler_variables() -> dict[str, str]:
    """Returns the environment variables that keep the compiler's files in one folder, which is made where absent.

    The folder is `TRITON_CACHE_DIR` if that is set, else the compiler's own default in the home directory.
    """
    chosen = os.environ.get("TRITON_CACHE_DIR")
    folder = Path(chosen) if chosen else Path.home() / ".triton" / "cache"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {"TRITON_CACHE_DIR": str(folder), "TMPDIR": str(folder)}
