"""The one way this project compiles a function: Numba, cached on disk, without the interpreter lock."""

import inspect
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., object]) -> Callable[..., Any]:
    """Returns `function` compiled on first call; the machine code is cached on disk and found by the next process.

    The compiled function releases the interpreter lock and keeps IEEE semantics: no sum is reordered, no NaN assumed
    away. What both sides of a check compute is compiled this way.
    """
    # The tests' shape checker wraps every function of the package; a kernel is compiled from what it wraps.
    result: Callable[..., Any] = njit(cache=True, nogil=True)(inspect.unwrap(function))
    return result


def compiled_float(function: Callable[..., object]) -> Callable[..., Any]:
    """Returns `function` compiled as by `compiled`, with leave to reorder sums and fuse multiply-adds.

    For float kernels whose sums must vectorise. Still deterministic on one machine; NaN and infinity keep their meaning.
    """
    result: Callable[..., Any] = njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})(
        inspect.unwrap(function)
    )
    return result
