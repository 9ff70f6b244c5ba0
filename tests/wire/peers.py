"""A client and an enclave for the tests of the channel, with what the client expects of it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from cloister.attest.evidence import Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.roots import Roots
from cloister.attest.session import checker, prover
from cloister.attest.sim import Installation, SimAttester
from cloister.wire.channel import ClientChannel, ServerChannel
from cloister.wire.channel_messages import Offer, Suite

PROMPT = b"the patient is called Margarethe Weissenborn"


MEASUREMENT, ROOT, PLAN = b"m" * 32, b"r" * 32, b"p" * 32


NOW = datetime.now(UTC)


INSTALLATION = Installation.create(NOW)


RECEIPT_KEY = b"k" * 32


def policy(measurement: bytes = MEASUREMENT) -> Policy:
    accepted = SimPolicy(measurement=frozenset({measurement}), min_version=1)
    return Policy(accept=(accepted,), report_data=Skip("set for each exchange"))


def good_check(
    measurement: bytes = MEASUREMENT, root: bytes = ROOT, age: timedelta = timedelta()
) -> Callable[[bytes, Offer], None]:
    roots = Roots(sim=frozenset({INSTALLATION.fingerprint}))
    return checker(policy(measurement), roots, model_roots=frozenset({root}), clock=lambda: datetime.now(UTC) + age)


def server_channel(**changes: bytes) -> ServerChannel:
    claims = {"model_root": ROOT, "plan": PLAN, "measurement": MEASUREMENT, **changes}
    return ServerChannel(RECEIPT_KEY, **claims)


def connected(suites: tuple[Suite, ...] = (Suite.X_WING,)) -> tuple[ClientChannel, ServerChannel]:
    client, server = ClientChannel(suites), server_channel()
    client.accept(server.answer(client.hello(), prover(SimAttester(INSTALLATION, MEASUREMENT))), good_check())
    return client, server
