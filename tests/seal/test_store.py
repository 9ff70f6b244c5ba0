"""The broker's store: keys wrapped on the disk, a log that shows when it was changed, and a kill at any point."""

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cloister.errors import BrokerError, SealingKeyError
from cloister.seal.broker import Broker
from cloister.seal.store import DATABASE, KEY_FILE, Store
from cloister.seal.writer import Sealed
from tests.seal.brokers import INSTALLATION, MEASUREMENT, NOW, events, request


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
from tests.seal import brokers
from cloister.attest.sim import Installation
from cloister.seal.broker import Broker
from cloister.seal.release import ReleaseRequest
from cloister.seal.store import Store
import msgspec
folder, request, installation, answer = (Path(argument) for argument in sys.argv[1:])
brokers.INSTALLATION = Installation.decode(installation.read_bytes())
def serve(kill_at):
    store = Store.open(folder)
    count = 0
    def step(statement):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    store.database.set_trace_callback(step)
    released = Broker(store, brokers.read_policy).release(msgspec.json.decode(request.read_bytes(), type=ReleaseRequest))
    step("before the answer is sent")
    answer.write_bytes(released.sealed)
for line in sys.stdin:  # a broker of its own for each line: imports are paid once
    child = os.fork()
    if child == 0:
        serve(int(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_point_nothing_is_lost_and_nothing_is_issued_twice(
    store: Store, broker: Broker, sealed: Sealed, tmp_path: Path
) -> None:
    """A broker is killed before each statement in turn, then asked again: one release, one line, one use."""
    (tmp_path / "installation").touch(mode=0o600)
    (tmp_path / "installation").write_bytes(INSTALLATION.encode())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    store.allow("demo", MEASUREMENT.hex(), NOW, min_version=1, uses=100)
    answer = tmp_path / "answer"
    paths = [tmp_path / "broker", tmp_path / "request", tmp_path / "installation", answer]
    command = [sys.executable, "-c", KILLED, *map(str, paths)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as brokers:
        assert brokers.stdin is not None
        assert brokers.stdout is not None
        for killed in itertools.count(1):
            asked, keys = request(broker, sealed)
            (tmp_path / "request").write_bytes(msgspec.json.encode(asked))
            print(killed, file=brokers.stdin, flush=True)
            ended = int(brokers.stdout.readline())
            again = broker.release(asked)  # by a broker that was started afresh, or another on the same store
            assert keys.open(again.sealed, asked.info()) == sealed.key
            assert len(events(store, "release")) == killed
            (grant,) = store.grants("demo")
            assert grant.uses == 100 - killed
            if ended == 0:
                assert answer.read_bytes() == again.sealed
                break
            assert ended == -signal.SIGKILL
            assert not answer.exists()
    assert killed > 8  # every statement of the transaction had its turn
