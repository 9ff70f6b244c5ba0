"""What a server answers to "prove what you are": evidence, and what it is bound to.

Covers: the bounded encoding of the answer, and asking a host for it over HTTP (`attest.session.ask`: over the sealed
channel). Does not cover: any decision.

Nothing secret is sent to a host before its evidence was verified: the request holds a random nonce and nothing else.
"""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

import msgspec

from cloister.attest.binding import Binding
from cloister.attest.evidence import MAX_EVIDENCE_BYTES, Evidence
from cloister.errors import AttestationError, EvidenceError, EvidenceUnsupportedError

FORMAT: Final = "cloister-attestation/1"
PATH: Final = "/v1/attestation"
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class Attestation(msgspec.Struct, frozen=True, kw_only=True):
    """Evidence with its binding. Unverified: the binding counts only when its report data is that of good evidence."""

    evidence: Evidence
    binding: Binding

    def encode(self) -> bytes:
        """Returns JSON."""
        evidence = msgspec.Raw(self.evidence.encode())
        return msgspec.json.encode(_Document(format=FORMAT, evidence=evidence, binding=self.binding))

    @staticmethod
    def decode(document: bytes) -> "Attestation":
        """Returns what a JSON document says.

        Raises:
            EvidenceError: too long, not JSON, or a field is missing, unknown or beyond its limit.
            EvidenceUnsupportedError: another format version or kind.
        """
        if len(document) > MAX_EVIDENCE_BYTES:
            raise EvidenceError(f"An attestation of {len(document)} bytes is longer than {MAX_EVIDENCE_BYTES}.")
        try:
            found = msgspec.json.decode(document, type=_Document)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise EvidenceError("This is not an attestation.") from error
        if found.format != FORMAT:
            raise EvidenceUnsupportedError("An attestation of another format.", remedy=f"This version reads {FORMAT}.")
        return Attestation(evidence=Evidence.decode(bytes(found.evidence)), binding=found.binding)


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    evidence: msgspec.Raw
    binding: Binding


class _Header(msgspec.Struct, frozen=True):
    format: str


def format_of(document: bytes) -> str:
    """Returns the `format` of a JSON document, or an empty string when it is none of ours."""
    try:
        return msgspec.json.decode(document, type=_Header).format
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ""


def attestation_url(host: str, nonce: bytes) -> str:
    """Returns where a host answers: a URL's own scheme, else https, and http on this machine.

    Raises:
        AttestationError: this is no address of a host.
    """
    text = host if "://" in host else f"//{host}"
    try:
        parts = urllib.parse.urlsplit(text)
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise AttestationError(f"{host!r} is no address of a host.") from error
    scheme = parts.scheme or ("http" if name in _LOOPBACK else "https")
    if scheme not in ("http", "https") or not name or parts.username or parts.query or parts.fragment:
        raise AttestationError(f"{host!r} is no address of a host.", remedy="Give HOST, HOST:PORT or an http(s) URL.")
    place = f"[{name}]" if ":" in name else name
    place += f":{port}" if port else ""
    path = parts.path.rstrip("/") + PATH
    return urllib.parse.urlunsplit((scheme, place, path, f"nonce={nonce.hex()}", ""))


class NoEvidenceError(AttestationError):
    """The host speaks HTTP and answered with something else than evidence."""


def ask(host: str, nonce: bytes, timeout_seconds: float = 20.0) -> bytes:
    """Returns the unverified document that a host answers to a nonce.

    Raises:
        NoEvidenceError: an error, a redirection, or an answer that is too long.
        AttestationError: no answer of a server of HTTP.
    """
    url = attestation_url(host, nonce)
    opener = urllib.request.build_opener(_NoRedirection)
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310 - http(s), see above
    try:
        with opener.open(request, timeout=timeout_seconds) as answer:
            document: bytes = answer.read(MAX_EVIDENCE_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise NoEvidenceError(
                f"{host} answered {error.code} to {PATH}.", remedy="Is this the address of a Cloister server?"
            ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise AttestationError(
            f"{host} does not answer: {reason}.", remedy="Check the address and the server."
        ) from error
    if len(document) > MAX_EVIDENCE_BYTES:
        raise NoEvidenceError(f"{host} answered more than {MAX_EVIDENCE_BYTES} bytes.")
    return document


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Evidence of another host than the one that was asked is of no use."""

    def redirect_request(self, *_: Any) -> None:
        return None
