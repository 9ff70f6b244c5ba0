"""The one way this project compiles a GPU kernel: Triton, or its interpreter where `TRITON_INTERPRET=1` is set."""

import inspect
import os
from collections.abc import Callable
from typing import Any, Final

import triton

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter on the CPU, as Triton itself decides it."""


def kernel(function: Callable[..., object]) -> Any:
    """Returns `function` as a Triton kernel, compiled at its first launch and cached on disk."""
    return kernel_varying()(function)


def kernel_varying(*names: str) -> Callable[[Callable[..., object]], Any]:
    """Returns `kernel` for integer parameters that change from launch to launch: one compiled kernel serves all their values."""

    def made(function: Callable[..., object]) -> Any:
        # The tests' shape checker wraps every function of the package; a kernel is compiled from what it wraps.
        return triton.jit(inspect.unwrap(function), do_not_specialize=list(names))

    return made
