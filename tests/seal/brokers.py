"""A software stand-in that asks a broker for keys, and the policy of the broker's grants."""

from datetime import UTC, datetime

import msgspec

from cloister.attest.evidence import Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.roots import Roots
from cloister.attest.sim import Installation, SimAttester
from cloister.errors import SettingsError
from cloister.seal.broker import Broker
from cloister.seal.release import ReleaseRequest
from cloister.seal.store import Store
from cloister.seal.writer import Sealed
from cloister.wire.channel_keys import KeyPair
from cloister.wire.channel_messages import Suite

MEASUREMENT = b"m" * 32


INSTALLATION = Installation.create(datetime.now(UTC))


ATTESTER = SimAttester(INSTALLATION, MEASUREMENT)


NOW = "2026-01-01T00:00:00+00:00"


def read_policy(text: str) -> tuple[Policy, Roots]:
    """The text of these tests' grants is the accepted measurement."""
    if text == "zz":
        raise SettingsError("A policy that does not read.")
    accepted = SimPolicy(measurement=frozenset({bytes.fromhex(text)}), min_version=1)
    policy = Policy(accept=(accepted,), report_data=Skip("set for each release"))
    return policy, Roots(sim=frozenset({INSTALLATION.fingerprint}))


def request(broker: Broker, sealed: Sealed, **changes: object) -> tuple[ReleaseRequest, KeyPair]:
    keys = KeyPair(Suite.X25519)
    made = ReleaseRequest(
        nonce=broker.challenge().nonce, suite=keys.suite, key=keys.public, root=sealed.root, measurement=MEASUREMENT,
        plan=b"", evidence=b"",
    )  # fmt: skip
    made = msgspec.structs.replace(made, **{k: v for k, v in changes.items() if k != "evidence"})
    evidence = changes.get("evidence", ATTESTER.evidence(made.binding().report_data()).encode())
    return msgspec.structs.replace(made, evidence=evidence), keys


def events(store: Store, kind: str) -> list[dict[str, object]]:
    return [line.event for line in store.log.lines() if line.event["event"] == kind]
