"""The helper that owns configfs-tsm: it answers its user with evidence over exactly what was asked, and nobody else."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.attest.evidence import Skip
from cloister.attest.helper import HelperAttester, serve
from cloister.attest.policy import Policy, SimPolicy
from cloister.attest.roots import Roots
from cloister.attest.sim import Installation, SimAttester
from cloister.attest.verify import verify
from cloister.errors import AttesterError

INSTALLATION = Installation.create(datetime.now(UTC))


@pytest.fixture
def helper(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[HelperAttester]:
    user = getattr(request, "param", os.getuid())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        arguments = (listener, user, SimAttester(INSTALLATION, bytes(32)))
        thread = threading.Thread(target=serve, args=arguments)
        thread.start()
        yield HelperAttester(tmp_path / "s")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_evidence_is_made_over_what_was_asked(helper: HelperAttester) -> None:
    accepted = SimPolicy(measurement=frozenset({bytes(32)}), min_version=Skip("a test"))
    policy = Policy(accept=(accepted,), report_data=b"r" * 64)
    evidence = helper.evidence(b"r" * 64)
    verify(evidence, policy, datetime.now(UTC), Roots(sim=frozenset({INSTALLATION.fingerprint}))).require()
    assert helper.kind == "sim"


@pytest.mark.parametrize("helper", [os.getuid() + 1], indirect=True)
def test_another_user_gets_nothing(helper: HelperAttester) -> None:
    with pytest.raises(AttesterError):
        helper.evidence(bytes(64))


def test_any_other_length_gets_nothing(helper: HelperAttester) -> None:
    for size in (0, 63, 65, 10_000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(helper._path))
            sock.sendall(bytes(size))
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""


def test_without_a_helper_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(AttesterError, match="Is its unit started"):
        HelperAttester(tmp_path / "none").evidence(bytes(64))
