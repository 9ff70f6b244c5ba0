"""The client of Confidential Containers' key broker, against a local server written to its specification.

The server seals with another implementation of JWE.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwe
from joserfc.jwk import ECKey

from cloister.attest.evidence import Evidence, Kind
from cloister.attest.sim import Installation, SimAttester
from cloister.errors import AttesterError, BrokerError, KeyRefusedError
from cloister.seal.client import connect
from cloister.seal.kbs import KbsClient, open_jwe

SECRET = b"\x07" * 32


class Tdx:
    """Says that it is TDX; the quote carries the report data in the clear."""

    kind = Kind.TDX

    def evidence(self, report_data: bytes) -> Evidence:
        return Evidence(kind=Kind.TDX, report=b"quote:" + report_data)


class Service(BaseHTTPRequestHandler):
    """A key broker service: its three requests, its cookie, its status codes."""

    sessions: ClassVar[dict[str, dict[str, Any]]] = {}
    mode: ClassVar[str] = ""
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/kbs/v0/auth":
            session = f"session-{len(self.sessions)}"
            nonce = base64.b64encode(hashlib.sha256(session.encode()).digest()).decode()
            self.sessions[session] = {"nonce": nonce, "tee": body["tee"]}
            assert body["version"] == "0.4.0"
            return self.answer(200, {"nonce": nonce, "extra-params": {}}, session)
        session = self.headers.get("Cookie", "").removeprefix("kbs-session-id=")
        known = self.sessions.get(session)
        runtime, evidence = body["runtime-data"], json.loads(json.dumps(body["tee-evidence"]["primary_evidence"]))
        expected = hashlib.sha384(json.dumps(runtime, sort_keys=True, separators=(",", ":")).encode()).digest()
        shown = base64.b64decode(evidence.get("report_data") or evidence["quote"])
        good = known is not None and runtime["nonce"] == known["nonce"] and expected + bytes(16) in shown
        if not good or self.mode == "refuse":
            return self.answer(401, {"type": "refused", "detail": "evidence"})
        known["key"] = runtime["tee-pubkey"]
        return self.answer(200, {"token": "a.b.c"}, session)

    def do_GET(self) -> None:
        known = self.sessions.get(self.headers.get("Cookie", "").removeprefix("kbs-session-id="))
        if known is None or "key" not in known:
            return self.answer(401, {})
        if self.path != "/kbs/v0/resource/default/key/demo":
            return self.answer(404 if self.mode != "forbid" else 403, {})
        key = ECKey.import_key({k: v for k, v in known["key"].items() if k != "alg"})
        if self.mode == "another key":
            key = ECKey.generate_key("P-256")
        if self.mode == "in the protected header":
            names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
            sealed = jwe.encrypt_compact({"alg": "ECDH-ES+A256KW", "enc": "A256GCM"}, SECRET, key)
            return self.answer(200, dict(zip(names, sealed.split("."), strict=True)))
        message = jwe.FlattenedJSONEncryption({"alg": known["key"]["alg"], "enc": "A256GCM"}, SECRET)
        if self.mode == "aad":
            message.aad = b"additional"
        message.add_recipient(None, key)
        made = dict(jwe.encrypt_json(message, None))
        if self.mode == "changed":
            made["ciphertext"] = made["ciphertext"][:-2] + "AA"
        if self.mode == "long":
            made["ciphertext"] = "A" * 2**21
        return self.answer(200, made)

    def answer(self, status: int, content: dict[str, Any], session: str = "") -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        if session:
            self.send_header("Set-Cookie", f"kbs-session-id={session}; Path=/; HttpOnly")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *arguments: object) -> None:
        return


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[str]:
    Service.mode = getattr(request, "param", "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def fetch(service: str, attester: Any, resource: str = "default/key/demo", *, sample: bool = False) -> bytes:
    connection = connect(service)
    try:
        return KbsClient(connection, attester, sample=sample).fetch(resource)
    finally:
        connection.close()


SIM = SimAttester(Installation.create(datetime.now(UTC)), bytes(32))


@pytest.mark.parametrize("service", ["", "aad", "in the protected header"], indirect=True)
def test_a_key_is_fetched(service: str) -> None:
    assert fetch(service, Tdx()) == SECRET
    assert fetch(service, SIM, sample=True) == SECRET


@pytest.mark.parametrize("service", ["refuse", "forbid", "another key", "changed"], indirect=True)
def test_what_is_refused_or_does_not_open_is_an_error(service: str) -> None:
    resource = "default/key/other" if Service.mode == "forbid" else "default/key/demo"
    with pytest.raises(KeyRefusedError):
        fetch(service, Tdx(), resource)


@pytest.mark.parametrize("service", ["long"], indirect=True)
def test_an_answer_that_is_too_long_is_refused(service: str) -> None:
    with pytest.raises(BrokerError, match="status 200"):
        fetch(service, Tdx())


def test_an_unknown_resource_is_an_error(service: str) -> None:
    with pytest.raises(BrokerError, match="404"):
        fetch(service, Tdx(), "default/key/other")


@pytest.mark.parametrize("resource", ["demo", "a/b", "../../etc", "a/../b", "a/b/c?x", "a b/c/d"])
def test_a_resource_cannot_lead_elsewhere(service: str, resource: str) -> None:
    with pytest.raises(BrokerError, match="not a resource"):
        fetch(service, Tdx(), resource)


def test_the_stand_in_is_not_shown_to_such_a_service_by_accident(service: str) -> None:
    with pytest.raises(AttesterError):
        fetch(service, SIM)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[1]", b"\xff", b'{"protected":"e30","encrypted_key":"","iv":"","ciphertext":"","tag":""}',
        b'{"protected":"!","encrypted_key":"","iv":"","ciphertext":"","tag":""}',
        json.dumps({
            "protected": base64.urlsafe_b64encode(
                b'{"alg":"ECDH-ES+A256KW","enc":"A256GCM","epk":{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"}}'
            ).decode().rstrip("="), "encrypted_key": "AA", "iv": "AA", "ciphertext": "AA", "tag": "AA",
        }).encode(),
    ],
)  # fmt: skip
def test_hostile_answers_are_errors(content: bytes) -> None:
    with pytest.raises((BrokerError, KeyRefusedError)):
        open_jwe(content, ec.generate_private_key(ec.SECP256R1()))
