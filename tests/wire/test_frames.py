"""The headers between the enclave and an accelerator: exact, bounded, and nothing else decodes."""

import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloister.arith.modulus import MAX_D_IN
from cloister.errors import WireError
from cloister.wire.codec import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    MAX_WEIGHTS,
    Frame,
    Kind,
    Status,
    decode,
    encode_pair,
    peer_text,
    received_rows,
)
from cloister.wire.messages import MAX_D_OUT, MAX_ROWS

frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    request=st.integers(0, 2**64 - 1),
    weight=st.integers(0, MAX_WEIGHTS - 1),
    rows=st.integers(0, MAX_ROWS),
    d_in=st.integers(0, MAX_D_IN),
    d_out=st.integers(0, MAX_D_OUT),
    status=st.sampled_from(Status),
)


@given(frames)
def test_every_frame_survives_the_wire(frame: Frame) -> None:
    encoded = frame.encode()
    assert len(encoded) == HEADER_BYTES
    assert decode(encoded) == frame


@given(frames, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_the_frame(frame: Frame, place: int, change: int) -> None:
    damaged = bytearray(frame.encode())
    damaged[place] ^= change
    try:
        decoded = decode(damaged)
    except WireError:
        return
    assert decoded != frame


def test_the_layout_is_fixed() -> None:
    frame = Frame(Kind.PRODUCT, request=0x0102030405060708, weight=9, rows=3, d_in=40, d_out=24, status=Status.FAILED)
    assert frame.encode() == struct.pack("<4sBBHQIIII", b"CLST", 1, 6, 5, 0x0102030405060708, 9, 3, 40, 24)


def test_the_quick_pair_is_the_slow_one() -> None:
    fields = {"request": 77, "weight": 5, "rows": 2, "d_in": 64, "d_out": 128}
    assert encode_pair(77, 5, 2, 64, 128) == (
        Frame(Kind.MULTIPLY, **fields).encode(),
        Frame(Kind.PRODUCT, **fields).encode(),
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (2, 99, "kind 99"),
        (3, 99, "status 99"),
        (5, MAX_WEIGHTS, "limits"),
        (6, MAX_ROWS + 1, "limits"),
        (7, MAX_D_IN + 1, "limits"),
        (8, MAX_D_OUT + 1, "limits"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(field: int, value: int, message: str) -> None:
    fields: list[object] = [b"CLST", 1, Kind.MULTIPLY, Status.OK, 7, 0, 1, 1, 1]
    fields[field] = value
    with pytest.raises(WireError, match=message):
        decode(struct.pack("<4sBBHQIIII", *fields))


def test_another_magic_version_or_length_is_refused() -> None:
    good = Frame(Kind.READY).encode()
    for bad in (b"HTTP" + good[4:], good[:4] + b"\x02" + good[5:]):
        with pytest.raises(WireError, match="speaks"):
            decode(bad)
    for bad in (b"", good[:-1], good + b"\0"):
        with pytest.raises(WireError, match="bytes"):
            decode(bad)


@given(st.binary(max_size=2 * MAX_ERROR_BYTES))
@example(b"\x1b[31m red \x9b\x7f\r\n")
def test_no_text_of_a_peer_can_steer_a_terminal(raw: bytes) -> None:
    text = peer_text(raw)
    assert len(text) <= MAX_ERROR_BYTES
    assert all(32 <= ord(c) < 127 for c in text)


def test_rows_are_taken_as_announced_or_refused() -> None:
    words = np.arange(12, dtype=np.int32)
    assert received_rows(words, 3, 4).rows.tolist() == words.reshape(3, 4).tolist()
    assert received_rows(words, 2, 4).rows.shape == (2, 4)
    for rows, d_in in ((4, 4), (0, 4), (3, 0), (MAX_ROWS + 1, 0)):
        with pytest.raises(WireError):
            received_rows(words, rows, d_in)
