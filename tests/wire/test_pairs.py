"""Requests to multiply two blinded matrices: exact, bounded, and their numbers fit each other or are refused."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.arith.modulus import MAX_D_IN
from cloister.errors import AcceleratorProtocolError, WireError
from cloister.wire.codec import (
    HEADER_BYTES,
    PAIR_BYTES,
    Frame,
    Kind,
    decode,
    decode_pair,
    encode_pair_request,
    received_pair,
    received_rows,
)
from cloister.wire.messages import MAX_ROWS
from cloister.wire.pairs import MAX_HEADS, MAX_OPERANDS, PairRequest, PairShape, check_pair_answer

GOOD = PairShape(heads=2, width=8, keep=5, append=1, start=2, transposed=True, rows=3)


@st.composite
def shapes(draw: st.DrawFn) -> PairShape:
    heads = draw(st.integers(1, 8))
    keep, append, rows = draw(st.integers(0, 200)), draw(st.integers(0, 30)), draw(st.integers(0, 30))
    append = append if append or (keep and rows) else 1
    start = draw(st.integers(0, keep + append - 1))
    return PairShape(heads, draw(st.integers(1, 64)), keep, append, start, draw(st.booleans()), rows)


@given(shapes(), st.integers(0, 2**64 - 1), st.integers(0, MAX_OPERANDS - 1))
def test_every_request_survives_the_wire(shape: PairShape, request: int, operand: int) -> None:
    shape.check()
    headers, answer = encode_pair_request(request, operand, shape)
    assert len(headers) == HEADER_BYTES + PAIR_BYTES
    frame = decode(headers[:HEADER_BYTES])
    assert (frame.kind, frame.request, frame.weight) == (Kind.PAIR, request, operand)
    assert decode_pair(frame, headers[HEADER_BYTES:]) == shape
    answered = decode(answer)
    assert (answered.kind, answered.request, answered.rows) == (Kind.PAIR_PRODUCT, request, shape.rows)
    words = np.arange(shape.appended_words + shape.left_words, dtype=np.int32)
    received = received_pair(words, operand, shape)
    parts = [part.rows.reshape(-1) for part in (received.appended, received.left) if part is not None]
    np.testing.assert_array_equal(np.concatenate(parts), words)


def test_the_layout_is_fixed() -> None:
    headers, answer = encode_pair_request(7, 9, GOOD)
    assert headers == struct.pack("<4sBBHQIIII", b"CLST", 1, 8, 0, 7, 9, 3, 8, 4) + struct.pack("<6I", 2, 8, 5, 1, 2, 1)
    assert answer == struct.pack("<4sBBHQIIII", b"CLST", 1, 9, 0, 7, 9, 3, 8, 4)


@given(st.binary(min_size=0, max_size=PAIR_BYTES + 1), st.integers(0, 5), st.integers(0, 300), st.integers(0, 300))
def test_any_second_header_decodes_to_what_fits_or_to_a_wire_error(
    data: bytes, rows: int, d_in: int, d_out: int
) -> None:
    frame = Frame(Kind.PAIR, rows=rows, d_in=d_in, d_out=d_out)
    try:
        shape = decode_pair(frame, data)
    except WireError:
        return
    assert (shape.rows, shape.d_in, shape.d_out) == (rows, d_in, d_out)


BAD: dict[str, PairShape] = {
    "no heads": GOOD._replace(heads=0),
    "too many heads": GOOD._replace(heads=MAX_HEADS + 1),
    "no width": GOOD._replace(width=0),
    "too wide": GOOD._replace(width=MAX_D_IN + 1),
    "too long": GOOD._replace(keep=MAX_D_IN),
    "too many rows": GOOD._replace(rows=MAX_ROWS // 2 + 1),
    "too many appended": GOOD._replace(append=MAX_ROWS // 2 + 1),
    "nothing to do": GOOD._replace(append=0, rows=0),
    "nothing to multiply by": GOOD._replace(start=6),
    "start past the end": GOOD._replace(start=7, rows=0),
    "negative": GOOD._replace(keep=-1),
    "answer too large": GOOD._replace(keep=60_000, rows=2000, start=0),
    "left too large": GOOD._replace(keep=60_000, rows=2000, start=0, transposed=False),
    "appended too large": GOOD._replace(width=60_000, append=2000),
}


@pytest.mark.parametrize("name", BAD)
def test_numbers_beyond_a_limit_are_refused_on_both_sides(name: str) -> None:
    with pytest.raises(WireError):
        BAD[name].check()
    with pytest.raises(WireError):
        PairRequest(0, BAD[name], None, None)


def test_an_announced_row_length_that_does_not_fit_is_refused() -> None:
    headers, _ = encode_pair_request(1, 0, GOOD)
    second = headers[HEADER_BYTES:]
    for frame in (Frame(Kind.PAIR, rows=3, d_in=7, d_out=4), Frame(Kind.PAIR, rows=3, d_in=8, d_out=5)):
        with pytest.raises(WireError, match="announced"):
            decode_pair(frame, second)
    with pytest.raises(WireError, match="transposed"):
        decode_pair(Frame(Kind.PAIR, rows=3, d_in=8, d_out=4), second[:-4] + b"\2\0\0\0")


def test_rows_must_be_what_the_numbers_say() -> None:
    words = np.zeros(200, np.int32)
    appended, left = received_rows(words, 2, 8), received_rows(words, 6, 8)
    PairRequest(0, GOOD, appended, left)
    for wrong in [(0, None, left), (0, appended, None), (0, left, appended), (MAX_OPERANDS, appended, left)]:
        with pytest.raises(WireError):
            PairRequest(wrong[0], GOOD, wrong[1], wrong[2])
    with pytest.raises(WireError, match="announced"):
        received_pair(words[:20], 0, GOOD)


def test_an_answer_of_another_form_is_refused() -> None:
    check_pair_answer(np.zeros((2, 3, 4), np.int32), GOOD)
    for answer in (
        np.zeros((2, 3, 5), np.int32),
        np.zeros((6, 4), np.int32),
        np.zeros((2, 3, 4), np.int64),
        np.zeros((2, 4, 3), np.int32).transpose(0, 2, 1),
    ):
        with pytest.raises(AcceleratorProtocolError, match="asked"):
            check_pair_answer(answer, GOOD)
