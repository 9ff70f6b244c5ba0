"""`cloister gateway` and `cloister ledger` as commands: what they refuse, and what they print."""

import http.client
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cloister.assets import demo_model
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.ledger import Entry, Ledger

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloister", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


GATEWAY = ("gateway", "--model", str(demo_model()), "--port", "0", "--detectors", "rules")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--engine", "gpu-host"), "http(s)://HOST:PORT"),
        (("--engine", "http://me:secret@127.0.0.1:9"), "--engine-key-file"),
        (("--engine", "cloister://127.0.0.1:9"), "takes --policy and no --model"),
        (("--engine", "enclave", "--policy", "policy.toml"), "takes no --policy"),
        (("--engine", "http://127.0.0.1:9", "--epsilon", "0"), "--epsilon is '0'"),
        (("--engine", "http://127.0.0.1:9", "--host", "192.0.2.1"), "--key-file"),
        (("--engine", "http://127.0.0.1:9"), "cloister candidates build"),
    ],
)
def test_the_gateway_says_what_is_missing(arguments: tuple[str, ...], says: str) -> None:
    done = run(*GATEWAY, *arguments)
    assert done.returncode == 1
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_ledger_is_shown_as_tables_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(path)
    ledger.open_session("letters", 16.0, pure(2.0), "detected; rules")
    ledger.charge("letters", [Entry("city", Charge(pure(2.0), 3))], repeated=1, pseudonyms=2)
    ledger.close()
    shown = run("ledger", "--ledger", str(path), "--session", "letters")
    assert shown.returncode == 0
    for expected in ("letters", "3 city at 2", "Adjacency:", "policy LDP", "conditional on the detected positions"):
        assert expected in " ".join(shown.stdout.split())
    (record,) = json.loads(run("ledger", "--ledger", str(path), "--json").stdout)
    assert record["spent"]["basic"] == pytest.approx(6.0)
    assert 0 < record["spent"]["epsilon"] <= record["spent"]["basic"]
    absent = run("ledger", "--ledger", str(tmp_path / "none.db"))
    assert absent.returncode == 1
    assert "no ledger" in absent.stderr


def status(address: str, host: str) -> int:
    with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        connection.request("GET", "/health", headers={"host": host})
        with connection.getresponse() as response:
            return response.status


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
def test_a_gateway_before_an_enclave_speaks_of_no_ledger_and_ends_when_told(order: signal.Signals) -> None:
    """It answers as the hosts that it was told, and as no other."""
    command = [sys.executable, "-m", "cloister", "gateway", "--engine", "enclave", "--model", "demo", "--port", "0"]
    command += ["--allow-host", "gateway.example"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline(), process.stderr.readline()]
        address = said[0].split("//")[1].removesuffix("/v1\n")
        answers = [status(address, host) for host in ("gateway.example:8399", address, "evil.example")]
        if order is signal.SIGINT:
            os.killpg(process.pid, order)  # as a terminal sends it
        else:
            process.send_signal(order)
        said.append(process.stderr.read())  # to its end: the enclave's process has closed it too
        assert process.wait(30) == 0
    assert said[0].startswith("Listening on http://127.0.0.1:")
    assert answers == [200, 200, 403]
    assert "unsanitised" in said[1]
    assert said[2] == "Ended.\n"
