"""The gate under a curious and a cheating accelerator: nothing but uniform rows leaves, no wrong answer is used."""

import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.assets import demo_model
from cloister.audit.observer import Observer
from cloister.audit.tamper import STRATEGIES, Tamper
from cloister.audit.uniformity import measure_uniformity
from cloister.blinding import kernels, pads
from cloister.blinding.mill import Mill
from cloister.blinding.pads import PadSource
from cloister.blinding.pantry import Pantry
from cloister.enclave import engine
from cloister.enclave.forward import Forward
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.outsource import Fault, Gate, Incident
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.errors import AcceleratorTimeoutError, NonFiniteError, PantryEmptyError, VerificationError
from cloister.model.directory import open_model
from cloister.settings import AcceleratorSettings, BlindingSettings, OnFailure, Prefill, Settings, Weights, WhenEmpty
from cloister.wire.messages import Blinded, PublicWeight
from cloister.wire.session import Generate, Sampling


class Setup:
    """A gate with its pantry and forward pass."""

    def __init__(
        self, model: EnclaveModel, accelerators: list[object], settings: Settings, mill_tokens: int = 0
    ) -> None:
        for accelerator in accelerators:
            for linear in model.linears:
                accelerator.register(linear.weight)  # type: ignore[attr-defined]
        self.pantry = Pantry(model.linears, settings.blinding.pantry_bytes, PadSource())
        self.mill = Mill(self.pantry, mill_tokens) if mill_tokens else None
        self.incidents: list[Incident] = []
        self.gate = Gate(
            model.linears, accelerators, self.pantry, settings, mill=self.mill, on_incident=self.incidents.append  # type: ignore[arg-type]
        )  # fmt: skip
        spec = model.spec
        self.forward = Forward(
            model,
            self.gate,
            PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 256),
            shape_hiding=settings.blinding.shape_hiding,
        )

    def greedy(self, tokens: list[int], count: int = 24) -> list[int]:
        logits = self.forward.run(tokens)
        produced = []
        for _ in range(count):
            produced.append(int(logits.argmax()))
            logits = self.forward.run(produced[-1:])
        return produced


def blinded(**changes: object) -> Settings:
    fields = {f.name for f in dataclasses.fields(BlindingSettings)}
    blinding = {"prefill": Prefill.BLINDED, **{k: v for k, v in changes.items() if k in fields}}
    accelerator = {k: v for k, v in changes.items() if k not in fields}
    return Settings(blinding=BlindingSettings(**blinding), accelerator=AcceleratorSettings(**accelerator))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(model: EnclaveModel, tokens: list[int]) -> list[int]:
    """The tokens without any accelerator."""
    return Setup(model, [], Settings()).greedy(tokens)


def test_lent_and_computed_here_give_the_same_tokens(
    model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    setup = Setup(model, [InProcessAccelerator()], blinded())
    assert setup.greedy(tokens) == expected
    assert setup.gate.counters.products == 25 * len(model.linears)
    assert setup.gate.counters.enclave_products == 0


@pytest.mark.parametrize("strategy", [*STRATEGIES, "stale", "lost"])
@pytest.mark.parametrize("spare", [True, False])
def test_a_cheating_accelerator_is_caught_named_and_changes_nothing(
    strategy: str, spare: bool, model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    accelerators: list[object] = [Tamper(InProcessAccelerator(), strategy, at_call=40)]
    if spare:
        accelerators.append(Observer(InProcessAccelerator()))
    setup = Setup(model, accelerators, blinded())
    assert setup.greedy(tokens, 8) == expected[:8]  # the third pass is spoiled
    (incident,) = setup.incidents
    assert incident.linear == model.linears[39 % len(model.linears)].name
    assert incident.outcome is (Fault.NEXT if spare else Fault.ENCLAVE)
    assert len(setup.gate.accelerators) == int(spare)


def test_a_retry_uses_a_fresh_pad(model: EnclaveModel, tokens: list[int]) -> None:
    first, second = Observer(InProcessAccelerator()), Observer(InProcessAccelerator())
    setup = Setup(model, [Tamper(first, "zeros", at_call=1), second], blinded())
    setup.forward.run(tokens)
    (_, failed), (_, retried) = first.seen[0], second.seen[0]
    assert failed.shape == retried.shape
    assert (failed == retried).mean() < 0.01, "the same pad would show the same rows"


def test_stopping_on_failure_ends_the_pass_and_keeps_the_cache(model: EnclaveModel, tokens: list[int]) -> None:
    setup = Setup(model, [Tamper(InProcessAccelerator(), "zeros", at_call=5)], blinded(on_failure=OnFailure.STOP))
    with pytest.raises(VerificationError, match=r"layers\.1\.qkv"):
        setup.forward.run(tokens)
    assert setup.forward.tokens == 0
    assert setup.incidents[0].outcome is Fault.STOPPED


def test_a_late_accelerator_is_given_up(model: EnclaveModel, tokens: list[int], expected: list[int]) -> None:
    class Late(InProcessAccelerator):
        calls = 0

        def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> np.ndarray:
            self.calls += 1
            if self.calls == 10:
                raise AcceleratorTimeoutError(f"The accelerator did not answer within {timeout_seconds:g} s.")
            return super().multiply(weight_id, blinded, timeout_seconds)

    setup = Setup(model, [Late()], blinded(timeout_seconds=0.5))
    assert setup.greedy(tokens) == expected
    assert "0.5 s" in setup.incidents[0].reason


def test_what_the_accelerator_sees_of_a_real_prompt_is_uniform(model: EnclaveModel, tokens: list[int]) -> None:
    observer = Observer(InProcessAccelerator())
    setup = Setup(model, [observer], blinded())
    setup.greedy(tokens)
    assert observer.rows >= len(tokens)
    for name, linear in ((linear.name, linear) for linear in model.linears[:4]):
        rows = [seen.reshape(-1) for weight, seen in observer.seen if weight == linear.weight.weight_id]
        assert measure_uniformity(np.concatenate(rows)[None]).uniform, name
    assert observer.uniformity().uniform


def test_the_same_tests_fail_when_blinding_is_switched_off(
    model: EnclaveModel, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bare(x, reach, pad, check, out, scales, expected):  # type: ignore[no-untyped-def]
        pad.fill(0)
        return kernels.blind(x, reach, pad, check, out, scales, expected)

    monkeypatch.setattr(pads, "blind", bare)
    observer = Observer(Tamper(InProcessAccelerator(), "honest"))
    setup = Setup(model, [observer], blinded())
    setup.forward.run(tokens)
    seen = observer.uniformity()
    assert not seen.uniform
    assert seen.kolmogorov_smirnov_p < 1e-100


def test_nothing_leaves_before_the_pad_is_spent_and_only_blinded_rows_leave(
    model: EnclaveModel, tokens: list[int]
) -> None:
    class Strict(InProcessAccelerator):
        def register(self, weight: PublicWeight) -> None:
            assert isinstance(weight, PublicWeight)
            super().register(weight)

        def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> np.ndarray:
            assert type(blinded) is Blinded
            return super().multiply(weight_id, blinded, timeout_seconds)

    setup = Setup(model, [Strict()], blinded())
    setup.forward.run(tokens)
    assert not setup.incidents


def test_an_answer_that_changes_after_it_was_given_does_not_matter(
    model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    """The answer may lie in memory that the accelerator still writes: the enclave checks and uses a copy of its own."""

    class Racing(InProcessAccelerator):
        def multiply(self, weight_id: bytes, blinded: Blinded, timeout_seconds: float) -> np.ndarray:
            answer = super().multiply(weight_id, blinded, timeout_seconds)
            shared.append(answer)
            return answer

    shared: list[np.ndarray] = []
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            if shared:
                shared[-1][:] = 12345
            time.sleep(0)

    setup = Setup(model, [Racing()], blinded())
    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        assert (
            setup.greedy(tokens, 6) == expected[:6]
        )  # either the copy was right, or the check refused and it was redone
    finally:
        stop.set()
        thread.join()


def test_an_empty_pantry_refills_or_computes_here_as_configured(
    model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    refill = Setup(model, [InProcessAccelerator()], blinded(when_empty=WhenEmpty.REFILL))
    assert refill.greedy(tokens, 4) == expected[:4]
    assert refill.gate.counters.pads_made_late > 0
    here = Setup(model, [InProcessAccelerator()], blinded(when_empty=WhenEmpty.ENCLAVE))
    assert here.greedy(tokens, 4) == expected[:4]
    assert here.gate.counters.products == 0


def test_an_empty_pantry_waits_for_the_mill_or_says_that_it_waited_in_vain(
    model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    setup = Setup(model, [InProcessAccelerator()], blinded(when_empty=WhenEmpty.WAIT), mill_tokens=64)
    assert setup.mill is not None
    with setup.mill.paused():
        assert setup.greedy(tokens, 4) == expected[:4]
    assert setup.gate.counters.pads_made_late == 0
    setup.mill.close()
    dry = Setup(model, [InProcessAccelerator()], blinded(when_empty=WhenEmpty.WAIT, timeout_seconds=0.1), mill_tokens=1)
    assert dry.mill is not None
    dry.mill.close()
    with pytest.raises(PantryEmptyError, match="stocked"):
        dry.forward.run(tokens)


def test_auto_prefill_lends_only_what_is_stocked(model: EnclaveModel, tokens: list[int], expected: list[int]) -> None:
    setup = Setup(model, [InProcessAccelerator()], blinded(prefill=Prefill.AUTO))
    assert setup.greedy(tokens, 4) == expected[:4]
    assert setup.gate.counters.enclave_products == len(model.linears), "the prompt was computed here"
    stocked = Setup(model, [InProcessAccelerator()], blinded(prefill=Prefill.AUTO))
    stocked.pantry.stock(64)
    assert stocked.greedy(tokens, 4) == expected[:4]
    assert stocked.gate.counters.enclave_products == 0


def test_shape_hiding_shows_a_bucket_and_changes_no_token(
    model: EnclaveModel, tokens: list[int], expected: list[int]
) -> None:
    observer = Observer(InProcessAccelerator())
    setup = Setup(model, [observer], blinded(shape_hiding=32))
    assert setup.greedy(tokens, 4) == expected[:4]
    assert {rows.shape[0] for _, rows in observer.seen} == {1, 32}


@pytest.mark.parametrize(("bucket", "lengths"), [(64, (20, 37, 50)), (8, (17, 20)), (12, (13, 20, 24)), (32, (1, 30))])
def test_prompts_of_one_bucket_look_alike_however_many_passes_they_take(
    bucket: int, lengths: tuple[int, ...], model: EnclaveModel, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 16)
    directory = open_model(demo_model())
    shown, texts = [], []
    for setting in (blinded(shape_hiding=bucket), blinded()):
        for length in lengths:
            observer = Observer(InProcessAccelerator())
            setup = Setup(model, [observer], setting)
            run = engine.Engine(setup.forward, setup.gate, setup.pantry, directory.tokenizer, directory.defaults)
            prompt = (tokens * 4)[:length]
            monkeypatch.setattr(run, "_encode", lambda *_, prompt=prompt: prompt)
            asked = Generate(Sampling(max_new_tokens=2, temperature=0, ignore_eos=True), prompt="x")
            made = [delta.token_ids for delta in run.generate(asked, lambda: None, lambda _: None)]
            shown.append([(weight, rows.shape[0]) for weight, rows in observer.seen])
            texts.append(made)
    hidden, plain = shown[: len(lengths)], shown[len(lengths) :]
    assert all(one == hidden[0] for one in hidden)
    assert not all(one == plain[0] for one in plain)
    assert texts[: len(lengths)] == texts[len(lengths) :]


def test_two_planes_are_lent_as_well(tokens: list[int]) -> None:
    directory = open_model(demo_model())
    fine = prepare(
        directory.checkpoint, directory.spec, BlindingSettings(weights=Weights.INT8X2, checks=2), PadSource()
    )
    lent = Setup(fine, [InProcessAccelerator()], blinded(weights=Weights.INT8X2, checks=2)).greedy(tokens, 8)
    assert lent == Setup(fine, [], Settings()).greedy(tokens, 8)


def test_an_overflowing_activation_names_its_layer(model: EnclaveModel) -> None:
    setup = Setup(model, [InProcessAccelerator()], blinded())
    x = np.full((1, model.spec.hidden_size), np.inf, np.float32)
    out = np.empty((1, model.linears[0].d_out), np.float32)
    checks: list[Callable[[], None]] = [
        lambda: setup.gate.linear(0, x, out, True),
        lambda: setup.gate.linear(0, x, out, False),
    ]
    for check in checks:
        with pytest.raises(NonFiniteError, match=r"layers\.0\.qkv"):
            check()
