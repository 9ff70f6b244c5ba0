"""The candidate file: one versioned file of classes, certified tables and the hashes of what they were made from.

Covers: writing it whole or not at all; reading it within limits, checking every byte by a digest, every table by its
exact certificate. Does not cover: who made the file. A file made to harm can hold classes that reveal more than they
should (two members, say); its digest is shown by `cloister candidates show` for comparison with a trusted one.

Layout: `CLOISTERCANDIDATES` and the version byte; the length of a JSON header (u32); the header; zlib streams in the
order of the header; SHA-256 over all before it. Numbers are little-endian.

Guarantees: `read` returns only if the digest is right, every length is as announced, every class has a table in every
set, and every table passes `privacy.certificate.certify` for the ε that its set claims. Whether a set's curve dominates
its tables is checked when it is first used (`privacy.sampler`), since it takes longer.
"""

import errno
import hashlib
import os
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from cloister.errors import CandidatesError, CertificateError, PrivacyError
from cloister.privacy.accounting import check_curve
from cloister.privacy.candidates import CandidateClass, Candidates, Provenance, TableSet
from cloister.privacy.certificate import MAX_MEMBERS, AnyWeights, certificate, certify
from cloister.privacy.mechanism import DominatingCurve, Kind, Mechanism
from cloister.whole_file import whole_file

MAGIC = b"CLOISTERCANDIDATES"
VERSION = 1
DIGEST_BYTES = 32
MAX_FILE_BYTES = 2**31
MAX_HEADER_BYTES = 2**27
MAX_CLASSES = 2**17
MAX_TABLE_BYTES = 2**32
"""Most memory that the tables of one set may take; 128 k tokens in classes of 256 take 262 MB."""
MAX_TEXT = 256
"""Characters of the longest span."""
FILE_NAME = "candidates.cloister"
"""The name under which a model's folder keeps its candidates."""

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Class(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Kind
    type: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    members: Annotated[list[Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]], msgspec.Meta(max_length=MAX_MEMBERS)]
    tokens: list[int]


class _Set(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mechanism: Mechanism
    epsilon: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,6}(/[0-9]{1,6})?$")]
    attacks: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]
    curve_first: float
    curve_gap: Annotated[float, msgspec.Meta(gt=0)]
    curve: Annotated[list[Annotated[float, msgspec.Meta(ge=0, le=1)]], msgspec.Meta(min_length=2, max_length=4096)]
    stream_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    embedding_sha256: Sha256
    tokenizer_sha256: Sha256
    vocabulary: Annotated[int, msgspec.Meta(ge=0, le=2**24)]
    members: Annotated[int, msgspec.Meta(ge=2, le=MAX_MEMBERS)]
    classes: Annotated[list[_Class], msgspec.Meta(min_length=1, max_length=MAX_CLASSES)]
    sets: Annotated[list[_Set], msgspec.Meta(max_length=64)]


def write(candidates: Candidates, path: Path) -> str:
    """Writes the file, whole or not at all, and returns its SHA-256 in hex.

    Raises:
        CandidatesError: the file cannot be written (no room, no permission); an older one is left as it was.
    """
    streams = [_pack(one.tables) for one in candidates.sets]
    origin = candidates.provenance
    header = msgspec.json.encode(
        _Header(
            origin.model[:MAX_TEXT], origin.embedding_sha256, origin.tokenizer_sha256, origin.vocabulary, origin.members,
            [_Class(one.kind, one.type[:MAX_TEXT], list(one.members), list(one.tokens)) for one in candidates.classes],
            [
                _Set(
                    one.mechanism, str(one.epsilon), list(one.attacks), one.curve.first, one.curve.gap,
                    list(one.curve.deltas), len(stream),
                )
                for one, stream in zip(candidates.sets, streams, strict=True)
            ],
        )
    )  # fmt: skip
    packed = zlib.compress(header, 6)
    parts = [
        MAGIC,
        bytes([VERSION]),
        len(header).to_bytes(4, "little"),
        len(packed).to_bytes(4, "little"),
        packed,
        *streams,
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    try:
        _replace(path, [*parts, digest.digest()])
    except OSError as error:
        raise _unwritable(path, error) from error
    return digest.hexdigest()


def check_place(path: Path) -> None:
    """Raises `CandidatesError` if no file can be written at `path`; what is there stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> CandidatesError:
    return CandidatesError(
        f"Cannot write {path}: {error.strerror}.", remedy="Free some room or choose another place with --out."
    )


def read(path: Path) -> Candidates:
    """Returns the candidates of a file, every table certified.

    Raises:
        CandidatesError: the file is absent, damaged, of another version, or holds a table that spends more than it claims.
    """
    return parse(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Returns the content of a candidate file, unread; raises `CandidatesError` if it is absent or too long."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MAX_FILE_BYTES:
            raise CandidatesError(f"{path} is no candidate file.", remedy="Build one: cloister candidates build MODEL.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CandidatesError(f"{path} does not exist.", remedy="Build it: cloister candidates build MODEL.") from error
    except OSError as error:
        raise CandidatesError(f"Cannot read {path}: {error.strerror}.", remedy="Check its permissions.") from error


def parse(data: bytes, path: Path) -> Candidates:
    """Returns the candidates in the content of the file `path`; errors as for `read`."""
    try:
        return _decode(data)
    except CandidatesError as error:
        raise CandidatesError(f"{path}: {error.message}", remedy=error.remedy) from error


def _decode(data: bytes) -> Candidates:
    start = len(MAGIC) + 9
    if len(data) < start + DIGEST_BYTES or not data.startswith(MAGIC):
        raise _damaged("it does not begin as a candidate file does")
    if data[len(MAGIC)] != VERSION:
        raise _damaged(f"its version is {data[len(MAGIC)]}, this program reads {VERSION}")
    if hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise _damaged("its digest is wrong (truncated or changed)")
    plain, packed = (int.from_bytes(data[start - at : start - at + 4], "little") for at in (8, 4))
    if plain > MAX_HEADER_BYTES or start + packed + DIGEST_BYTES > len(data):
        raise _damaged("its header is too long")
    try:
        header = msgspec.json.decode(_inflate(data[start : start + packed], plain), type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(f"its header is malformed ({error})") from None
    if start + packed + sum(one.stream_bytes for one in header.sets) + DIGEST_BYTES != len(data):
        raise _damaged("its length is not the one that its header gives")
    classes = tuple(_class(one) for one in header.classes)
    sizes = [len(one.members) for one in classes]
    sets, at = [], start + packed
    for one in header.sets:
        sets.append(_set(one, sizes, data[at : at + one.stream_bytes]))
        at += one.stream_bytes
    origin = Provenance(
        header.model, header.embedding_sha256, header.tokenizer_sha256, header.vocabulary, header.members
    )
    return Candidates(origin, classes, tuple(sets), data[-DIGEST_BYTES:].hex())


def _class(one: _Class) -> CandidateClass:
    if not one.members or len(one.tokens) != len(one.members) or any(token < -1 for token in one.tokens):
        raise _damaged("a class is malformed")
    return CandidateClass(one.kind, one.type, tuple(one.members), tuple(one.tokens))


def _set(one: _Set, sizes: list[int], stream: bytes) -> TableSet:
    if len(one.attacks) != len(sizes):
        raise _damaged("a set of tables lacks a class")
    top, _, bottom = one.epsilon.partition("/")
    if bottom and not int(bottom):
        raise _damaged("an ε is no number")
    epsilon = Fraction(int(top), int(bottom or "1"))
    tables = _unpack(stream, sizes)
    try:
        for table in tables:
            certify(table, epsilon)
        certificates = tuple(certificate(table) for table in tables)
    except CertificateError as error:
        raise CandidatesError(error.message, remedy=error.remedy) from None
    curve = DominatingCurve(one.curve_first, one.curve_gap, tuple(one.curve))
    try:
        check_curve(curve)
    except PrivacyError as error:
        raise CandidatesError(error.message, remedy=error.remedy) from None
    return TableSet(one.mechanism, epsilon, tuple(tables), certificates, tuple(one.attacks), curve)


def _pack(tables: tuple[AnyWeights, ...]) -> bytes:
    """Returns the weights as bytes of equal significance side by side, compressed: the upper ones are mostly zero."""
    flat = np.concatenate([table.ravel() for table in tables]).astype("<u8")
    return zlib.compress(np.ascontiguousarray(flat.view(np.uint8).reshape(-1, 8).T).tobytes(), 6)


def _unpack(stream: bytes, sizes: list[int]) -> list[AnyWeights]:
    cells = sum(size * size for size in sizes)
    if 8 * cells > MAX_TABLE_BYTES:
        raise _damaged("its tables are too large")
    planes = np.frombuffer(_inflate(stream, 8 * cells), dtype=np.uint8).reshape(8, cells)
    flat = np.ascontiguousarray(planes.T).reshape(-1).view("<u8").astype(np.int64)
    tables, at = [], 0
    for size in sizes:
        tables.append(flat[at : at + size * size].reshape(size, size))
        at += size * size
    return tables


def _inflate(stream: bytes, expected: int) -> bytes:
    """Returns `expected` decompressed bytes, never allocating more."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(stream, expected + 1)
    except zlib.error:
        raise _damaged("a part does not decompress") from None
    if len(plain) != expected or not inflater.eof or inflater.unused_data:
        raise _damaged("a part has another length than announced")
    return plain


def _replace(path: Path, parts: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, mode=0o644, replace=True) as file:
        file.writelines(parts)


def _damaged(what: str) -> CandidatesError:
    return CandidatesError(
        f"the candidate file cannot be used: {what}.", remedy="Build it again: cloister candidates build MODEL."
    )
