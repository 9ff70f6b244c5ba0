"""The broker: who gets a key, who does not, and that everything is logged."""

import json
import threading
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from cloister.attest.sim import Installation, SimAttester
from cloister.errors import BrokerError, KeyRefusedError
from cloister.seal.broker import CHALLENGE_SECONDS, Broker
from cloister.seal.release import ReleaseRequest
from cloister.seal.store import Store
from cloister.seal.writer import Sealed
from cloister.wire.channel_keys import KeyPair
from cloister.wire.channel_messages import Suite
from tests.seal.brokers import MEASUREMENT, NOW, events, read_policy, request


def test_a_key_is_released_to_evidence_that_a_grant_accepts(store: Store, broker: Broker, sealed: Sealed) -> None:
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1)
    asked, keys = request(broker, sealed)
    released = broker.release(asked)
    assert keys.open(released.sealed, asked.info()) == sealed.key
    (line,) = events(store, "release")
    assert line["model"] == "demo"
    assert line["measurement"] == MEASUREMENT.hex()
    assert sealed.key.hex() not in json.dumps(line)


REFUSALS = {
    "nothing is allowed": {},
    "another measurement": {"policy": (b"x" * 32).hex()},
    "a version that is too old": {"min_version": 4},
    "a grant that has ended": {"until": 1.0},
    "a grant without uses": {"uses": 0},
    "a policy that does not read": {"policy": "zz"},
}


@pytest.mark.parametrize("grant", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_no_grant_covers_is_refused_and_logged(
    store: Store, broker: Broker, sealed: Sealed, grant: dict[str, object]
) -> None:
    if grant:
        values = {"policy": MEASUREMENT.hex(), "min_version": 1, **grant}
        store.allow("demo", now=NOW, **values)
    asked, _ = request(broker, sealed)
    with pytest.raises(KeyRefusedError):
        broker.release(asked)
    assert len(events(store, "refuse")) == 1
    assert events(store, "release") == []


def test_what_is_not_the_enclave_s_own_is_refused_and_logged(store: Store, broker: Broker, sealed: Sealed) -> None:
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1)
    good, _ = request(broker, sealed)
    stranger = SimAttester(Installation.create(datetime.now(UTC)), MEASUREMENT)
    wrong = [
        request(broker, sealed, evidence=b"")[0],
        request(broker, sealed, evidence=good.evidence)[0],  # of another nonce and key
        request(broker, sealed, root=b"x" * 32)[0],
        request(broker, sealed, nonce=b"n" * 32)[0],
        msgspec.structs.replace(request(broker, sealed)[0], key=KeyPair(Suite.X25519).public),  # the attacker's key
        msgspec.structs.replace(request(broker, sealed)[0], measurement=b"x" * 32),
        msgspec.structs.replace(request(broker, sealed)[0], suite=Suite.X_WING),
    ]
    unsigned, _ = request(broker, sealed)
    wrong.append(
        msgspec.structs.replace(unsigned, evidence=stranger.evidence(unsigned.binding().report_data()).encode())
    )
    for number, asked in enumerate(wrong, 1):
        with pytest.raises(KeyRefusedError):
            broker.release(asked)
        assert len(events(store, "refuse")) == number
    assert events(store, "release") == []


def test_a_revoked_grant_releases_nothing_more(store: Store, broker: Broker, sealed: Sealed) -> None:
    number = store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1)
    broker.release(request(broker, sealed)[0])
    store.revoke(number, NOW)
    with pytest.raises(KeyRefusedError, match="has ended"):
        broker.release(request(broker, sealed)[0])
    with pytest.raises(BrokerError, match="no open grant"):
        store.revoke(number, NOW)


def test_a_lost_answer_can_be_asked_for_again_and_counts_once(store: Store, broker: Broker, sealed: Sealed) -> None:
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1, uses=1)
    asked, _ = request(broker, sealed)
    first = broker.release(asked)
    assert broker.release(asked) == first
    assert len(events(store, "release")) == len(events(store, "repeat")) == 1
    other, _ = request(broker, sealed)
    with pytest.raises(KeyRefusedError, match="has ended"):
        broker.release(other)
    with pytest.raises(KeyRefusedError, match="used for another request"):
        broker.release(request(broker, sealed, nonce=asked.nonce)[0])


def test_of_many_that_ask_at_once_only_as_many_as_allowed_are_served(
    store: Store, broker: Broker, sealed: Sealed
) -> None:
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1, uses=3)
    outcomes: list[bool] = []

    def ask(asked: ReleaseRequest) -> None:
        try:
            broker.release(asked)
        except KeyRefusedError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [threading.Thread(target=ask, args=(request(broker, sealed)[0],)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True] * 3
    assert len(events(store, "release")) == 3
    assert len(events(store, "refuse")) == 7


def test_an_old_nonce_is_refused(store: Store, sealed: Sealed) -> None:
    moments = iter([datetime.now(UTC) - timedelta(seconds=CHALLENGE_SECONDS + 1), *[datetime.now(UTC)] * 9])
    broker = Broker(store, read_policy, lambda: next(moments))
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1)
    asked, _ = request(broker, sealed)
    with pytest.raises(KeyRefusedError, match="too old"):
        broker.release(asked)
