"""The enclave's side of a key release: prove what runs here, receive the key of one package, nothing else.

Covers: a broker at `host:port`, `https://host`, `unix:PATH`, or behind a socket that was connected beforehand (an enclave
process without a network gets one that way).
Guarantees: the key pair is made for this release and dies with it. The key is returned only if the package's signed manifest
commits to it, so a broker cannot make an enclave load another one.
Does not cover: whether the broker is honest about refusing; a broker that gives the key to others.
"""

import http.client
import socket
import ssl
from contextlib import closing
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from cloister.attest.evidence import Attester
from cloister.errors import BrokerError, KeyRefusedError
from cloister.isolation.secret_memory import Secret
from cloister.seal.manifest import Manifest, key_commitment
from cloister.seal.release import MAX_RESPONSE_BYTES, Challenge, Released, ReleaseRequest
from cloister.wire.channel_keys import KeyPair
from cloister.wire.channel_messages import Suite

TIMEOUT_SECONDS: Final = 30.0

Message = TypeVar("Message", Challenge, Released)


def connect(address: str) -> http.client.HTTPConnection:
    """Returns a connection to the broker at `address`.

    Raises:
        BrokerError: the address does not read, or nothing answers there.
    """
    try:
        if address.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(TIMEOUT_SECONDS)
            try:
                sock.connect(address.removeprefix("unix:"))
            except OSError:
                sock.close()
                raise
            return connected(sock)
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.username:
            raise ValueError("it is not host:port, https://host or unix:PATH")
        if parts.scheme == "https":
            secure = ssl.create_default_context()
            made: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=TIMEOUT_SECONDS, context=secure
            )
        else:
            made = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
        made.connect()
    except (OSError, ValueError) as error:
        raise BrokerError(
            f"No broker answers at {address}: {error}.", remedy="Start one: cloister broker serve."
        ) from error
    return made


def connected(sock: socket.socket) -> http.client.HTTPConnection:
    """Returns a connection over a connected socket, which it takes over."""
    made = http.client.HTTPConnection("broker", timeout=TIMEOUT_SECONDS)
    made.sock = sock
    return made


def fetch_key(
    connection: http.client.HTTPConnection,
    manifest: Manifest,
    attester: Attester,
    *,
    measurement: bytes,
    plan: bytes = b"",
    suite: Suite = Suite.X_WING,
) -> Secret:
    """Returns the content key of a package, in secret memory.

    Raises:
        KeyRefusedError: the broker refuses, or what it sends is not this package's key.
        BrokerError: it does not answer as a broker does.
        AttesterError: this machine cannot prove what it runs.
    """
    nonce = _ask(connection, "/v1/challenge", b"{}", Challenge).nonce
    with closing(KeyPair(suite)) as keys:
        request = ReleaseRequest(
            nonce=nonce,
            suite=suite,
            key=keys.public,
            root=manifest.root(),
            measurement=measurement,
            plan=plan,
            evidence=b"",
        )
        evidence = attester.evidence(request.binding().report_data()).encode()
        request = msgspec.structs.replace(request, evidence=evidence)
        released = _ask(connection, "/v1/release", msgspec.json.encode(request), Released)
        key = keys.open(released.sealed, request.info())
    if key_commitment(key, manifest.package_id) != manifest.key_commitment:
        raise KeyRefusedError("The broker sent the key of another package.", remedy="Deposit the right key there.")
    return Secret.take(key)


def _ask(connection: http.client.HTTPConnection, path: str, body: bytes, kind: type[Message]) -> Message:
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read(MAX_RESPONSE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise BrokerError(f"The broker does not answer: {error!r:.200}.", remedy="Is it running?") from error
    if response.status == 403:
        raise KeyRefusedError(
            "The broker refuses to release the key.", remedy="Its owner finds the reason with: cloister broker log."
        )
    if response.status != 200 or len(content) > MAX_RESPONSE_BYTES:
        raise BrokerError(f"The broker answers with status {response.status}.", remedy="See its log.")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokerError("What answers is not a broker.", remedy="Check the address.") from error
