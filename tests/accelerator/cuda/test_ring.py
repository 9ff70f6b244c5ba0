"""The ring between the enclave and a device: against the NumPy twin of the device, and against the real kernels."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from cloister.accelerator.cuda.consumer import Consumer
from cloister.accelerator.cuda.device import Device
from cloister.accelerator.cuda.reference import ReferenceDevice
from cloister.accelerator.cuda.requests import Requests
from cloister.accelerator.cuda.ring import ANSWERED, REQUESTED, SLOTS, WEIGHT, Layout, Ring
from cloister.arith.digits import split_digits
from cloister.arith.modulus import HALF
from cloister.arith.product import modular_product_reference
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError, AcceleratorTimeoutError, WireError

SHAPES = ((48, 32), (32, 48), (7, 33))
SECONDS = 60.0


def no_failure(error: Exception) -> None:
    raise error


def alive() -> None:
    return None


@dataclass
class Served:
    """A ring with a device behind it."""

    ring: Ring
    consumer: Consumer
    requests: Requests
    weights: list[np.ndarray]

    def check(self, node: int, rows: int, rng: np.random.Generator) -> None:
        weight = self.weights[node]
        x = rng.integers(-HALF, HALF + 1, (rows, weight.shape[1]), dtype=np.int32)
        answer = self.requests.multiply(node, x, weight.shape[0], SECONDS)
        np.testing.assert_array_equal(answer, modular_product_reference(weight, split_digits(x)))


def device_called(kind: str) -> Device:
    if kind == "reference":
        return ReferenceDevice()
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
    from cloister.accelerator.cuda.runtime import InterpreterRuntime
    from cloister.accelerator.cuda.triton_device import TritonDevice

    return TritonDevice(InterpreterRuntime())


def serve(device: Device, start: int = 0, idle_seconds: float = 30.0) -> Served:
    rng = np.random.default_rng(5)
    weights = [rng.integers(-127, 128, shape, dtype=np.int8) for shape in SHAPES]
    layout = Layout.of(SHAPES)
    ring = Ring(np.full(layout.words, -99, np.int32), layout)
    ring.words[: layout.requests] = 0
    ring.words[[REQUESTED, ANSWERED]] = start
    program = device.program(ring, [device.prepare(weight) for weight in weights], 16)
    requests = Requests(ring, len(SHAPES), "ring", alive)
    return Served(ring, Consumer(ring, program, no_failure, idle_seconds), requests, weights)


@pytest.fixture(params=["reference", "interpreter"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    made = serve(device_called(request.param))
    yield made
    made.consumer.close()


def test_steps_are_served_in_turn(served: Served, rng: np.random.Generator) -> None:
    for rows in (1, 3, 16):
        for node in range(len(SHAPES)):
            served.check(node, rows, rng)


def test_orders_that_are_not_needed_are_skipped(served: Served, rng: np.random.Generator) -> None:
    for node in (2, 0, 0, 1, 0, 2):
        served.check(node, 2, rng)


def test_a_device_that_was_let_go_comes_back(rng: np.random.Generator) -> None:
    served = serve(ReferenceDevice(), idle_seconds=0.05)
    for node in (0, 1, 0, 2):  # it rests in the middle of a step as well
        served.check(node, 1, rng)
        rests, deadline = served.consumer.rests, time.monotonic() + SECONDS
        while served.consumer.rests == rests:
            assert time.monotonic() < deadline, "the device was never let go"
            time.sleep(0.01)
    served.consumer.close()


def test_orders_wait_while_the_device_is_needed_elsewhere(served: Served, rng: np.random.Generator) -> None:
    served.check(0, 1, rng)
    with served.consumer.paused():
        waiting = threading.Thread(target=served.check, args=(1, 1, rng))
        waiting.start()
        time.sleep(0.05)
        assert served.ring.load(ANSWERED) == 1
    waiting.join(SECONDS)
    assert served.ring.load(ANSWERED) == 2
    served.check(2, 1, rng)


def test_counters_wrap() -> None:
    layout = Layout.of([(4, 4)])
    ring = Ring(np.zeros(layout.words, np.int32), layout)
    assert [ring.order(turn) for turn in (2**31 - 1, -(2**31))] == [ring.order(SLOTS - 1), ring.order(0)]
    ring.words[[REQUESTED, ANSWERED]] = 2**31 - 2
    weight = np.full((4, 4), 3, np.int8)
    consumer = Consumer(ring, ReferenceDevice().program(ring, [weight], 16), no_failure)
    requests = Requests(ring, 1, "ring", alive)
    requests._posted = requests._answered = 2**31 - 2
    for _ in range(2 * SLOTS):
        answer = requests.multiply(0, np.ones((1, 4), np.int32), 4, SECONDS)
        np.testing.assert_array_equal(answer, np.full((1, 4), 12))
    assert ring.load(ANSWERED) < 0
    consumer.close()


def alone(check_alive=alive) -> tuple[Ring, Requests]:  # type: ignore[no-untyped-def]
    layout = Layout.of(SHAPES)
    ring = Ring(np.zeros(layout.words, np.int32), layout)
    return ring, Requests(ring, len(SHAPES), "ring", check_alive)


def ask(requests: Requests, timeout_seconds: float = SECONDS) -> None:
    requests.multiply(0, np.zeros((1, 32), np.int32), 48, timeout_seconds)


def test_a_device_that_never_answers_is_given_up() -> None:
    _, requests = alone()
    with pytest.raises(AcceleratorTimeoutError, match="0.05 s"):
        ask(requests, 0.05)


def test_a_worker_that_dies_is_noticed_while_waiting() -> None:
    def dead() -> None:
        raise AcceleratorLostError("gone")

    _, requests = alone(dead)
    with pytest.raises(AcceleratorLostError, match="gone"):
        ask(requests)


@pytest.mark.parametrize("counted", [2, -1, 2**31 - 1])
def test_answers_that_were_not_asked_are_refused(counted: int) -> None:
    ring, requests = alone()
    ring.store(ANSWERED, counted)
    with pytest.raises(AcceleratorProtocolError, match="never posted"):
        ask(requests)


def test_an_order_for_another_weight_is_refused_by_the_device(rng: np.random.Generator) -> None:
    for kind in ("reference", "interpreter"):
        served = serve(device_called(kind))
        post = served.requests._post

        def confused(rows: int, ring: Ring = served.ring, post=post) -> None:  # type: ignore[no-untyped-def]
            store = ring.store
            ring.store = lambda offset, value: (ring.words.__setitem__(ring.order(0) + WEIGHT, 2), store(offset, value))  # type: ignore[method-assign]
            post(rows)
            ring.store = store  # type: ignore[method-assign]

        served.requests._post = confused  # type: ignore[method-assign]
        with pytest.raises(AcceleratorProtocolError, match="refused"):
            served.requests.multiply(0, np.ones((1, 32), np.int32), 48, SECONDS)
        served.requests._post = post  # type: ignore[method-assign]
        served.check(1, 1, rng)
        served.consumer.close()


class Counting:
    """A program that ends nothing until it is drained."""

    nodes = 3
    steps_ahead = 43

    def __init__(self) -> None:
        self.launched = 0
        self._ended = 0

    def launch(self, first: int = 0) -> None:
        self.launched += 1

    def unfinished(self) -> int:
        return self.launched - self._ended

    def drain(self) -> None:
        self._ended = self.launched

    def close(self) -> None:
        return None


def test_as_many_steps_are_enqueued_as_the_device_wants_and_none_for_work_elsewhere() -> None:
    ring, _ = alone()
    program = Counting()
    consumer = Consumer(ring, program, no_failure)
    deadline = time.monotonic() + SECONDS
    while program.launched < 43 and time.monotonic() < deadline:
        time.sleep(0.001)
    for _ in range(3):
        with consumer.paused():
            assert program.unfinished() == 0
    for _ in range(200):  # one after the other, as fast as a prompt's products could come
        with consumer.paused():
            pass
    assert program.launched == 43
    ring.store(REQUESTED, 1)
    while program.launched == 43 and time.monotonic() < deadline:
        time.sleep(0.001)
    consumer.close()
    assert program.launched > 43


def test_a_short_step_is_enqueued_more_often() -> None:
    """The host looks after a GPU every fifth of a millisecond: two steps of two products would be over long before."""
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
    from cloister.accelerator.cuda.runtime import InterpreterRuntime
    from cloister.accelerator.cuda.triton_device import TritonDevice

    steps = []
    for products in (0, 128):
        runtime = InterpreterRuntime()
        runtime.products_ahead = products
        device, layout = TritonDevice(runtime), Layout.of(SHAPES)
        weights = [device.prepare(np.zeros(shape, np.int8)) for shape in SHAPES]
        steps.append(device.program(Ring(np.zeros(layout.words, np.int32), layout), weights, 4).steps_ahead)
    assert steps == [2, 43]


def test_a_device_that_fails_says_so() -> None:
    class Broken(Exception):
        pass

    class BrokenProgram:
        nodes = 1
        steps_ahead = 2

        def launch(self, first: int = 0) -> None:
            raise Broken

        def unfinished(self) -> int:
            return 0

        def drain(self) -> None:
            return None

        def close(self) -> None:
            return None

    ring, _ = alone()
    failures: list[Exception] = []
    consumer = Consumer(ring, BrokenProgram(), failures.append)
    consumer._thread.join(SECONDS)
    with consumer.paused():  # must not wait for a thread that has ended
        pass
    consumer.close()
    assert [type(failure) for failure in failures] == [Broken]


def test_a_ring_must_fit_its_memory() -> None:
    layout = Layout.of(SHAPES)
    with pytest.raises(WireError, match="does not fit"):
        Ring(np.zeros(layout.words - 1, np.int32), layout)
    with pytest.raises(WireError, match="needs weights"):
        Layout.of([])
