"""The one way this project compiles a function: Numba, cached on disk, without the interpreter lock."""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(function: Callable[..., object]) -> Callable[..., Any]:
    """Returns `function` compiled on first call; the machine code is cached on disk and found by the next process.

    The compiled function releases the interpreter lock and keeps IEEE semantics: no sum is reordered, no NaN assumed
    away, a division by zero is an infinity (raising would keep loops from vectorising). What both sides of a check compute
    is compiled this way.
    """
    # The tests' shape checker wraps every function of the package; a kernel is compiled from what it wraps.
    result: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy")(inspect.unwrap(function))
    return result


def compiled_float(function: Callable[..., object]) -> Callable[..., Any]:
    """Returns `function` compiled as by `compiled`, with leave to reorder sums and fuse multiply-adds.

    For float kernels whose sums must vectorise. Still deterministic on one machine; NaN and infinity keep their meaning.
    """
    result: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(
        inspect.unwrap(function)
    )
    return result


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(_context: Any, _bits: Any) -> Any:
    """In compiled code: returns the float32 with the given int32 bits, without a detour through memory."""
    return types.float32(types.int32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic  # type: ignore[untyped-decorator]
def pointer_to(_context: Any, _address: Any) -> Any:
    """In compiled code: returns an address, an integer, as the pointer that `numba.carray` makes an array of."""
    return types.voidptr(types.intp), lambda _c, builder, _s, args: builder.inttoptr(
        args[0], ir.IntType(8).as_pointer()
    )


@intrinsic  # type: ignore[untyped-decorator]
def fence(_context: Any) -> Any:
    """In compiled code: no memory is read again for what was read before this, or ahead of it for what comes after."""

    def emit(_c: Any, builder: Any, _s: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return ir.Constant(ir.IntType(32), 0)

    return types.int32(), emit


@intrinsic  # type: ignore[untyped-decorator]
def fetch(_context: Any, _address: Any) -> Any:
    """In compiled code: asks the cache for the 64 bytes around an address. A hint: it never waits and never faults."""

    def emit(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(hint, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return word(0)

    return types.int32(types.intp), emit
