"""The one way this project compiles a function: Numba, cached on disk, without the interpreter lock."""

import inspect
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., object]) -> Callable[..., Any]:
    """Returns `function` compiled on first call; the machine code is cached on disk and found by the next process.

    The compiled function releases the interpreter lock, keeps IEEE semantics (no fast-math: a reordered sum or a
    NaN assumed away would change answers) and raises what the Python function raises.
    """
    # The tests' shape checker wraps every function of the package; a kernel is compiled from what it wraps.
    result: Callable[..., Any] = njit(cache=True, nogil=True)(inspect.unwrap(function))
    return result
