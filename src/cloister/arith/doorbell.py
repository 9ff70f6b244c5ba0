"""A bell that one thread rings and another waits for: first watching memory for a moment, then asleep.

Waking a sleeping thread costs tens of microseconds, more in a virtual machine whose idle core was halted. A thread that
expects work soon watches a word of memory instead and offers its core to others at every look (`sched_yield`).
"""

from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cloister.arith.jit import compiled

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic  # type: ignore[untyped-decorator]
def _load(_context: Any, address: Any) -> Any:
    def emit(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.intp), emit


@compiled
def _watch(address, seen, looks):  # type: ignore[no-untyped-def]
    """Returns whether the word at `address` differs from `seen` within that many looks."""
    for _ in range(looks):
        if _load(address) != seen:
            return True
        _sched_yield()
    return False


class Doorbell:
    """One ringer, one waiter; rings that come before the wait are not lost, nor are rings of a wait that is interrupted."""

    def __init__(self, looks: int = 0) -> None:
        """`looks`: how often the waiter watches before it sleeps (about half a microsecond each); 0: sleeps at once."""
        self._looks = looks
        self._word = np.zeros(1, np.int64)
        self._address = self._word.ctypes.data
        self._seen = 0
        self._rings: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        """Lets one wait return."""
        self._rings.put(None)  # before the word: a watcher that sees the word change finds its ring
        self._word[0] += 1

    def wait(self) -> None:
        """Returns once the bell was rung again."""
        if self._looks:
            _watch(self._address, self._seen, self._looks)
        self._rings.get()
        self._seen = int(self._word[0])
