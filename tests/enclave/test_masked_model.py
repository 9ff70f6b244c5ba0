"""Lent attention in the shipped model: the same text, cut and continued conversations, and one roster with the gate."""

import numpy as np
import pytest

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.audit.observer import Observer
from cloister.audit.tamper import Tamper
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.masked_attention import MaskedAttention
from cloister.enclave.outsource import Gate
from cloister.enclave.prepare import EnclaveModel
from cloister.enclave.schedule import Schedule
from cloister.errors import SettingsError, VerificationError
from cloister.settings import AcceleratorSettings, BlindingSettings, OnFailure, Prefill, Settings


class Setup:
    """The shipped model with lent attention, its linears lent as well or computed in the enclave."""

    def __init__(self, model: EnclaveModel, *accelerators: object, linears: bool = False, masked: bool = True) -> None:
        for accelerator in accelerators:
            for linear in model.linears:
                accelerator.register(linear.weight)  # type: ignore[attr-defined]
        settings = Settings(blinding=BlindingSettings(prefill=Prefill.BLINDED))
        pantry = Pantry(model.linears, 2**24, PadSource())
        schedule = None if linears else Schedule(frozenset(), frozenset())
        self.gate = Gate(model.linears, accelerators, pantry, settings, schedule=schedule)  # type: ignore[arg-type]
        self.attention = MaskedAttention(self.gate.roster, PadSource()) if masked else None
        spec = model.spec
        cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 256)
        self.forward = Forward(model, self.gate, cache, attention=self.attention)

    def greedy(self, tokens: list[int], count: int = 24) -> list[int]:
        logits = self.forward.run(tokens)
        produced = []
        for _ in range(count):
            produced.append(int(logits.argmax()))
            logits = self.forward.run(produced[-1:])
        return produced


@pytest.fixture(scope="module")
def expected(model: EnclaveModel, tokens: list[int]) -> list[int]:
    return Setup(model, masked=False).greedy(tokens)


def test_the_shipped_model_writes_the_same_text_with_a_real_worker(
    model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    worker = SharedMemoryAccelerator.start(threads=1)
    observer = Observer(worker)
    setup = Setup(model, observer, linears=True)
    assert setup.attention is not None
    assert setup.greedy(tokens, 16) == expected[:16]
    counters = setup.attention.counters
    assert counters.products == 17 * model.spec.layers * 2, "two exchanges a layer and pass"
    assert (counters.enclave_passes, counters.appends) == (0, 0)
    assert setup.gate.counters.enclave_products == 0
    assert observer.products == counters.products + setup.gate.counters.products
    assert observer.uniformity().uniform
    setup.attention.release()
    worker.close()


def test_another_turn_and_a_cut_conversation_go_on_as_in_the_enclave(model: EnclaveModel, tokens: list[int]) -> None:
    lent, own = Setup(model, InProcessAccelerator()), Setup(model, masked=False)
    for cut, more in [(0, tokens), (9, tokens[:4]), (5, tokens[5:]), (0, tokens[::-1])]:
        results = []
        for setup in (lent, own):
            setup.forward.truncate(cut)
            results.append(setup.greedy(more, 4))
        assert results[0] == results[1]
    assert lent.attention is not None
    assert lent.attention.counters.enclave_passes == 0


def test_logits_differ_by_less_than_rounding_does_elsewhere(model: EnclaveModel, tokens: list[int]) -> None:
    lent, own = (
        setup.forward.run_all(tokens) for setup in (Setup(model, InProcessAccelerator()), Setup(model, masked=False))
    )
    assert np.abs(lent - own).max() < 1e-3 * np.abs(own).max()


@pytest.mark.parametrize("at_call", [40, 41])
def test_whoever_cheats_at_one_gets_no_work_at_the_other(
    at_call: int, model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    """A layer has four linears and two products of attention: call 40 is of A V, call 41 of the output projection."""
    setup = Setup(model, Tamper(InProcessAccelerator(), "one element off by one", at_call=at_call), linears=True)
    assert setup.greedy(tokens, 8) == expected[:8]
    (incident,) = setup.gate.counters.incidents
    assert ("attention" in incident.linear) == (at_call == 40)
    assert not setup.gate.accelerators


def test_stopping_keeps_the_cache_and_shape_hiding_is_refused(model: EnclaveModel, tokens: list[int]) -> None:
    cheat = Tamper(InProcessAccelerator(), "zeros", at_call=4)
    attention = MaskedAttention(cheat, PadSource(), settings=AcceleratorSettings(on_failure=OnFailure.STOP))
    spec, own = model.spec, Setup(model, masked=False)
    cache = PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 256)
    forward = Forward(model, own.gate, cache, attention=attention)
    with pytest.raises(VerificationError, match=r"the values of layers\.1\.attention"):
        forward.run(tokens)
    assert forward.tokens == 0
    np.testing.assert_array_equal(forward.run(tokens), own.forward.run(tokens))  # nobody is left: the enclave's own
    with pytest.raises(SettingsError, match="shape_hiding"):
        Forward(model, own.gate, cache, shape_hiding=16, attention=attention)
