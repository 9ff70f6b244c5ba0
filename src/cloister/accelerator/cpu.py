"""Int8 products on a CPU: the processor's dot-product instruction through Numba, or torch, or onnxruntime.

All are exact and equal bit for bit. `auto` takes Numba where the processor has the instruction (measured: it reads weights
where they lie, at the speed of memory); elsewhere it times what is installed on one decode-shaped product and says so in
its name. Importing torch takes seconds, so nothing is imported to be measured where the choice is clear. A process uses one
pool of threads.
"""

import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int8, Int32

from cloister.accelerator.onnx_product import OnnxProduct, share_threads
from cloister.arith.digits import split_digits
from cloister.arith.modulus import HALF, P
from cloister.arith.pair import pair_product
from cloister.arith.product import modular_product
from cloister.arith.team import Team, usable_cores
from cloister.arith.vector import InstructionSet, best_instruction_set
from cloister.errors import SettingsError
from cloister.settings import Backend

_TRIAL_SHAPE: Final = (2048, 2048)
_TRIAL_REPEATS: Final = 5

LOOKS: Final = 1000
"""How long the threads of a worker watch for the next product before they sleep: longer than the enclave takes between
two products of a decode step."""


@runtime_checkable
class Multiplier(Protocol):
    """Multiplies rows by weights that it has prepared."""

    name: str
    """What it multiplies with."""

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> object:
        """Returns whatever this backend wants to keep of a weight."""
        ...

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with `rows @ matrix.T` modulo P, centred."""
        ...

    def close(self) -> None:
        """Ends the threads that are its own; products still work afterwards, on the calling thread."""
        ...


class NumbaMultiplier:
    """The product of `arith.product`, on a team of threads."""

    def __init__(self, threads: int) -> None:
        self._team = Team(threads, looks=LOOKS)
        self.name = f"numba {best_instruction_set()}"

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> object:
        """Returns the matrix itself: it is read as it lies."""
        return matrix

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with the product."""
        modular_product(weight, rows, out, self._team)

    def multiply_pair(
        self,
        left: Int32[np.ndarray, "heads rows inner"],
        right: Int32[np.ndarray, "heads capacity width"],
        first: int,
        transposed: bool,
        out: Int32[np.ndarray, "heads rows outer"],
    ) -> None:
        """Fills `out` with the product of two matrices of field elements."""
        pair_product(left, right, first, transposed, out, self._team)

    def close(self) -> None:
        """Ends the team."""
        self._team.close()


class TorchMultiplier:
    """`torch._int_mm` on the signed digits of the rows, stacked: int8 x int8 -> int32."""

    def __init__(self, threads: int) -> None:
        import torch

        self._torch = torch
        if threads:
            torch.set_num_threads(threads)
        self.name = f"torch {torch.__version__}"

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> object:
        """Returns the weight as a tensor on the same memory, transposed."""
        matrix = _at_least_two_columns(matrix)
        with warnings.catch_warnings():  # a sealed weight is read-only; torch would rather own what it reads
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return self._torch.frombuffer(matrix, dtype=self._torch.int8).reshape(matrix.shape).t()

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with the product."""
        digits = signed_digits(_at_least_two_columns(rows))
        stacked = self._torch.from_numpy(digits.reshape(-1, digits.shape[2]))
        parts = self._torch._int_mm(stacked, weight).numpy().reshape(4, rows.shape[0], -1)
        _recombine(parts, out)

    def close(self) -> None:
        """Leaves torch's threads, which belong to the process."""


class OnnxMultiplier:
    """onnxruntime's `MatMulInteger` on unsigned digits: uint8 x int8 -> int32."""

    def __init__(self, threads: int) -> None:
        import onnxruntime

        share_threads(threads or usable_cores())
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def prepare(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> object:
        """Returns a session that holds the weight."""
        return OnnxProduct(matrix)

    def multiply(
        self, weight: Any, rows: Int32[np.ndarray, "tokens d_in"], out: Int32[np.ndarray, "tokens d_out"]
    ) -> None:
        """Fills `out` with the product."""
        planes = split_digits(rows)[:, :, : rows.shape[1]].transpose(1, 0, 2)
        parts = weight.multiply(np.ascontiguousarray(planes).reshape(-1, rows.shape[1]))
        _recombine(parts.reshape(4, rows.shape[0], -1), out)

    def close(self) -> None:
        """Leaves onnxruntime's threads, which belong to the process."""


def _at_least_two_columns(matrix: np.ndarray) -> np.ndarray:
    """Returns the matrix, a single column beside one of zeros: torch takes the wrong stride for an inner size of 1.

    `torch._int_mm` is then silently wrong on a CPU (seen with 2.13; pytorch/pytorch issue 195066 has the cause).
    """
    return matrix if matrix.shape[1] > 1 else np.pad(matrix, ((0, 0), (0, 1)))


def signed_digits(rows: Int32[np.ndarray, "tokens d_in"]) -> Int8[np.ndarray, "4 tokens d_in"]:
    """Returns digits in [-128, 127] with `sum_l 256^l d_l == rows`, for centred rows."""
    digits = np.empty((4, *rows.shape), np.int8)
    rest = rows.astype(np.int64)
    for place in range(4):
        digits[place] = ((rest + 128) & 255) - 128
        rest = (rest - digits[place]) >> 8
    return digits


def _recombine(parts: Int32[np.ndarray, "4 tokens d_out"], out: Int32[np.ndarray, "tokens d_out"]) -> None:
    total = np.zeros(out.shape, np.int64)
    for place in range(4):
        total += (parts[place].astype(np.int64) << (8 * place)) % P
    total %= P
    out[:] = np.where(total > HALF, total - P, total)


MULTIPLIERS: Final[dict[Backend, Callable[[int], Multiplier]]] = {
    Backend.NUMBA: NumbaMultiplier,
    Backend.TORCH: TorchMultiplier,
    Backend.ONNXRUNTIME: OnnxMultiplier,
}


def installed_backends() -> list[Backend]:
    """Returns the backends that this installation has."""
    optional = [b for b in (Backend.TORCH, Backend.ONNXRUNTIME) if importlib.util.find_spec(b.value) is not None]
    return [Backend.NUMBA, *optional]


def open_multiplier(backend: Backend, threads: int) -> Multiplier:
    """Returns the multiplier of `backend`; `auto` chooses, by measuring where the choice is not clear.

    Raises:
        SettingsError: the backend is not installed.
    """
    if backend is Backend.AUTO:
        if best_instruction_set() is not InstructionSet.PORTABLE:
            return NumbaMultiplier(threads)
        return fastest([MULTIPLIERS[name](threads) for name in installed_backends()])
    if backend is Backend.CUDA:
        from cloister.accelerator.cuda.multiplier import open_cuda  # here: CUDA is asked for by name, never looked for

        return open_cuda()
    if backend not in installed_backends():
        raise SettingsError(
            f"The accelerator backend {backend.value!r} is not installed.",
            remedy="Install it with: pip install 'cloister[accelerator]', or set accelerator.backend to auto.",
        )
    return MULTIPLIERS[backend](threads)


def fastest(candidates: list[Multiplier]) -> Multiplier:
    """Returns the multiplier that takes least time for one trial product, named with all figures; closes the others."""
    timed = sorted(((seconds_per_product(candidate), candidate) for candidate in candidates), key=lambda pair: pair[0])
    for _, loser in timed[1:]:
        loser.close()
    chosen = timed[0][1]
    figures = ", ".join(f"{candidate.name} {seconds * 1e3:.2g} ms" for seconds, candidate in timed)
    chosen.name = f"{chosen.name} (fastest of: {figures})"
    return chosen


def seconds_per_product(multiplier: Multiplier, shape: tuple[int, int] = _TRIAL_SHAPE, tokens: int = 1) -> float:
    """Returns the best time of a few products of random rows by a random weight of `shape`, after one to warm up."""
    generator = np.random.default_rng(0)
    weight = multiplier.prepare(generator.integers(-127, 128, shape, dtype=np.int8))
    rows = generator.integers(-HALF, HALF + 1, (tokens, shape[1]), dtype=np.int32)
    out = np.empty((tokens, shape[0]), np.int32)
    multiplier.multiply(weight, rows, out)
    times = []
    for _ in range(_TRIAL_REPEATS):
        started = time.perf_counter()
        multiplier.multiply(weight, rows, out)
        times.append(time.perf_counter() - started)
    return min(times)
