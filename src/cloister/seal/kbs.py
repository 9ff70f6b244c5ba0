"""Fetches a key from a Key Broker Service of Confidential Containers: request, challenge, attestation, response.

1. POST /kbs/v0/auth {version, tee}: the service answers with a nonce and a session cookie.
2. An EC key pair is made; SHA-384 over the canonical JSON of nonce and public key goes into the evidence, padded with zeros.
3. POST /kbs/v0/attest {runtime-data, tee-evidence}: the service verifies and answers with a token.
4. GET /kbs/v0/resource/REPOSITORY/TYPE/TAG: the resource, as flattened JWE (ECDH-ES+A256KW, AES-256-GCM) to that key.

Covers: SGX and TDX evidence, and `sample`, which such services accept for tests. Source: the KBS attestation protocol of the
project Trustee (document of version 0.4), RFC 7516, 7517, 7518 (section 4.6), 3394.
Guarantees: the resource opens only with the key of this attestation. Limits on everything that the service sends.
Assumes: TLS tells the right service from a wrong one; a wrong one learns evidence and nothing else.
Does not cover: the verification of the token (it is the service's own), RSA keys, secondary evidence.
"""

import base64
import hashlib
import http.client
import json
import re
from typing import Annotated, Any, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from cloister.attest.evidence import Attester, Evidence, Kind
from cloister.errors import AttesterError, BrokerError, KeyRefusedError

PROTOCOL: Final = "0.4.0"
ALGORITHM: Final = "ECDH-ES+A256KW"
ENCRYPTION: Final = "A256GCM"
MAX_ANSWER_BYTES: Final = 2**20
_RESOURCE: Final = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_COOKIE: Final = re.compile(r"kbs-session-id=([^;\s,]{1,256})")

_Text = Annotated[str, msgspec.Meta(max_length=2**18)]


class _Challenge(msgspec.Struct, frozen=True):
    nonce: Annotated[str, msgspec.Meta(max_length=1024)]


class _Jwe(msgspec.Struct, frozen=True):
    protected: _Text
    encrypted_key: _Text
    iv: _Text
    ciphertext: _Text
    tag: _Text
    aad: _Text | None = None
    header: dict[str, Any] = {}


class _Ephemeral(msgspec.Struct, frozen=True):
    kty: str
    crv: str
    x: str
    y: str


class _Header(msgspec.Struct, frozen=True):
    alg: str
    enc: str
    epk: _Ephemeral
    apu: str = ""
    apv: str = ""


class KbsClient:
    """One session with a service."""

    def __init__(self, connection: http.client.HTTPConnection, attester: Attester, *, sample: bool = False) -> None:
        """Takes a connection (`client.connect`); `sample` says, loudly, that the evidence is the protocol's test kind."""
        self._connection = connection
        self._attester = attester
        self._sample = sample
        self._cookie = ""
        self._key = ec.generate_private_key(ec.SECP256R1())

    def fetch(self, resource: str) -> bytes:
        """Returns the resource `repository/type/tag`.

        Raises:
            KeyRefusedError: the service does not accept the evidence, or does not give this resource.
            BrokerError: it does not answer as such a service does.
            AttesterError: this machine has no evidence that such services know.
        """
        if not _RESOURCE.fullmatch(resource) or ".." in resource.split("/"):
            raise BrokerError(f"{resource[:100]!r} is not a resource.", remedy="Write repository/type/tag.")
        tee = "sample" if self._sample else _name(self._attester.kind)
        challenge = _decoded(
            self._ask("POST", "auth", {"version": PROTOCOL, "tee": tee, "extra-params": {}}), _Challenge
        )
        runtime = {"nonce": challenge.nonce, "tee-pubkey": _jwk(self._key.public_key())}
        evidence = self._evidence(hashlib.sha384(canonical(runtime)).digest().ljust(64, b"\0"))
        tee_evidence = {"primary_evidence": evidence, "additional_evidence": "{}"}
        self._ask("POST", "attest", {"runtime-data": runtime, "tee-evidence": tee_evidence})
        return open_jwe(self._ask("GET", f"resource/{resource}", None), self._key)

    def _evidence(self, report_data: bytes) -> dict[str, Any]:
        if self._sample:
            return {"svn": "1", "report_data": base64.b64encode(report_data).decode()}
        evidence: Evidence = self._attester.evidence(report_data)
        return {"quote": base64.b64encode(evidence.report).decode()}

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Cookie": self._cookie} if self._cookie else {})
        try:
            self._connection.request(method, f"/kbs/v0/{path}", None if body is None else json.dumps(body), headers)
            response = self._connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise BrokerError(
                f"The key broker service does not answer: {error!r:.200}.", remedy="Is it running?"
            ) from error
        if response.status in (401, 403):
            raise KeyRefusedError(
                f"The key broker service refuses ({path.split('/')[0]}, status {response.status}).",
                remedy="Its policy must know this measurement; see its log.",
            )
        if response.status != 200 or len(content) > MAX_ANSWER_BYTES:
            raise BrokerError(
                f"The key broker service answers {path} with status {response.status}.", remedy="See its log."
            )
        if found := _COOKIE.search(response.headers.get("Set-Cookie", "")):
            self._cookie = f"kbs-session-id={found[1]}"
        return content


def canonical(value: object) -> bytes:
    """Returns JSON with sorted keys and no spaces: what both sides hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def open_jwe(content: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns what a flattened JWE carries to an EC key.

    Raises:
        BrokerError: it is not such a JWE.
        KeyRefusedError: it was sealed to another key, or changed.
    """
    jwe = _decoded(content, _Jwe)
    header = _joined(_unbase64(jwe.protected), jwe.header)
    if header.alg != ALGORITHM or header.enc != ENCRYPTION or header.epk.kty != "EC" or header.epk.crv != "P-256":
        raise BrokerError(
            f"The service seals with {header.alg[:40]!r} and {header.enc[:40]!r}.", remedy=f"It must use {ALGORITHM}."
        )
    try:
        x, y = (int.from_bytes(_unbase64(part), "big") for part in (header.epk.x, header.epk.y))
        peer = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        shared = key.exchange(ec.ECDH(), peer)
        content_key = aes_key_unwrap(_agreed(shared, header), _unbase64(jwe.encrypted_key))
        associated = jwe.protected if jwe.aad is None else f"{jwe.protected}.{jwe.aad}"
        sealed = _unbase64(jwe.ciphertext) + _unbase64(jwe.tag)
        return AESGCM(content_key).decrypt(_unbase64(jwe.iv), sealed, associated.encode())
    except (InvalidTag, InvalidUnwrap, ValueError) as error:
        raise KeyRefusedError("The service's answer does not open with the attested key.") from error


def _joined(protected: bytes, unprotected: dict[str, Any]) -> _Header:
    """Returns the JOSE header: the union of both, in which no name is twice (RFC 7516, section 4)."""
    known = _decoded(protected, dict[str, Any])
    if known.keys() & unprotected.keys():
        raise BrokerError("The service's answer has a header twice.")
    try:
        return msgspec.convert({**known, **unprotected}, _Header)
    except msgspec.ValidationError as error:
        raise BrokerError("The service's answer lacks a header.") from error


def _agreed(shared: bytes, header: _Header) -> bytes:
    """Returns the key that wraps the content key: Concat KDF as RFC 7518, section 4.6.2, uses it."""
    parts = (ALGORITHM.encode(), _unbase64(header.apu), _unbase64(header.apv))
    other = b"".join(len(part).to_bytes(4, "big") + part for part in parts) + (256).to_bytes(4, "big")
    return ConcatKDFHash(hashes.SHA256(), 32, other).derive(shared)


def _jwk(public: ec.EllipticCurvePublicKey) -> dict[str, str]:
    numbers = public.public_numbers()
    x, y = (base64.urlsafe_b64encode(n.to_bytes(32, "big")).rstrip(b"=").decode() for n in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "alg": ALGORITHM, "x": x, "y": y}


def _name(kind: Kind) -> str:
    if kind not in (Kind.SGX, Kind.TDX):
        raise AttesterError(
            f"Key broker services of Confidential Containers get no {kind} evidence from here.",
            remedy="Use cloister broker; it takes every kind.",
        )
    return kind.value


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise BrokerError("The service's answer is not base64url.") from error


def _decoded(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokerError("The key broker service's answer does not decode.") from error
