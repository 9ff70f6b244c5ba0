"""The broker: who gets a key, who does not, that everything is logged, and that a kill at any point loses nothing."""

import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from cloister.attest.evidence import Skip
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.roots import Roots
from cloister.attest.sim import Installation, SimAttester
from cloister.errors import BrokerError, KeyRefusedError, SealingKeyError, SettingsError
from cloister.seal import broker_server
from cloister.seal.broker import CHALLENGE_SECONDS, Broker
from cloister.seal.broker_server import BrokerServer
from cloister.seal.client import connect, fetch_key
from cloister.seal.package import Package
from cloister.seal.release import ReleaseRequest
from cloister.seal.store import DATABASE, KEY_FILE, Store
from cloister.seal.writer import Sealed
from cloister.wire.channel_keys import KeyPair
from cloister.wire.channel_messages import Suite
from tests.seal.conftest import ANYONE

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


@pytest.fixture
def store(tmp_path: Path, sealed: Sealed) -> Iterator[Store]:
    with Store.open(tmp_path / "broker", create=True) as made:
        made.deposit(sealed.root, "demo", 3, sealed.key, NOW)
        yield made


@pytest.fixture
def broker(store: Store) -> Broker:
    return Broker(store, read_policy)


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
    assert len(events(store, "release")) == 1
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


# Over a real socket.


@pytest.fixture
def server(broker: Broker, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BrokerServer]:
    with BrokerServer(broker, request.param.format(folder=tmp_path)) as made:
        thread = threading.Thread(target=made.serve)
        thread.start()
        yield made
        made.close()
        thread.join(10)


@pytest.mark.parametrize("server", ["127.0.0.1:0", "unix:{folder}/s"], indirect=True)
@pytest.mark.parametrize("suite", list(Suite))
def test_an_enclave_fetches_a_key_and_opens_its_package(
    server: BrokerServer, store: Store, sealed: Sealed, suite: Suite
) -> None:
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=3)
    connection = connect(server.address)
    try:
        with Package.open(sealed.folder, ANYONE) as package:
            key = fetch_key(connection, package.manifest, ATTESTER, measurement=MEASUREMENT, suite=suite)
            assert package.checkpoint(key).tensor("model.norm.weight").size
    finally:
        connection.close()


@pytest.mark.parametrize("server", ["127.0.0.1:0"], indirect=True)
def test_a_refusal_says_nothing_and_is_logged(server: BrokerServer, store: Store, sealed: Sealed) -> None:
    store.allow("demo", (b"x" * 32).hex(), NOW, min_version=3)
    connection = connect(server.address)
    with pytest.raises(KeyRefusedError) as caught:
        fetch_key(connection, sealed.manifest, ATTESTER, measurement=MEASUREMENT)
    assert "measurement" not in caught.value.message
    connection.close()
    (line,) = events(store, "refuse")
    assert "measurement" in str(line["reason"])


@pytest.mark.parametrize("server", ["127.0.0.1:0"], indirect=True)
def test_hostile_requests_are_answered_and_the_broker_lives(server: BrokerServer, store: Store, sealed: Sealed) -> None:
    host, port = server.address.rsplit(":", 1)

    def send(content: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(content)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def post(path: str, body: bytes) -> bytes:
        return send(f"POST {path} HTTP/1.1\r\nHost: b\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: 99999999999\r\n\r\n")
    assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: -1\r\n\r\n")
    for digits in (b"9" * 5000, b"0" * 5000):
        assert b" 413 " in send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: " + digits + b"\r\n\r\n")
    assert b" 404 " in post("/../../etc/passwd", b"{}")
    assert b" 403 " in post("/v1/release", b"[" * 5000)
    assert b" 403 " in post("/v1/release", b'{"nonce": 1}')
    assert b" 403 " in post("/v1/release", b"\xff\xfe")
    send(b"\x16\x03\x01\x00\xff")
    send(b"POST /v1/release HTTP/1.1\r\nHost: b\r\nContent-Length: 100\r\n\r\nshort")
    assert b" 200 " in post("/v1/challenge", b"{}")
    assert len(events(store, "refuse")) == 3


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /v1/challenge HTTP/1.1\r\nX: ", b"POST /v1/challenge HTTP/1.1\r\nContent-Length: 9999\r\n\r\n"],
)
@pytest.mark.parametrize("server", ["127.0.0.1:0", "unix:{folder}/s"], indirect=True)
def test_a_request_in_small_pieces_ends_in_time(
    server: BrokerServer, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(broker_server._Handler, "timeout", 0.3)
    connection = connect(server.address)
    sock = connection.sock
    sock.settimeout(0.05)
    sock.sendall(begun)
    for _ in range(400):  # a piece in time for each read
        try:
            sock.sendall(b"G")
            if sock.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        pytest.fail("the broker still listens to a request that never ends")
    connection.close()


@pytest.mark.parametrize("server", ["127.0.0.1:0"], indirect=True)
def test_one_address_does_not_hold_every_slot(server: BrokerServer) -> None:
    host, port = server.address.rsplit(":", 1)

    def connected(source: str) -> socket.socket:
        return socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))

    def answer(sock: socket.socket) -> bytes:
        sock.sendall(b"GET /v1/health HTTP/1.1\r\nHost: b\r\n\r\n")
        return sock.recv(65536)

    with ExitStack() as held:
        slow = [held.enter_context(connected("127.0.0.2")) for _ in range(broker_server.MOST_PER_ADDRESS)]
        assert b" 200 " in answer(slow[-1])
        refused = held.enter_context(connected("127.0.0.2"))
        with suppress(ConnectionError):
            assert answer(refused) == b""
        assert b" 200 " in answer(held.enter_context(connected("127.0.0.1")))
    for _ in range(200):  # the slots come back
        with connected("127.0.0.2") as sock, suppress(ConnectionError):
            if b" 200 " in answer(sock):
                return
        time.sleep(0.02)
    pytest.fail("the slots of an address that left are still taken")


def test_nobody_answers(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/none", "127.0.0.1:1", "ftp://x", "http://u@h/", "127.0.0.1:x"):
        with pytest.raises(BrokerError):
            connect(address)


# The store.


def test_keys_are_wrapped_on_disk_and_need_the_key_file(store: Store, sealed: Sealed, tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    assert sealed.key not in stored
    assert store.content_key(sealed.root) == sealed.key
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir() if path.name in (DATABASE, KEY_FILE))
    (folder / KEY_FILE).chmod(0o640)
    with pytest.raises(SealingKeyError, match="can be read by others"):
        Store.open(folder)
    (folder / KEY_FILE).chmod(0o600)
    (folder / KEY_FILE).write_bytes(bytes(32))
    with Store.open(folder) as other, pytest.raises(BrokerError, match="does not open"):
        other.content_key(sealed.root)
    (folder / KEY_FILE).unlink()
    with pytest.raises(BrokerError, match="is missing"):
        Store.open(folder, create=True)


def test_a_version_is_deposited_once(store: Store, sealed: Sealed) -> None:
    with pytest.raises(BrokerError, match="known already"):
        store.deposit(b"y" * 32, "demo", 3, bytes(32), NOW)
    assert store.next_version("demo") == 4
    assert store.next_version("other") == 1


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="no broker"):
        Store.open(tmp_path)
    Store.open(tmp_path, create=True).close()
    (tmp_path / DATABASE).write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(BrokerError, match="not a broker's store"):
        Store.open(tmp_path)


def test_the_log_cannot_be_changed_and_shows_it_when_it_was(store: Store, tmp_path: Path) -> None:
    for number in range(5):
        store.note({"event": "note", "number": number})
    assert store.log.head()[0] == 6
    for statement in ("UPDATE log SET event = '{}'", "DELETE FROM log"):
        with pytest.raises(sqlite3.Error, match="append-only"):
            store.database.execute(statement)
    changes = [
        "UPDATE log SET event = replace(event, '3', '7') WHERE number = 5",
        "DELETE FROM log WHERE number = 4",
        "UPDATE log SET number = 40 WHERE number = 6",
        "UPDATE log SET mac = zeroblob(32) WHERE number = 2",
    ]
    folder = tmp_path / "broker"
    for change in changes:
        with sqlite3.connect(":memory:") as forger:
            store.database.backup(forger)
            forger.executescript("DROP TRIGGER log_is_not_changed; DROP TRIGGER log_is_not_deleted;")
            forger.execute(change)
            forged = Store(forger, (folder / KEY_FILE).read_bytes())
            with pytest.raises(BrokerError, match="was changed or removed"):
                forged.log.head()
        forger.close()


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.seal.test_broker as broker_tests
from cloister.attest.sim import Installation
from cloister.seal.broker import Broker
from cloister.seal.release import ReleaseRequest
from cloister.seal.store import Store
import msgspec
folder, request, installation, kill_at = sys.argv[1:]
broker_tests.INSTALLATION = Installation.decode(Path(installation).read_bytes())
store = Store.open(Path(folder))
count = 0
def step(statement):
    global count
    count += 1
    if count == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
store.database.set_trace_callback(step)
released = Broker(store, broker_tests.read_policy).release(msgspec.json.decode(Path(request).read_bytes(), type=ReleaseRequest))
step("before the answer is sent")
sys.stdout.buffer.write(released.sealed)
"""


def test_killed_at_any_point_nothing_is_lost_and_nothing_is_issued_twice(
    store: Store, broker: Broker, sealed: Sealed, tmp_path: Path
) -> None:
    """A broker is killed before each statement in turn, then asked again: one release, one line, one use."""
    (tmp_path / "installation").touch(mode=0o600)
    (tmp_path / "installation").write_bytes(INSTALLATION.encode())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1, uses=100)
    for killed in itertools.count(1):
        asked, keys = request(broker, sealed)
        (tmp_path / "request").write_bytes(msgspec.json.encode(asked))
        command = [sys.executable, "-c", KILLED, str(tmp_path / "broker"), str(tmp_path / "request")]
        done = subprocess.run(
            [*command, str(tmp_path / "installation"), str(killed)], capture_output=True, env=environment, check=False
        )
        again = broker.release(asked)  # by a broker that was started afresh, or another on the same store
        assert keys.open(again.sealed, asked.info()) == sealed.key
        assert len(events(store, "release")) == killed
        (grant,) = store.grants("demo")
        assert grant.uses == 100 - killed
        if done.returncode == 0:
            assert done.stdout == again.sealed
            break
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert done.stdout == b""
    assert killed > 8  # every statement of the transaction had its turn
