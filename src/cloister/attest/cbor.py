"""The part of CBOR that attestation documents are made of (RFC 8949), decoded strictly.

Covers: integers, byte and text strings, arrays, maps and null, in bounded number and depth. Arrays and maps may end by a
break, as those of the Nitro module do.
Does not cover: tags, floats, strings in pieces. A general library turns tags into objects (regular expressions, huge
numbers) before any signature was checked; here a tag is an error.
"""

from collections.abc import Iterator
from typing import Any, Final

from cloister.errors import EvidenceError

Value = int | bytes | str | list[Any] | dict[Any, Any] | None
"""What a document consists of; lists and maps hold values again."""

_MAX_DEPTH: Final = 8
_MAX_ITEMS: Final = 1024
_BREAK: Final = b"\xff"
_NULL: Final = 22


def decode(data: bytes) -> Value:
    """Returns the one value that `data` consists of.

    Raises:
        EvidenceError: truncated, trailing bytes, another type, a repeated key, or beyond the limits.
    """
    decoder = _Decoder(data)
    value = decoder.value(0)
    if decoder.at != len(data):
        raise EvidenceError(f"{len(data) - decoder.at} bytes follow a CBOR document.")
    return value


def encode_bytes(value: bytes) -> bytes:
    """Returns a byte string."""
    return _head(2, len(value)) + value


def encode_text(value: str) -> bytes:
    """Returns a text string."""
    raw = value.encode()
    return _head(3, len(raw)) + raw


def encode_array(*members: bytes) -> bytes:
    """Returns an array of encoded members."""
    return _head(4, len(members)) + b"".join(members)


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    size = next(size for size in (1, 2, 4, 8) if number < 1 << 8 * size)
    return bytes([major << 5 | 24 + size.bit_length() - 1]) + number.to_bytes(size, "big")


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._items = 0
        self.at = 0

    def value(self, depth: int) -> Value:
        self._items += 1
        if depth > _MAX_DEPTH or self._items > _MAX_ITEMS:
            raise EvidenceError("A CBOR document is nested too deeply or has too many members.")
        first = self._take(1)[0]
        major, number = first >> 5, self._number(first >> 5, first & 0x1F)
        match major:
            case 0:
                return number
            case 1:
                return -1 - number
            case 2:
                return self._take(number)
            case 3:
                return self._text(number)
            case 4:
                return [self.value(depth + 1) for _ in self._members(number)]
            case 5:
                return self._map(number, depth)
            case 7 if number == _NULL:
                return None
            case _:
                raise EvidenceError("A CBOR document holds a tag, or a value of a type that it should not.")

    def _number(self, major: int, short: int) -> int:
        if 24 <= short <= 27 and major != 7:
            return int.from_bytes(self._take(1 << short - 24), "big")
        if short == 31 and major in (4, 5):
            return -1  # until a break
        if short > 27:
            raise EvidenceError("A CBOR document has a string in pieces, or a length of a reserved form.")
        return short

    def _map(self, count: int, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for _ in self._members(count):
            key = self.value(depth + 1)
            if not isinstance(key, int | str) or key in found:
                raise EvidenceError("A CBOR map has a key twice, or one of a strange type.")
            found[key] = self.value(depth + 1)
        return found

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise EvidenceError("A CBOR document holds text that is not UTF-8.") from error

    def _members(self, count: int) -> Iterator[None]:
        """Yields once per member: `count` times, or until a break if it is negative."""
        if count > _MAX_ITEMS:
            raise EvidenceError("A CBOR document has too many members.")
        while count and not (count < 0 and self._data[self.at : self.at + 1] == _BREAK):
            yield
            count -= 1
        if count < 0:
            self._take(1)

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            raise EvidenceError("A CBOR document ends early.")
        self.at += size
        return self._data[self.at - size : self.at]
