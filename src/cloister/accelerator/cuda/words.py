"""Single words of memory that another process or a GPU also reads and writes: ordered loads and stores, and watching one."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cloister.arith.jit import compiled

_sched_yield = types.ExternalFunction("sched_yield", types.int32())

_LOOKS_PER_TURN = 64
"""Looks between two offers of the core to others: a look takes a few nanoseconds, an offer half a microsecond."""


@intrinsic  # type: ignore[untyped-decorator]
def _load(_context: Any, _address: Any) -> Any:
    def emit(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.load_atomic(pointer, "acquire", 4)

    return types.int32(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def _store(_context: Any, _address: Any, _value: Any) -> Any:
    def emit(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        builder.store_atomic(args[1], pointer, "release", 4)
        return args[1]

    return types.int32(types.intp, types.int32), emit


@compiled
def load_word(address):  # type: ignore[no-untyped-def]
    """Returns the int32 at `address`; what its writer wrote before it is seen by what comes after this."""
    return _load(address)


@compiled
def store_word(address, value):  # type: ignore[no-untyped-def]
    """Writes the int32 at `address` after everything that was written before this."""
    _store(address, value)


@compiled
def watch_word(address, seen, looks):  # type: ignore[no-untyped-def]
    """Returns whether the int32 at `address` differs from `seen` within about that many looks."""
    for _ in range(looks // _LOOKS_PER_TURN + 1):
        for _ in range(_LOOKS_PER_TURN):
            if _load(address) != seen:
                return True
        _sched_yield()
    return False
