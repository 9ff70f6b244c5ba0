"""What `cloister verify` is given: evidence files, attestations, receipts, bare reports, hosts; read, and not yet judged."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloister.errors import ChannelError, EvidenceError, EvidenceUnsupportedError, SettingsError

if TYPE_CHECKING:
    from cloister.attest.binding import Binding
    from cloister.attest.evidence import Evidence
    from cloister.attest.receipt import Receipt


CLOISTER: Final = "cloister://"
"""Begins the address of a server of the sealed channel."""
HOST_SECONDS: Final = 20.0
MAX_EXCHANGED_BYTES: Final = 2**28
"""The longest request or response that is compared with a receipt."""


@dataclass(frozen=True)
class Question:
    """What is asked of one target."""

    evidence: "Evidence"
    binding: "Binding | None" = None
    nonce: bytes | None = None
    """The nonce that the binding must hold, if known."""
    receipt: "Receipt | None" = None
    """The receipt that the evidence came with."""


@dataclass(frozen=True)
class Bare:
    """What makes evidence of a report that comes without any wrapping."""

    kind: str
    collateral: Path | None
    certificates: tuple[Path, ...]


def question(target: str, nonce: bytes | None, bare: Bare | None) -> Question:
    """Returns what is asked of a file or a host; a host is sent a fresh nonce unless one is given.

    Raises:
        EvidenceError, EvidenceUnsupportedError: what is there cannot be read.
        SettingsError, AttestationError, ChannelError: nothing is there.
    """
    path = Path(target)
    if bare is not None:
        return Question(_bare(path, bare))
    if path.exists():
        return _read(content(path), nonce)
    if "/" in target and "://" not in target:
        raise SettingsError(f"There is no file {target}.", remedy="Give a file, HOST[:PORT] or a URL.")
    return _host(target, nonce or secrets.token_bytes(32))


def _host(target: str, nonce: bytes) -> Question:
    """Returns what a host shows for a nonce: over HTTP if its address says so, over the sealed channel if it says cloister,
    and else over the one that it speaks. Either way the nonce is all that it is sent.
    """
    from cloister.attest.document import NoEvidenceError, ask
    from cloister.errors import AttestationError

    if target.startswith(CLOISTER):
        return _sealed(target.removeprefix(CLOISTER).rstrip("/"), nonce)
    try:
        document = ask(target, nonce)
    except AttestationError as error:
        if isinstance(error, NoEvidenceError) or "://" in target:
            raise
        try:
            return _sealed(target, nonce)
        except (ChannelError, SettingsError):
            pass
        raise
    if _shows_nothing(document):
        raise EvidenceUnsupportedError(
            "The host answers and shows no evidence: it is not attested.",
            remedy="Send it nothing that it must not know.",
        )
    asked = _read(document, nonce)
    if asked.binding is None or asked.receipt is not None:
        raise EvidenceError("The host answered with something that no nonce of ours is bound to.")
    return asked


def _sealed(address: str, nonce: bytes) -> Question:
    from cloister.attest.session import ask
    from cloister.local.remote import tcp
    from cloister.wire.channel_messages import NONCE_BYTES

    if len(nonce) != NONCE_BYTES:
        raise SettingsError(f"--nonce has {len(nonce)} bytes.", remedy=f"The sealed channel takes {NONCE_BYTES}.")
    with tcp(address)() as sock:
        found = ask(sock, nonce, HOST_SECONDS)
    return Question(found.evidence, found.binding, nonce)


def _shows_nothing(document: bytes) -> bool:
    """Returns whether a host's answer is a JSON object of another kind, such as that of a gateway before an open engine."""
    import msgspec

    try:
        found = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return "format" not in found


def content(path: Path) -> bytes:
    """Returns the bytes of a file, up to what any document may have."""
    from cloister.attest.receipt import MAX_RECEIPT_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MAX_RECEIPT_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}.", remedy="Give a file that you may read."
        ) from error


def exchanged(path: Path) -> bytes:
    """Returns a request or a response, whole: its hash is compared.

    Raises:
        SettingsError: it cannot be read, or is longer than `MAX_EXCHANGED_BYTES`.
    """
    try:
        with path.open("rb") as file:
            found = file.read(MAX_EXCHANGED_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}.", remedy="Give a file that you may read."
        ) from error
    if len(found) > MAX_EXCHANGED_BYTES:
        raise SettingsError(
            f"{path} is longer than {MAX_EXCHANGED_BYTES} bytes, so it is not compared with the receipt.",
            remedy="Leave it out to judge the receipt alone.",
        )
    return found


def _read(document: bytes, nonce: bytes | None) -> Question:
    from cloister.attest import document as documents
    from cloister.attest.evidence import Evidence

    name = documents.format_of(document)
    if name.startswith("cloister-receipt/"):
        return _receipt(document, nonce)
    if name.startswith("cloister-attestation/"):
        found = documents.Attestation.decode(document)
        return Question(found.evidence, found.binding, nonce)
    return Question(Evidence.decode(document))


def _receipt(document: bytes, nonce: bytes | None) -> Question:
    from cloister.attest.evidence import Evidence
    from cloister.attest.receipt import Receipt
    from cloister.attest.session import session_binding
    from cloister.wire.channel_messages import MAX_OFFER_BYTES, OVERHEAD_BYTES, Offer, decode

    receipt = Receipt.decode(document)
    try:
        offer = decode(receipt.offer, Offer, MAX_OFFER_BYTES + OVERHEAD_BYTES)
        binding = session_binding(receipt.hello, offer)
    except ChannelError as error:
        raise EvidenceError(f"The receipt's session does not decode: {error.message}") from error
    return Question(Evidence.decode(offer.evidence), binding, nonce, receipt)


def _bare(path: Path, bare: Bare) -> "Evidence":
    from cryptography.hazmat.primitives.serialization import Encoding

    from cloister.attest.certificates import load_pem_chain
    from cloister.attest.evidence import Evidence, Kind
    from cloister.attest.quote import without_padding
    from cloister.settings import choice

    chosen, report = choice(Kind, bare.kind, "--kind"), content(path)
    chain: list[bytes] = []
    for file in bare.certificates:
        encoded = content(file)
        if encoded.startswith(b"-----"):
            chain += [certificate.public_bytes(Encoding.DER) for certificate in load_pem_chain(encoded)]
        else:
            chain.append(encoded)
    return Evidence(
        kind=chosen,
        report=without_padding(report) if chosen in (Kind.SGX, Kind.TDX) else report,
        collateral=content(bare.collateral) if bare.collateral else b"",
        certificates=tuple(chain),
    )
