"""A decode step in compiled code against the same step through the gate, and under workers that cheat, die or dawdle."""

import contextlib
import dataclasses
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.accelerator.registry import Registry
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.accelerator.worker import Worker
from cloister.arith.modulus import P
from cloister.arith.product import modular_product
from cloister.arith.team import Team
from cloister.audit.uniformity import measure_uniformity
from cloister.blinding.linear import LentLinear
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Fault, Gate, Incident
from cloister.enclave.prepare import EnclaveModel, LayerWeights
from cloister.errors import AcceleratorError, NonFiniteError, PadReuseError
from cloister.local.random_model import SMOKE, random_model
from cloister.model.spec import ModelSpec
from cloister.settings import AcceleratorSettings, BlindingSettings, OnFailure, Prefill, Settings, WhenEmpty
from cloister.wire.codec import Frame, Kind, Status

PROMPT = [5, 77, 311, 2, 78, 400, 9]
STEPS = [100, 31, 8, 499, 3]


def make_model(spec: ModelSpec, checks: int = 1, planes: int = 1, bias: bool = False) -> EnclaveModel:
    """A random model whose norms, scales and biases differ everywhere."""
    rng = np.random.default_rng(7)
    model = random_model(spec, checks, PadSource(), Team(1))

    def vector(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    def varied(linear: LentLinear) -> LentLinear:
        scales = linear.scales * vector(linear.scales.shape[1])
        d_out = linear.d_out // planes
        return dataclasses.replace(
            linear, scales=scales.reshape(planes, d_out), bias=vector(d_out) if bias else linear.bias
        )

    size, dim = spec.hidden_size, spec.head_dim if spec.qk_norm else 0
    layers = [LayerWeights(vector(size), vector(size), vector(dim), vector(dim)) for _ in range(spec.layers)]
    linears = tuple(varied(linear) for linear in model.public_linears)
    return dataclasses.replace(model, linears=linears, layers=tuple(layers), final_norm=vector(size))


@pytest.fixture(scope="module")
def model() -> EnclaveModel:
    return make_model(SMOKE)


class Recording:
    """A multiplier that keeps what it is given, and does `act` before its `at`-th product of one row is given back."""

    name = "recording"

    def __init__(self, at: int = -1, act: Callable[[np.ndarray], None] | None = None) -> None:
        self.seen: list[np.ndarray] = []
        self._at, self._act = at, act

    def prepare(self, matrix: np.ndarray) -> object:
        return matrix

    def multiply(self, weight: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        modular_product(weight, rows, out)
        if len(rows) == 1:
            self.seen.append(rows.copy())
            if len(self.seen) == self._at and self._act is not None:
                self._act(out)

    def close(self) -> None:
        pass


class Session:
    """A forward pass whose first accelerator is a worker on a thread of this process, behind its real socket."""

    def __init__(
        self, model: EnclaveModel, multiplier: Recording | None, spare: bool = True, **accelerator: object
    ) -> None:
        settings = Settings(
            blinding=BlindingSettings(prefill=Prefill.ENCLAVE, when_empty=WhenEmpty.REFILL),
            accelerator=AcceleratorSettings(**accelerator),  # type: ignore[arg-type]
        )
        accelerators: list[object] = [InProcessAccelerator()] if spare else []
        if multiplier is not None:
            ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.worker = SharedMemoryAccelerator(ours, None, "worker")
            self.thread = threading.Thread(target=self._serve, args=[Worker(self.theirs, Registry(multiplier))])
            self.thread.start()
            accelerators.insert(0, self.worker)
        for accelerator_ in accelerators:
            for linear in model.public_linears:
                accelerator_.register(linear.weight)  # type: ignore[attr-defined]
        self.pantry = Pantry(model.linears, settings.blinding.pantry_bytes, PadSource())
        self.incidents: list[Incident] = []
        self.gate = Gate(model.linears, accelerators, self.pantry, settings, on_incident=self.incidents.append)  # type: ignore[arg-type]
        spec = model.spec
        self.forward = Forward(model, self.gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 4, 64))

    @staticmethod
    def _serve(worker: Worker) -> None:
        with contextlib.suppress(OSError):  # the client hung up
            worker.serve("recording")

    def run(self) -> list[np.ndarray]:
        """The logits of the prompt and of each step."""
        return [self.forward.run(PROMPT), *(self.forward.run([token]) for token in STEPS)]

    def close(self) -> None:
        self.worker.close()
        self.thread.join(30)
        self.theirs.close()


@pytest.fixture
def open_session(model: EnclaveModel) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def make(*arguments: object, **settings: object) -> Session:
        session = Session(model, *arguments, **settings)  # type: ignore[arg-type]
        session.pantry.stock(len(STEPS) + 1)
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()


@pytest.fixture(scope="module")
def expected(model: EnclaveModel) -> list[np.ndarray]:
    """What the same tokens give without compiled steps."""
    return Session(model, None).run()


GROUPED = dataclasses.replace(SMOKE, heads=6, kv_heads=2, head_dim=16, hidden_size=96, ffn_size=160, vocab_size=515)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (SMOKE, {}),
        (dataclasses.replace(GROUPED, qk_norm=True, windows=(3, None)), {"checks": 2, "bias": True}),
        (dataclasses.replace(GROUPED, layers=1, windows=(None,)), {"checks": 1, "bias": True}),
    ],
)
def test_compiled_steps_equal_steps_through_the_gate_bit_for_bit(spec: ModelSpec, options: dict[str, int]) -> None:
    model = make_model(spec, **options)  # type: ignore[arg-type]
    session = Session(model, Recording())
    session.pantry.stock(len(STEPS))
    try:
        for lent, here in zip(session.run(), Session(model, None).run(), strict=True):
            np.testing.assert_array_equal(lent, here)
        counters, linears = session.gate.counters, model.public_linears
        assert counters.products == len(STEPS) * len(linears)
        assert counters.bytes_sent == 4 * len(STEPS) * sum(linear.d_in for linear in linears)
        assert counters.bytes_received == 4 * len(STEPS) * sum(linear.d_out for linear in linears)
        assert min(counters.blind_seconds, counters.lent_seconds, counters.recover_seconds) > 0
        assert not session.incidents
    finally:
        session.close()


def test_what_a_worker_sees_of_compiled_steps_is_uniform_and_never_the_same_twice(
    open_session: Callable[..., Session], model: EnclaveModel
) -> None:
    multiplier = Recording()
    session = open_session(multiplier)
    session.forward.run(PROMPT)
    for _ in range(6):  # the very same rows every time
        session.forward.run([100])
        session.forward.truncate(len(PROMPT))
    assert len(multiplier.seen) == 6 * len(model.linears)
    first, second = multiplier.seen[0], multiplier.seen[len(model.linears)]
    assert (first == second).mean() < 0.05, "the same pad would show the same rows"
    assert measure_uniformity(np.concatenate(multiplier.seen, axis=1)).uniform


def test_pads_are_zeroed_as_a_step_uses_them(open_session: Callable[..., Session]) -> None:
    session = open_session(Recording())
    shelves = list(session.pantry._shelves.values())
    blocks = [shelf.blocks[0] for shelf in shelves]
    session.forward.run(PROMPT)
    session.forward.run([100])
    for r, u, *_ in blocks:
        assert not r[0].any()
        assert not u[0].any()
        assert r[1].all()
        assert u[1].any()


def wrong(out: np.ndarray) -> None:
    out[0, -1] = out[0, -1] - 1 if out[0, -1] > 0 else out[0, -1] + 1


def not_canonical(out: np.ndarray) -> None:
    out[0, 0] += P if out[0, 0] < -1 else -P if out[0, 0] > 1 else 0


def stale(out: np.ndarray) -> None:
    out[:] = np.roll(out, 1)


@pytest.mark.parametrize("act", [wrong, not_canonical, stale])
@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("at", [1, 12, 18])
def test_a_cheating_worker_is_caught_named_and_changes_nothing(
    at: int,
    spare: bool,
    act: Callable[[np.ndarray], None],
    open_session: Callable[..., Session],
    model: EnclaveModel,
    expected: list[np.ndarray],
) -> None:
    session = open_session(Recording(at, act), spare)
    for lent, here in zip(session.run(), expected, strict=True):
        np.testing.assert_array_equal(lent, here)
    (incident,) = session.incidents
    assert incident.linear == model.linears[(at - 1) % len(model.linears)].name
    assert "wrong" in incident.reason
    assert incident.outcome is (Fault.NEXT if spare else Fault.ENCLAVE)
    assert "worker" not in " ".join(session.gate.accelerators)


def test_a_failed_step_leaves_no_pad_behind(open_session: Callable[..., Session]) -> None:
    session = open_session(Recording(3, wrong), on_failure=OnFailure.STOP)
    blocks = [shelf.blocks[0] for shelf in session.pantry._shelves.values()]
    session.forward.run(PROMPT)
    with pytest.raises(AcceleratorError, match=r"layers\.0\.gate_up"):
        session.forward.run([100])
    assert session.forward.tokens == len(PROMPT)
    for r, u, *_ in blocks:
        assert not r[0].any()
        assert not u[0].any()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("hang up", "is gone"),
        ("dawdle", r"within 0\.5 s"),
        ("babble", "header has 5 bytes"),
        ("another shape", "another shape"),
        ("another request", "answered request"),
        ("refuse", "refuses.*no more"),
    ],
)
def test_a_worker_that_misbehaves_is_given_up(
    act: str, reason: str, open_session: Callable[..., Session], expected: list[np.ndarray]
) -> None:
    def misbehave(out: np.ndarray) -> None:
        header = bytearray(session.worker._line.headers[4, 1].tobytes())  # type: ignore[union-attr]
        if act == "hang up":
            session.theirs.shutdown(socket.SHUT_RDWR)
        elif act == "dawdle":
            time.sleep(1.5)
        elif act == "babble":
            session.theirs.send(b"hello")
        elif act == "another shape":
            header[28] ^= 1
            session.theirs.send(header)
        elif act == "another request":
            header[8] ^= 1
            session.theirs.send(header)
        else:
            request = int.from_bytes(header[8:16], "little")
            session.theirs.send(Frame(Kind.ERROR, request, status=Status.NO_MEMORY).encode() + b"no more")

    session = open_session(Recording(5, misbehave), timeout_seconds=0.5)
    for lent, here in zip(session.run(), expected, strict=True):
        np.testing.assert_array_equal(lent, here)
    (incident,) = session.incidents
    assert incident.linear == "layers.1.qkv"
    assert re.search(reason, incident.reason), incident.reason


def test_a_signal_in_the_middle_of_a_step_loses_nothing(
    open_session: Callable[..., Session], expected: list[np.ndarray]
) -> None:
    def interrupt(out: np.ndarray) -> None:
        signal.pthread_kill(main, signal.SIGUSR1)
        time.sleep(0.05)

    main, heard = threading.get_ident(), []
    previous = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        session = open_session(Recording(6, interrupt))
        for lent, here in zip(session.run(), expected, strict=True):
            np.testing.assert_array_equal(lent, here)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert heard == [1]
    assert session.gate.counters.products == (len(STEPS)) * 9 + 5, "the interrupted step was done again"
    assert not session.incidents
    assert len(session.gate.accelerators) == 2


def test_an_answer_that_changes_after_it_was_given_does_not_matter(
    open_session: Callable[..., Session], expected: list[np.ndarray]
) -> None:
    session, stop = open_session(Recording()), threading.Event()
    session.forward.run(PROMPT)

    def scribble() -> None:
        while not stop.is_set():
            if session.worker._arenas is not None:
                session.worker._arenas[1].words[:] = 12345
            time.sleep(0)

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for token, here in zip(STEPS, expected[1:], strict=True):  # copied in time, or refused and done again
            np.testing.assert_array_equal(session.forward.run([token]), here)
    finally:
        stop.set()
        thread.join()


def test_a_row_that_is_not_finite_names_its_layer(model: EnclaveModel) -> None:
    first, last = model.layers
    damaged = dataclasses.replace(last, ffn_norm=np.full_like(last.ffn_norm, np.inf))
    session = Session(dataclasses.replace(model, layers=(first, damaged)), Recording())
    session.pantry.stock(2)
    try:
        with pytest.raises(NonFiniteError, match=r"layers\.1\.gate_up"):
            session.forward.run([100])
        assert session.forward.tokens == 0
        assert not session.incidents
    finally:
        session.close()


def test_an_empty_pantry_leaves_the_step_to_the_gate(model: EnclaveModel, expected: list[np.ndarray]) -> None:
    session = Session(model, Recording())
    session.pantry.stock(2)
    try:
        for lent, here in zip(session.run(), expected, strict=True):
            np.testing.assert_array_equal(lent, here)
        assert session.gate.counters.pads_made_late > 0
        assert session.gate.counters.products == len(STEPS) * len(model.linears)
    finally:
        session.close()


def test_a_larger_request_in_between_does_no_harm(open_session: Callable[..., Session], model: EnclaveModel) -> None:
    """Arenas grow, and request numbers move on, between two steps on the same line."""
    session, plain = open_session(Recording()), Session(model, None)
    for _ in range(2):
        for one in (session, plain):
            one.forward.truncate(0)
            one.forward.run(PROMPT)
        np.testing.assert_array_equal(session.forward.run([100]), plain.forward.run([100]))
        x = np.ones((9, model.spec.hidden_size), np.float32)
        session.gate.linear(2, x, np.empty((9, model.linears[2].d_out), np.float32), True)
    assert not session.incidents


def test_pads_of_a_step_are_given_out_once(model: EnclaveModel) -> None:
    pantry = Pantry(model.linears, 10**8, PadSource())
    indices = range(len(model.linears))
    assert pantry.take_rows(indices) is None
    pantry.stock(3, batch_tokens=2)
    seen = set()
    for level in (2, 1, 0):
        rows = pantry.take_rows(indices)
        assert rows is not None
        seen.add(tuple(rows.spend()[:, 0].tolist()))
        with pytest.raises(PadReuseError, match="twice"):
            rows.spend()
        assert pantry.level_tokens == level
    assert len(seen) == 3
    assert pantry.take_rows(indices) is None


def test_memory_of_a_step_s_pads_is_not_filled_again_while_they_are_in_use(model: EnclaveModel) -> None:
    pantry = Pantry(model.linears, 10**8, PadSource())
    pantry.stock(2, batch_tokens=2)
    first = pantry.take_rows(range(len(model.linears)))
    last = pantry.take_rows(range(len(model.linears)))
    assert first is not None
    assert last is not None
    held = {address for rows in (first, last) for address in rows.spend()[:, 0].tolist()}
    del first
    pantry.stock(2, batch_tokens=2)
    again = pantry.take_rows(range(len(model.linears)))
    assert again is not None
    assert held.isdisjoint(again.spend()[:, 0].tolist())
    del last
    pantry.stock(3, batch_tokens=2)
    later = [pantry.take_rows(range(len(model.linears))) for _ in range(3)]
    assert held <= {address for rows in later if rows is not None for address in rows.spend()[:, 0].tolist()}
