"""The curious and the cheating accelerator: the one sees all and changes nothing, the other does what its name says."""

import time

import numpy as np
import pytest

from cloister.accelerator.inprocess import InProcessAccelerator
from cloister.arith.modulus import HALF, P
from cloister.audit.observer import Observer
from cloister.audit.tamper import OTHERS, STRATEGIES, Tamper
from cloister.blinding import field
from cloister.errors import AcceleratorLostError, AcceleratorProtocolError, AcceleratorTimeoutError, SettingsError
from cloister.wire.codec import received_rows
from cloister.wire.messages import Blinded, PublicWeight, check_product

SECONDS = 30.0
D_OUT, D_IN = 6, 8


@pytest.fixture
def weight(rng: np.random.Generator) -> PublicWeight:
    return PublicWeight.of(rng.integers(-127, 128, (D_OUT, D_IN), dtype=np.int8))


def make_rows(rng: np.random.Generator, rows: int = 3) -> Blinded:
    return received_rows(rng.integers(-HALF, HALF + 1, rows * D_IN, dtype=np.int32), rows, D_IN)


def test_an_observer_changes_nothing_and_remembers_everything(weight: PublicWeight, rng: np.random.Generator) -> None:
    observer = Observer(InProcessAccelerator())
    observer.register(weight)
    started = time.monotonic()
    sent = [make_rows(rng, rows) for rows in (1, 3, 2)]
    kept = [blinded.rows.copy() for blinded in sent]
    for blinded in sent:
        answer = observer.multiply(weight.weight_id, blinded, SECONDS)
        np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))
        blinded.rows[:] = 0  # the gate reuses its memory; what was seen stays seen
    assert [weight_id for weight_id, _ in observer.seen] == [weight.weight_id] * 3
    for (_, seen), rows in zip(observer.seen, kept, strict=True):
        np.testing.assert_array_equal(seen, rows)
    assert (observer.products, observer.rows) == (3, 6)
    assert observer.weights == {weight.weight_id: (D_OUT, D_IN)}
    assert [(r.weight_id, r.rows, r.d_in) for r in observer.requests] == [
        (weight.weight_id, rows, D_IN) for rows in (1, 3, 2)
    ]
    times = [started, *(t for r in observer.requests for t in (r.started_seconds, r.started_seconds + r.took_seconds))]
    assert times == sorted(times)
    assert [row.tolist() for row in observer.sample(2)] == [kept[1][0].tolist(), kept[2][0].tolist()]
    assert observer.sample(0) == []


def test_an_observer_forgets_the_oldest_beyond_its_memory(weight: PublicWeight, rng: np.random.Generator) -> None:
    observer = Observer(InProcessAccelerator(), memory_bytes=4 * D_IN * 5)
    observer.register(weight)
    sent = [make_rows(rng, 2) for _ in range(4)]
    for blinded in sent:
        observer.multiply(weight.weight_id, blinded, SECONDS)
    assert [seen.tolist() for _, seen in observer.seen] == [blinded.rows.tolist() for blinded in sent[2:]]
    large = make_rows(rng, 9)
    observer.multiply(weight.weight_id, large, SECONDS)
    ((_, seen),) = observer.seen
    np.testing.assert_array_equal(seen, large.rows[:5])
    assert observer.rows == 17


def test_an_observer_without_memory_still_counts(weight: PublicWeight, rng: np.random.Generator) -> None:
    observer = Observer(InProcessAccelerator(), memory_bytes=0)
    observer.register(weight)
    observer.multiply(weight.weight_id, make_rows(rng), SECONDS)
    assert (observer.seen, observer.products, len(observer.requests)) == ([], 1, 1)


def test_an_observer_sees_requests_that_fail_and_closes_what_it_observes(
    weight: PublicWeight, rng: np.random.Generator
) -> None:
    observer = Observer(Tamper(InProcessAccelerator(), "lost"))
    observer.register(weight)
    with pytest.raises(AcceleratorLostError):
        observer.multiply(weight.weight_id, make_rows(rng), SECONDS)
    assert len(observer.requests) == len(observer.seen) == 1
    observer.close()
    with pytest.raises(AcceleratorLostError, match="closed"):
        observer.multiply(weight.weight_id, make_rows(rng), SECONDS)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_way_to_cheat_changes_the_answer_from_its_turn_on(
    strategy: str, rows: int, weight: PublicWeight, rng: np.random.Generator
) -> None:
    tamper = Tamper(InProcessAccelerator(), strategy, at_call=2, seed=5)
    tamper.register(weight)
    blinded = make_rows(rng, rows)
    truth = field.product(blinded.rows, weight.matrix)
    for call in (1, 2, 3):
        answer = tamper.multiply(weight.weight_id, blinded, SECONDS)
        assert (np.shape(answer) == truth.shape and np.array_equal(answer, truth)) == (call != 2)


@pytest.mark.parametrize("strategy", ["short", "floats"])
def test_answers_of_another_form_are_malformed(strategy: str, weight: PublicWeight, rng: np.random.Generator) -> None:
    tamper = Tamper(InProcessAccelerator(), strategy)
    tamper.register(weight)
    with pytest.raises(AcceleratorProtocolError):
        check_product(tamper.multiply(weight.weight_id, make_rows(rng), SECONDS), 3, D_OUT)


def cheat(strategy: str, weight: PublicWeight, blinded: Blinded) -> tuple[np.ndarray, np.ndarray]:
    tamper = Tamper(InProcessAccelerator(), strategy)
    tamper.register(weight)
    return tamper.multiply(weight.weight_id, blinded, SECONDS), field.product(blinded.rows, weight.matrix)


def test_each_way_to_cheat_does_what_its_name_says(weight: PublicWeight, rng: np.random.Generator) -> None:
    blinded = make_rows(rng)
    answer, truth = cheat("one element off by one", weight, blinded)
    assert ((answer - truth.astype(np.int64)) % P).sum() == 1
    answer, truth = cheat("one element random", weight, blinded)
    assert (answer != truth).sum() == 1
    answer, truth = cheat("one row random", weight, blinded)
    assert (answer != truth).any(axis=1).sum() == 1
    answer, truth = cheat("rows swapped", weight, blinded)
    assert answer.tolist() == truth[[2, 0, 1]].tolist()
    answer, truth = cheat("outputs swapped", weight, blinded)
    assert sorted(answer[0].tolist()) == sorted(truth[0].tolist())
    answer, truth = cheat("off by the modulus", weight, blinded)
    np.testing.assert_array_equal(answer.astype(np.int64) % P, truth.astype(np.int64) % P)
    assert np.abs(answer.astype(np.int64)).max() > HALF
    answer, _ = cheat("zeros", weight, blinded)
    assert not answer.any()


def test_a_stale_answer_is_the_previous_one(weight: PublicWeight, rng: np.random.Generator) -> None:
    tamper = Tamper(InProcessAccelerator(), "stale", at_call=2)
    tamper.register(weight)
    first = tamper.multiply(weight.weight_id, make_rows(rng), SECONDS)
    again = tamper.multiply(weight.weight_id, make_rows(rng), SECONDS)
    np.testing.assert_array_equal(again, first)


def test_a_late_answer_times_out_like_a_real_one(weight: PublicWeight, rng: np.random.Generator) -> None:
    tamper = Tamper(InProcessAccelerator(), "late", at_call=1)
    tamper.register(weight)
    with pytest.raises(AcceleratorTimeoutError, match=r"0\.05 s"):
        tamper.multiply(weight.weight_id, make_rows(rng), 0.05)
    tamper.multiply(weight.weight_id, make_rows(rng), 0.05)
    slow = Tamper(InProcessAccelerator(), "late", late_seconds=0.05)
    slow.register(weight)
    blinded = make_rows(rng)
    started = time.monotonic()
    answer = slow.multiply(weight.weight_id, blinded, SECONDS)
    assert time.monotonic() - started >= 0.05
    np.testing.assert_array_equal(answer, field.product(blinded.rows, weight.matrix))


def test_a_strategy_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="honest") as caught:
        Tamper(InProcessAccelerator(), "one element of by one")
    for name in (*STRATEGIES, *OTHERS):
        assert name in str(caught.value)
