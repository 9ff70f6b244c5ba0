"""The int8 backends: equal bit for bit at the extremes, on sealed weights, with one pool of threads."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.accelerator import cpu
from cloister.accelerator.cpu import (
    MULTIPLIERS,
    Multiplier,
    fastest,
    installed_backends,
    open_multiplier,
    signed_digits,
)
from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.arith.modulus import HALF, MAX_D_IN, P
from cloister.arith.vector import InstructionSet
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError
from cloister.settings import Backend
from cloister.wire.codec import received_rows
from cloister.wire.messages import PublicWeight
from cloister.wire.sealed_memory import SealedMatrix, map_sealed_matrix

SECONDS = 60.0


def product_in_float64(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Exact: |rows| < 2^30, |weight| <= 127 and d_in <= 2^16 keep every partial sum below 2^53."""
    residue = (rows.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.int64) % P
    return np.where(residue > HALF, residue - P, residue).astype(np.int32)


@pytest.fixture(params=list(MULTIPLIERS), scope="module")
def multiplier(request: pytest.FixtureRequest) -> Multiplier:
    if request.param not in installed_backends():
        pytest.skip(f"{request.param.value} is not installed")
    return open_multiplier(request.param, 1)


def check(multiplier: Multiplier, rows: np.ndarray, weight: np.ndarray) -> None:
    out = np.empty((rows.shape[0], weight.shape[0]), np.int32)
    multiplier.multiply(multiplier.prepare(weight), rows, out)
    np.testing.assert_array_equal(out, product_in_float64(rows, weight))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 150), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_random_products_of_every_shape_are_exact(
    multiplier: Multiplier, tokens: int, d_in: int, d_out: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(-HALF, HALF + 1, (tokens, d_in), dtype=np.int32)
    check(multiplier, rows, rng.integers(-127, 128, (d_out, d_in), dtype=np.int8))


@pytest.mark.parametrize("element", [HALF, -HALF, 0, -1, 1, 127, 128, -128, -129, 2**24 - 1])
@pytest.mark.parametrize("value", [127, -127])
def test_extreme_elements_over_the_longest_rows_do_not_overflow(
    multiplier: Multiplier, element: int, value: int
) -> None:
    rows = np.full((1, MAX_D_IN), element, np.int32)
    check(multiplier, rows, np.full((2, MAX_D_IN), value, np.int8))


def test_a_sealed_weight_is_multiplied_where_it_lies_without_a_word(
    multiplier: Multiplier, rng: np.random.Generator
) -> None:
    memory = SealedMatrix.create((24, 40))
    memory.array[:] = rng.integers(-127, 128, (24, 40), dtype=np.int8)
    memory.seal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(multiplier, rng.integers(-9, 9, (2, 40), dtype=np.int32), map_sealed_matrix(memory.fileno(), (24, 40)))


@given(st.lists(st.integers(-HALF, HALF), min_size=1, max_size=9))
def test_signed_digits_add_up(values: list[int]) -> None:
    rows = np.array([values], np.int32)
    digits = signed_digits(rows).astype(np.int64)
    np.testing.assert_array_equal(sum(digits[place] << (8 * place) for place in range(4)), rows)


COUNT_THREADS = """
import sys, numpy as np, psutil
from cloister.accelerator.cpu import open_multiplier
from cloister.settings import Backend
multiplier = open_multiplier(Backend(sys.argv[1]), 2)
weights = [multiplier.prepare(np.ones((64, 64), np.int8)) for _ in range(20)]
rows, out = np.ones((4, 64), np.int32), np.empty((4, 64), np.int32)
for weight in weights[:2]:
    multiplier.multiply(weight, rows, out)
before = psutil.Process().num_threads()
for weight in weights:
    multiplier.multiply(weight, rows, out)
more = [multiplier.prepare(np.ones((64, 64), np.int8)) for _ in range(20)]
for weight in more:
    multiplier.multiply(weight, rows, out)
print(psutil.Process().num_threads() - before)
"""


@pytest.mark.parametrize("backend", list(MULTIPLIERS))
def test_more_weights_start_no_more_threads(backend: Backend) -> None:
    if backend not in installed_backends():
        pytest.skip(f"{backend.value} is not installed")
    command = [sys.executable, "-I", "-c", COUNT_THREADS, backend.value]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout
    assert out == "0\n"


class Sleeper:
    """A multiplier that takes as long as it is told to."""

    def __init__(self, name: str, seconds: float, clock: list[float]) -> None:
        self.name, self.closed = name, False
        self._seconds, self._clock = seconds, clock

    def prepare(self, matrix: np.ndarray) -> object:
        return matrix

    def multiply(self, weight: object, rows: np.ndarray, out: np.ndarray) -> None:
        self._clock[0] += self._seconds

    def close(self) -> None:
        self.closed = True


def test_the_fastest_is_chosen_named_with_its_figures_and_the_others_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    slow, quick, middling = (Sleeper(n, s, clock) for n, s in (("slow", 0.3), ("quick", 0.1), ("middling", 0.2)))
    assert fastest([slow, quick, middling]) is quick
    assert (slow.closed, quick.closed, middling.closed) == (True, False, True)
    assert quick.name == "quick (fastest of: quick 1e+02 ms, middling 2e+02 ms, slow 3e+02 ms)"


def test_auto_measures_only_where_the_processor_lacks_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "seconds_per_product", lambda multiplier: 1.0)
    monkeypatch.setattr(cpu, "installed_backends", lambda: [Backend.NUMBA])
    monkeypatch.setattr(cpu, "best_instruction_set", lambda: InstructionSet.PORTABLE)
    assert "fastest of" in open_multiplier(Backend.AUTO, 1).name
    other = next(kind for kind in InstructionSet if kind is not InstructionSet.PORTABLE)
    monkeypatch.setattr(cpu, "best_instruction_set", lambda: other)
    assert "fastest of" not in open_multiplier(Backend.AUTO, 1).name


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.ONNXRUNTIME])
def test_a_worker_runs_every_backend(backend: Backend, rng: np.random.Generator) -> None:
    if backend not in installed_backends():
        pytest.skip(f"{backend.value} is not installed")
    worker = SharedMemoryAccelerator.start(backend=backend, threads=1)
    weight = PublicWeight.of(rng.integers(-127, 128, (24, 40), dtype=np.int8))
    worker.register(weight)
    for tokens in (1, 512):
        rows = rng.integers(-HALF, HALF + 1, (tokens, 40), dtype=np.int32)
        answer = worker.multiply(weight.weight_id, received_rows(rows.reshape(-1), tokens, 40), SECONDS)
        np.testing.assert_array_equal(answer, product_in_float64(rows, weight.matrix))
    assert backend.value in worker.name
    worker.close()


def test_the_accelerator_in_this_process_refuses_like_any_other(rng: np.random.Generator) -> None:
    accelerator = InProcessAccelerator(threads=2)
    weight = PublicWeight.of(rng.integers(-127, 128, (24, 40), dtype=np.int8))
    accelerator.register(weight)
    with pytest.raises(AcceleratorProtocolError, match="do not fit"):
        accelerator.multiply(weight.weight_id, received_rows(np.ones(41, np.int32), 1, 41), SECONDS)
    accelerator.close()
    with pytest.raises(AcceleratorLostError, match="closed"):
        accelerator.register(weight)
