"""`cloister verify` and `cloister measure` as a person and as a script use them, against real files and a real server."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.attest.binding import Binding
from cloister.attest.document import Attestation, attestation_url
from cloister.attest.receipt import MAX_RECEIPT_BYTES, Checks, Receipt, SignedStatement, Statement
from cloister.attest.session import prover
from cloister.attest.sim import Installation, SimAttester
from cloister.cli import verify_inputs
from cloister.errors import AttestationError, SettingsError
from cloister.wire.channel_messages import VERSION, Hello, Offer, Suite

MEASUREMENT = bytes([8]) * 32


SERVE = """
import contextlib, io, json, sys
from cloister.cli.main import main
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["cloister", *json.loads(line)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
"""The program's own entry, many times in one process: starting Python anew for each command would take most of the time."""


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a command and checks its exit code."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def one(*arguments: object, code: int) -> Done:
        stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        stdin.flush()
        found, out, err = json.loads(stdout.readline())
        assert found == code, out + err
        assert "Traceback" not in err
        return Done(out, err)

    try:
        yield one
    finally:
        stdin.close()
        process.wait(30)
        stdout.close()


def test_the_exit_code_is_that_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"no evidence")
    done = subprocess.run(
        [sys.executable, "-m", "cloister", "verify", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 30
    assert "malformed" in done.stdout


@pytest.fixture(scope="module")
def installation() -> Installation:
    return Installation.create(datetime.now(UTC))


def attestation(installation: Installation, nonce: bytes, key: bytes = b"public key") -> Attestation:
    binding = Binding(nonce=nonce, key=key, context=b"session")
    evidence = SimAttester(installation, MEASUREMENT).evidence(binding.report_data())
    return Attestation(evidence=evidence, binding=binding)


Answer = Callable[[bytes], bytes]


@contextmanager
def server(answer: Answer, status: int = 200, location: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serves attestations; yields its address and the list of everything that it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.requestline}\n{self.headers}")
            nonce = bytes.fromhex(parse_qs(urlsplit(self.path).query)["nonce"][0])
            body = answer(nonce)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"127.0.0.1:{http.server_port}", asked
        finally:
            http.shutdown()


@pytest.fixture(scope="module")
def trusting(installation: Installation) -> list[str]:
    return ["--root", f"sim={installation.fingerprint.hex()}", "--measurement", MEASUREMENT.hex()]


def test_a_host_is_verified_and_sent_nothing_but_a_nonce(
    run: Run, installation: Installation, trusting: list[str]
) -> None:
    with server(lambda nonce: attestation(installation, nonce).encode()) as (host, asked):
        done = run("verify", host, *trusting, code=0)
        first = asked.copy()
        record = json.loads(run("verify", f"http://{host}/", *trusting, "--json", code=0).stdout)
    assert "accepted" in done.stdout
    assert "software stand-in" in done.stderr
    assert record["result"] == "accepted"
    assert record["hardware"] is False
    assert record["claims"]["measurement"] == MEASUREMENT.hex()
    assert {"check": "nonce", "outcome": "PASS", "reason": "answers this very nonce"} in record["factors"]
    assert len(asked) == 2
    assert asked[0] != asked[1], "each question has a nonce of its own"
    names = {line.partition(":")[0].lower() for line in first[0].splitlines()[1:] if line}
    assert names == {"accept", "accept-encoding", "connection", "host", "user-agent"}


def test_a_host_that_repeats_an_old_answer_is_refused(
    run: Run, installation: Installation, trusting: list[str]
) -> None:
    old = attestation(installation, bytes(32)).encode()
    with server(lambda nonce: old) as (host, _):
        record = json.loads(run("verify", host, *trusting, "--json", code=10).stdout)
    assert record["failed"] == ["nonce"]


def test_a_host_that_changes_the_binding_of_old_evidence_is_refused(
    run: Run, installation: Installation, trusting: list[str]
) -> None:
    """Relay: genuine evidence for another exchange, with a binding that names the new nonce or another key."""
    old = attestation(installation, bytes(32))

    def relayed(nonce: bytes) -> bytes:
        return Attestation(evidence=old.evidence, binding=Binding(nonce=nonce, key=b"public key")).encode()

    def other_key(nonce: bytes) -> bytes:
        fresh = attestation(installation, nonce)
        binding = Binding(nonce=nonce, key=b"attacker's key", context=b"session")
        return Attestation(evidence=fresh.evidence, binding=binding).encode()

    for answer in (relayed, other_key):
        with server(answer) as (host, _):
            assert json.loads(run("verify", host, *trusting, "--json", code=10).stdout)["failed"] == ["report-data"]


def test_a_host_that_is_not_believed_is_refused(run: Run, installation: Installation, trusting: list[str]) -> None:
    with server(lambda nonce: attestation(Installation.create(datetime.now(UTC)), nonce).encode()) as (host, _):
        assert json.loads(run("verify", host, *trusting, "--json", code=10).stdout)["failed"] == ["root"]
        production = run("verify", host, "--measurement", MEASUREMENT.hex(), code=10)
    assert "not trusted for this kind" in " ".join(production.stdout.split())
    assert "refused (root), as of" in production.stdout


def test_hosts_that_answer_nonsense_are_malformed_and_absent_ones_an_error(
    run: Run, installation: Installation, trusting: list[str]
) -> None:
    bare = SimAttester(installation, MEASUREMENT).evidence(bytes(64)).encode()
    for body in (b"", b"<html>", bare, b"{" * 10000):
        with server(lambda nonce, body=body: body) as (host, _):
            run("verify", host, *trusting, code=30)
    with server(lambda nonce: b'{"kind":"none","nonce":"00"}') as (host, _):
        assert "shows no evidence" in " ".join(run("verify", host, *trusting, code=20).stdout.split())
    with server(lambda nonce: b"x" * (2**21 + 1)) as (host, _):
        assert "more than" in run("verify", host, *trusting, code=1).stderr
    with server(lambda nonce: b"gone", status=404) as (host, _):
        assert "404" in run("verify", host, *trusting, code=1).stderr
    assert "does not answer" in run("verify", "127.0.0.1:1", code=1).stderr


def test_a_redirection_is_not_followed(run: Run, installation: Installation, trusting: list[str]) -> None:
    with (
        server(lambda nonce: attestation(installation, nonce).encode()) as (other, asked),
        server(lambda nonce: b"", status=302, location=f"http://{other}/") as (host, _),
    ):
        assert "302" in run("verify", host, *trusting, code=1).stderr
    assert asked == []


def test_a_web_server_without_evidence_is_asked_once(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer() -> bytes:
            asker, _ = listener.accept()
            with asker:
                asked = asker.recv(4096)
                asker.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return asked

        asked = pool.submit(answer)
        assert "404" in run("verify", f"127.0.0.1:{listener.getsockname()[1]}", code=1).stderr
        assert asked.result(30).startswith(b"GET /v1/attestation?nonce=")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing comes over the sealed channel after it
            listener.accept()


def test_addresses() -> None:
    nonce = bytes(2)
    for host, url in {
        "localhost:8000": "http://localhost:8000/v1/attestation?nonce=0000",
        "[::1]:8000": "http://[::1]:8000/v1/attestation?nonce=0000",
        "enclave.example": "https://enclave.example/v1/attestation?nonce=0000",
        "enclave.example:444": "https://enclave.example:444/v1/attestation?nonce=0000",
        "http://enclave.example/api/": "http://enclave.example/api/v1/attestation?nonce=0000",
    }.items():
        assert attestation_url(host, nonce) == url
    for host in ("file:///etc/passwd", "ftp://host", "http://", "host:port", "http://user@host", "host?x=1", ""):
        with pytest.raises(AttestationError):
            attestation_url(host, nonce)


def test_a_saved_attestation_says_that_it_may_be_old(
    run: Run, installation: Installation, trusting: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "attestation.json"
    path.write_bytes(attestation(installation, bytes(32)).encode())
    assert "it may be old" in run("verify", path, *trusting, code=0).stdout
    run("verify", path, *trusting, "--nonce", bytes(32).hex(), code=0)
    record = json.loads(run("verify", path, *trusting, "--nonce", bytes(31).hex(), "--json", code=10).stdout)
    assert record["failed"] == ["nonce"]


def test_nothing_is_accepted_unless_something_is_expected(
    run: Run, installation: Installation, trusting: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "evidence.json"
    path.write_bytes(SimAttester(installation, MEASUREMENT).evidence(bytes(64)).encode())
    root = trusting[:2]
    refused = run("verify", path, *root, "--json", code=10)
    record = json.loads(refused.stdout)
    assert record["failed"] == ["measurement"]
    assert MEASUREMENT.hex() in refused.stdout
    unknown = " ".join(run("verify", path, code=10).stdout.split())
    assert "nothing says what is expected: give --policy FILE, or --measurement HEX" in unknown
    assert "it is unknown" not in unknown
    run("verify", path, *root, "--measurement", "any", code=0)
    run("verify", path, *root, "--measurement", bytes(32).hex(), code=10)
    run("verify", path, *trusting, "--report-data", bytes(64).hex(), code=0)
    run("verify", path, *trusting, "--report-data", (b"\1" * 64).hex(), code=10)
    assert "collateral" in run("verify", path, *trusting, "--at", "2020-01-01", code=10).stdout


def test_a_policy_file_decides(run: Run, installation: Installation, tmp_path: Path) -> None:
    path, policy = tmp_path / "evidence.json", tmp_path / "policy.toml"
    path.write_bytes(SimAttester(installation, MEASUREMENT, 3).evidence(bytes(64)).encode())
    text = f'[roots]\nsim = ["{installation.fingerprint.hex()}"]\n[sim]\nmeasurement = ["{MEASUREMENT.hex()}"]\n'
    policy.write_text(text + "min_version = 3\n")
    run("verify", path, "--policy", policy, code=0)
    policy.write_text(text + "min_version = 4\n")
    assert "less than 4" in run("verify", path, "--policy", policy, code=10).stdout
    policy.write_text(text)
    assert "min_version" in run("verify", path, "--policy", policy, code=1).stderr
    assert "in the file" in run("verify", path, "--policy", policy, "--measurement", "any", code=1).stderr


def test_files_that_are_no_evidence(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, code in ((b"", 30), (b"text", 30), (b'{"format":"cloister-evidence/9","kind":"sgx","report":""}', 20)):
        path.write_bytes(content)
        record = json.loads(run("verify", path, "--json", code=code).stdout)
        assert (record["exit_code"], record["claims"]) == (code, None)
    assert "no file" in run("verify", tmp_path / "none", code=1).stderr


REQUEST, RESPONSE = b"what was asked", b"what was answered"


def receipt(installation: Installation, signer: Ed25519PrivateKey, **said: Any) -> Receipt:
    """Returns what a client keeps of an answer: session, statement, signature."""
    hello = msgspec.msgpack.encode(Hello(VERSION, bytes(32), (Suite.X25519,)))
    offer = Offer(
        version=VERSION,
        suite=Suite.X25519,
        key=b"hpke key",
        receipt_key=signer.public_key().public_bytes_raw(),
        nonce=bytes(32),
        model_root=b"m" * 32,
        plan=b"p" * 32,
        measurement=MEASUREMENT,
        evidence=b"",
    )
    evidence = prover(SimAttester(installation, MEASUREMENT))(hello, offer)
    offer = msgspec.structs.replace(offer, evidence=evidence)
    fields: dict[str, Any] = {
        "request": hashlib.sha256(REQUEST).digest(),
        "response": hashlib.sha256(RESPONSE).digest(),
    }
    fields |= {"model_root": offer.model_root, "plan": offer.plan, "measurement": MEASUREMENT, "kind": "sim"}
    fields |= {"checks": Checks(products=9, enclave_products=0, refused=0, checks_per_product=1)}
    statement = Statement(**(fields | {"issued": datetime.now(UTC).isoformat()} | said))
    signed = SignedStatement(statement=statement, signature=signer.sign(statement.signed_bytes()))
    return Receipt.of(signed, hello, offer)


def test_a_receipt_is_verified_offline(
    run: Run, installation: Installation, trusting: list[str], tmp_path: Path
) -> None:
    path, asked, answered = tmp_path / "receipt.json", tmp_path / "request", tmp_path / "response"
    asked.write_bytes(REQUEST)
    answered.write_bytes(RESPONSE)
    signer = Ed25519PrivateKey.generate()
    path.write_bytes(receipt(installation, signer).encode())
    both = ["--request", asked, "--response", answered, "--json"]
    record = json.loads(run("verify", path, *trusting, *both, code=0).stdout)
    outcomes = {factor["check"]: factor["outcome"] for factor in record["factors"]}
    assert {outcomes[name] for name in ("receipt-signature", "same-session", "request", "response")} == {"PASS"}
    assert record["statement"]["checks"]["products"] == 9
    run("verify", path, *trusting, code=0)

    assert json.loads(run("verify", path, *trusting, *both[:3], asked, "--json", code=10).stdout)["failed"] == [
        "response"
    ]
    assert json.loads(run("verify", path, *trusting[2:], *both, code=10).stdout)["failed"] == ["root"]
    late = json.loads(run("verify", path, *trusting, *both, "--at", "2099-01-01", code=10).stdout)
    assert "collateral-time" in late["failed"]
    assert late["statement"] is None, "nothing that a refused receipt says is repeated"


def test_a_request_longer_than_any_receipt_is_hashed_whole_or_refused(
    run: Run, installation: Installation, trusting: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "receipt.json", tmp_path / "request"
    long = bytes(MAX_RECEIPT_BYTES) + b"its end"
    asked.write_bytes(long)
    made = receipt(installation, Ed25519PrivateKey.generate(), request=hashlib.sha256(long).digest())
    path.write_bytes(made.encode())
    run("verify", path, *trusting, "--request", asked, code=0)
    monkeypatch.setattr(verify_inputs, "MAX_EXCHANGED_BYTES", MAX_RECEIPT_BYTES)
    with pytest.raises(SettingsError, match="is longer than"):
        verify_inputs.exchanged(asked)


def test_forged_and_damaged_receipts_are_refused(
    run: Run, installation: Installation, trusting: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "receipt.json"
    signer, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    good, foreign = receipt(installation, signer), receipt(installation, other)
    cases: list[tuple[Receipt, list[str]]] = [
        (msgspec.structs.replace(good, signature=foreign.signature), ["receipt-signature"]),
        (msgspec.structs.replace(good, offer=foreign.offer), ["receipt-signature"]),
        (receipt(installation, signer, model_root=b"x" * 32), ["same-session"]),
        (receipt(installation, signer, kind="sgx"), ["same-session"]),
        (msgspec.structs.replace(good, hello=good.hello.replace(bytes(32), bytes(31) + b"x")), ["report-data"]),
    ]
    for forged, failed in cases:
        path.write_bytes(forged.encode())
        assert json.loads(run("verify", path, *trusting, "--json", code=10).stdout)["failed"] == failed
    document = good.encode()
    for damaged in (
        document[:-1],
        document.replace(b'"hello":"', b'"hello":"AAAA'),
        document.replace(b"offer", b"offxr"),
    ):
        path.write_bytes(damaged)
        run("verify", path, *trusting, code=30)
    path.write_bytes(document.replace(b"receipt/1", b"receipt/2"))
    run("verify", path, *trusting, code=20)


def test_real_quotes_from_the_command_line(run: Run, samples: Path) -> None:
    dcap, snp = samples / "dcap", samples / "snp"
    tdx = ["verify", dcap / "tdx_quote", "--kind", "tdx", "--collateral", dcap / "tdx_quote_collateral.json"]
    record = json.loads(run(*tdx, "--at", "2025-06-27", "--measurement", "any", "--json", code=0).stdout)
    assert record["claims"]["tcb_status"] == "UpToDate"
    chain = ["--certificate", snp / "coco-test-vcek.der", "--certificate", snp / "ask_ark_milan.pem"]
    run("verify", snp / "coco-test-report.bin", "--kind", "snp", *chain, "--measurement", "any", code=0)
    assert (
        "debug"
        in run("verify", snp / "attestation.bin", "--kind", "snp", *chain, "--measurement", "any", code=10).stdout
    )


def test_measure_lists_and_compares(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    record = json.loads(run("measure", tmp_path, "--json", code=0).stdout)
    assert {item["part"] for item in record["items"]} >= {"package", "dependency", "interpreter", "model", "settings"}
    assert any(item["name"] == "config.json" for item in record["items"])
    (tmp_path / "config.json").write_text("{ }")
    done = run("measure", tmp_path, "--expect", record["measurement"], code=10)
    assert "not the expected" in done.stderr
    assert record["measurement"] not in done.stdout
    assert "64 hexadecimal" in run("measure", "--expect", "abc", code=1).stderr
    assert "--model-root" in run("measure", tmp_path, "--model-root", bytes(32).hex(), code=1).stderr
