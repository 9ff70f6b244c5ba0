"""The table of certificates that a SEV-SNP host hands to its guests.

Source: AMD, "Guest Hypervisor Communication Block Standardization" (56421), section 4.1.8.1, table 5.
Covers: picking the chain and the revocation list out of the table, within bounds. Does not cover: believing them.
"""

import uuid
from collections.abc import Sequence
from typing import Final

from cloister.errors import AttesterError

_VCEK: Final = uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd")
_VLEK: Final = uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
_ASK: Final = uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
_ARK: Final = uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
_CRL: Final = uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")
_ENTRY_BYTES: Final = 24
_MAX_ENTRIES: Final = 64


def chain_of(table: bytes, otherwise: Sequence[bytes]) -> tuple[tuple[bytes, ...], bytes]:
    """Returns the chain, leaf first, and the revocation list (or nothing) of a host's table.

    A table without a whole chain is as good as none: then `otherwise` is the chain.

    Raises:
        AttesterError: the table is malformed, or there is no chain from anywhere.
    """
    found = parse(table)
    leaf = found.get(_VCEK) or found.get(_VLEK)
    if leaf and _ASK in found and _ARK in found:
        return (leaf, found[_ASK], found[_ARK]), found.get(_CRL, b"")
    if len(otherwise) == 3:
        return tuple(otherwise), found.get(_CRL, b"")
    raise AttesterError(
        "The host provides no certificate chain for this machine's reports.",
        remedy="Fetch VCEK, ASK and ARK from AMD's key server and configure them as files.",
    )


def parse(table: bytes) -> dict[uuid.UUID, bytes]:
    """Returns the entries of a table by GUID.

    Raises:
        AttesterError: an entry lies outside the table, or there is no end.
    """
    found: dict[uuid.UUID, bytes] = {}
    if not table.strip(b"\0"):
        return found
    for number in range(_MAX_ENTRIES):
        entry = table[number * _ENTRY_BYTES : (number + 1) * _ENTRY_BYTES]
        if len(entry) < _ENTRY_BYTES:
            break
        if not any(entry[:16]):
            return found
        offset, size = int.from_bytes(entry[16:20], "little"), int.from_bytes(entry[20:24], "little")
        if offset + size > len(table):
            raise AttesterError("An entry of the host's certificate table lies outside of it.")
        # hosts write the identifier in either byte order
        for name in (uuid.UUID(bytes=entry[:16]), uuid.UUID(bytes_le=entry[:16])):
            found[name] = table[offset : offset + size]
    raise AttesterError("The host's certificate table has no end.")
