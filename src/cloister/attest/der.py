"""The few DER values that attestation extensions are made of (X.690): written for the stand-in's PKI, read for AMD's.

Covers: definite lengths below 2^16, integers, octet strings, object identifiers, sequences. Certificates themselves are
`cryptography`'s work.
"""

from cloister.errors import EvidenceError

INTEGER = 0x02
OCTETS = 0x04
OID = 0x06
ENUMERATED = 0x0A
SEQUENCE = 0x30


def encode(tag: int, content: bytes) -> bytes:
    """Returns tag, length and content (shorter than 65,536 bytes)."""
    size = len(content)
    if size < 0x80:
        length = bytes([size])
    elif size < 0x100:
        length = bytes([0x81, size])
    else:
        length = bytes([0x82]) + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def sequence(*members: bytes) -> bytes:
    """Returns a SEQUENCE of encoded members."""
    return encode(SEQUENCE, b"".join(members))


def integer(value: int) -> bytes:
    """Returns a non-negative INTEGER."""
    return encode(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def octets(value: bytes) -> bytes:
    """Returns an OCTET STRING."""
    return encode(OCTETS, value)


def identifier(dotted: str) -> bytes:
    """Returns an OBJECT IDENTIFIER."""
    first, second, *rest = (int(part) for part in dotted.split("."))
    content = bytes([40 * first + second])
    for number in rest:
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(0x80 | number & 0x7F)
        content += bytes(reversed(groups))
    return encode(OID, content)


def read(encoded: bytes, tag: int) -> bytes:
    """Returns the content of the one value with this tag that `encoded` consists of.

    Raises:
        EvidenceError: another tag, a length that is not that of the content, or bytes behind it.
    """
    if len(encoded) < 2 or encoded[0] != tag:
        raise EvidenceError("A certificate extension holds another type than it should.")
    size, start = encoded[1], 2
    if size >= 0x80:
        count = size & 0x7F
        if count not in (1, 2) or len(encoded) < 2 + count:
            raise EvidenceError("A certificate extension has a length that cannot be read.")
        size, start = int.from_bytes(encoded[2 : 2 + count], "big"), 2 + count
    if len(encoded) != start + size:
        raise EvidenceError("A certificate extension is longer or shorter than it says.")
    return encoded[start:]


def read_integer(encoded: bytes) -> int:
    """Returns the non-negative INTEGER that `encoded` consists of (at most 8 bytes)."""
    content = read(encoded, INTEGER)
    if not 1 <= len(content) <= 9 or content[0] & 0x80:
        raise EvidenceError("A certificate extension holds no small number where one should be.")
    return int.from_bytes(content, "big")
