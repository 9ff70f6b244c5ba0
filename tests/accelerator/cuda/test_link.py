"""The client of a GPU on the same host, with a real worker process whose GPU is Triton's interpreter."""

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from cloister.accelerator.api import Accelerator, PairAccelerator
from cloister.accelerator.cpu import open_multiplier
from cloister.accelerator.cuda.link import GpuLink
from cloister.accelerator.cuda.multiplier import DeviceBackend, open_cuda
from cloister.accelerator.cuda.reference import ReferenceDevice
from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.accelerator.remote import RemoteAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.accelerator.tcp_server import AcceleratorServer
from cloister.arith.digits import split_digits
from cloister.arith.modulus import HALF
from cloister.arith.pair import pair_product_reference
from cloister.arith.product import modular_product_reference
from cloister.assets import demo_model
from cloister.bench.gpu.worker import open_link, start_worker
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.cli.accelerator import DeviceKind, backend_of
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError, SettingsError
from cloister.local.accelerators import open_accelerators
from cloister.model.directory import open_model
from cloister.settings import AcceleratorSettings, Backend, BlindingSettings, Prefill, Settings, Weights
from cloister.wire.codec import received_pair, received_rows
from cloister.wire.messages import PublicWeight
from cloister.wire.pairs import PairShape

SECONDS = 60.0
SHAPES = ((48, 32), (32, 48), (7, 33))


@pytest.fixture(scope="module")
def link() -> Iterator[GpuLink]:
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
    pytest.importorskip("torch", reason="torch is not installed: the GPU kernels are not tested")
    made = open_link(smoke=True)
    yield made
    made.close()
    made.close()


def make_weights(rng: np.random.Generator) -> list[PublicWeight]:
    return [PublicWeight.of(rng.integers(-127, 128, shape, dtype=np.int8)) for shape in SHAPES]


def check(link: Accelerator, weight: PublicWeight, rows: int, rng: np.random.Generator) -> None:
    x = rng.integers(-HALF, HALF + 1, rows * weight.shape[1], dtype=np.int32)
    blinded = received_rows(x, rows, weight.shape[1])
    answer = link.multiply(weight.weight_id, blinded, SECONDS)
    np.testing.assert_array_equal(answer, modular_product_reference(weight.matrix, split_digits(blinded.rows)))


def test_steps_go_over_the_ring_and_prompts_over_the_socket(link: GpuLink, rng: np.random.Generator) -> None:
    weights = make_weights(rng)
    for weight in weights:
        link.register(weight)
        link.register(weight)
    assert "interpreter" in link.name
    for rows, over_the_ring in ((1, 3), (17, 0), (3, 3), (16, 3), (1, 3)):
        before = link.ring_products
        for weight in weights:
            check(link, weight, rows, rng)
        assert link.ring_products - before == over_the_ring
    late = PublicWeight.of(rng.integers(-127, 128, (5, 6), dtype=np.int8))
    link.register(late)
    for weight in (*weights, late, weights[0], weights[2], weights[0]):
        check(link, weight, 2, rng)


def test_what_does_not_fit_is_refused_before_anything_is_sent(link: GpuLink, rng: np.random.Generator) -> None:
    weight = PublicWeight.of(rng.integers(-127, 128, (9, 10), dtype=np.int8))
    rows = received_rows(np.zeros(20, np.int32), 2, 10)
    before = link.ring_products
    with pytest.raises(AcceleratorProtocolError, match="not registered"):
        link.multiply(weight.weight_id, rows, SECONDS)
    link.register(weight)
    with pytest.raises(AcceleratorProtocolError, match="do not fit"):
        link.multiply(weight.weight_id, received_rows(np.zeros(20, np.int32), 4, 5), SECONDS)
    assert link.ring_products == before


def test_a_killed_worker_is_noticed_and_reaped(rng: np.random.Generator) -> None:
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
    link = open_link(smoke=True)
    weight = make_weights(rng)[0]
    link.register(weight)
    check(link, weight, 1, rng)
    pid = link.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for message in ("gone", "closed after a failure"):
        with pytest.raises(AcceleratorLostError, match=message):
            check(link, weight, 1, rng)
    link.close()
    assert not psutil.pid_exists(pid)


def test_a_backend_without_a_device_refuses_a_ring(rng: np.random.Generator) -> None:
    link = GpuLink(start_worker({}, backend="numba"))
    weight = make_weights(rng)[0]
    link.register(weight)
    check(link, weight, 17, rng)
    with pytest.raises(AcceleratorProtocolError, match="serves no ring"):
        check(link, weight, 1, rng)
    link.close()


def test_without_a_gpu_the_worker_says_what_is_missing(rng: np.random.Generator) -> None:
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
    link = GpuLink(start_worker({"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}))
    with pytest.raises(AcceleratorLostError, match="No CUDA device 0 is visible.*nvidia-smi"):
        link.register(make_weights(rng)[0])
    link.close()


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"torch and triton.*cloister\[cuda\]"):
        open_multiplier(Backend.CUDA, 1)


def logits(model: EnclaveModel, accelerator: Accelerator, tokens: list[int], steps: int) -> list[np.ndarray]:
    """Returns the logits after a prompt and after each of some tokens that follow it."""
    lending = Settings(blinding=BlindingSettings(prefill=Prefill.BLINDED))
    for linear in model.linears:
        accelerator.register(linear.weight)
    pantry = Pantry(model.linears, 2**28, PadSource())
    gate = Gate(model.linears, [accelerator], pantry, lending)
    spec = model.spec
    forward = Forward(model, gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 64))
    seen = [forward.run(tokens)] + [forward.run([token]) for token in tokens[:steps]]
    assert not gate.counters.incidents
    return seen


def test_a_whole_model_gives_the_same_bits_as_the_cpu(link: GpuLink) -> None:
    directory = open_model(demo_model())
    model = prepare(directory.checkpoint, directory.spec, BlindingSettings(weights=Weights.INT8X2), PadSource())
    tokens = directory.tokenizer.encode("Once upon a time, there was a kind fox named Mia, and she was brave.")
    before = link.ring_products
    for ours, theirs in zip(
        logits(model, link, tokens, 1), logits(model, InProcessAccelerator(), tokens, 1), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert link.ring_products - before >= len(model.linears)


def test_a_gpu_serves_other_hosts_as_a_cpu_does(rng: np.random.Generator) -> None:
    pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
    server = AcceleratorServer("127.0.0.1:0", open_cuda)
    threading.Thread(target=server.serve, daemon=True).start()
    clients = [RemoteAccelerator(server.address) for _ in range(2)]
    weight = make_weights(rng)[0]
    for client in clients:
        client.register(weight)
        for rows in (1, 18):
            check(client, weight, rows, rng)
    for client in clients:
        client.close()
    server.close()


def test_clients_with_the_same_weight_share_it(rng: np.random.Generator) -> None:
    backend = DeviceBackend(ReferenceDevice())
    first, second, _ = make_weights(rng)
    kept = backend.prepare(first.matrix)
    assert backend.prepare(first.matrix.copy()) is kept
    assert backend.prepare(second.matrix) is not kept


def test_contradicting_options_are_refused() -> None:
    assert backend_of(DeviceKind.CUDA, Backend.AUTO) is Backend.CUDA
    assert backend_of(DeviceKind.CPU, Backend.NUMBA) is Backend.NUMBA
    with pytest.raises(SettingsError, match="contradict"):
        backend_of(DeviceKind.CUDA, Backend.TORCH)


def test_products_of_two_matrices_go_over_the_socket(rng: np.random.Generator) -> None:
    link = GpuLink(start_worker({}, backend="numba"))
    assert isinstance(link, PairAccelerator)
    shape = PairShape(2, 12, 0, 5, 0, True, 3)
    words = rng.integers(-HALF, HALF + 1, shape.appended_words + shape.left_words, dtype=np.int32)
    kept = words[: shape.appended_words].reshape(2, 5, 12)
    left = words[shape.appended_words :].reshape(2, 3, shape.d_in)
    answer = link.multiply_pair(received_pair(words, 1, shape), SECONDS)
    np.testing.assert_array_equal(answer, pair_product_reference(left, kept, True))
    link.release(1, SECONDS)
    with pytest.raises(AcceleratorProtocolError, match="not kept"):
        link.multiply_pair(received_pair(words[: shape.left_words], 1, PairShape(2, 12, 5, 0, 0, True, 3)), SECONDS)
    link.close()


def test_a_gpu_worker_is_started_by_whoever_may_start_one(rng: np.random.Generator) -> None:
    asked = []

    def start(label: str, backend: Backend, threads: int) -> SharedMemoryAccelerator:
        asked.append((label, backend))
        return start_worker({}, backend="numba")

    (link,) = open_accelerators(AcceleratorSettings(backend=Backend.CUDA), start)
    assert isinstance(link, GpuLink)
    weight = make_weights(rng)[0]
    link.register(weight)
    check(link, weight, 17, rng)
    link.close()
    assert asked == [("gpu-0", Backend.CUDA)]
