"""Streaming text equals decoding at once, and stop texts cut it at one place, however the stream is divided."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cloister.assets import demo_model
from cloister.enclave.detokenise import MAX_HELD_TOKENS, REPLACEMENT, StreamDecoder
from cloister.enclave.stopping import StopDetector

SAMPLE = "naïve café 東京 \N{FOX FACE}\N{KITE} the fox and the kite"


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of about 300 tokens: each byte is one, and so are a few words and parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    return tokenizer


BYTE_LEVEL = byte_level_tokenizer()
DEMO = Tokenizer.from_file(str(demo_model() / "tokenizer.json"))
# The vocabulary writes each byte as one printable character.
FOX = BYTE_LEVEL.encode("\N{FOX FACE}").ids
STRAY = BYTE_LEVEL.token_to_id("Ģ")  # the byte 0x80, a continuation that nothing begins
LEAD = BYTE_LEVEL.token_to_id("ð")  # the byte 0xf0, which begins a character of four bytes
SPECIAL = BYTE_LEVEL.token_to_id("<s>")

byte_level_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60)


def streamed(decode: Callable[[list[int]], str], ids: list[int]) -> str:
    decoder = StreamDecoder(decode)
    return "".join([decoder.push(token) for token in ids]) + decoder.flush()


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_pieces_of_any_text_add_up_and_never_break_a_character(text: str) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    decoder = StreamDecoder(BYTE_LEVEL.decode)
    pieces = [decoder.push(token) for token in ids]
    assert not any(REPLACEMENT in piece for piece in pieces if REPLACEMENT not in text)
    assert "".join(pieces) + decoder.flush() == BYTE_LEVEL.decode(ids)


@settings(max_examples=500)
@given(byte_level_ids)
@example([STRAY] * 7 + FOX)
@example([STRAY] * 20 + FOX + [STRAY] * 3 + FOX)
@example([LEAD] * 30)
@example([LEAD] + [SPECIAL] * 20 + FOX)
@example(FOX[:1] + [SPECIAL] * 12 + FOX[1:])
def test_any_tokens_of_a_byte_level_tokenizer_add_up(ids: list[int]) -> None:
    assert streamed(BYTE_LEVEL.decode, ids) == BYTE_LEVEL.decode(ids)


@settings(max_examples=200)
@given(st.lists(st.integers(0, DEMO.get_vocab_size() - 1), max_size=60))
def test_any_tokens_of_the_demo_model_add_up(ids: list[int]) -> None:
    assert streamed(DEMO.decode, ids) == DEMO.decode(ids)


@settings(max_examples=100)
@given(st.data())
def test_any_tokens_of_a_real_small_model_add_up(tinystories_656k: Path, data: st.DataObject) -> None:
    tokenizer = Tokenizer.from_file(str(tinystories_656k / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=60))
    assert streamed(tokenizer.decode, ids) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def mistral(shared_assets: Path) -> Tokenizer:
    """A sentencepiece-style tokenizer: spaces belong to the next word, unknown characters fall back to bytes."""
    return Tokenizer.from_file(str(shared_assets / "tokenizers" / "mistral-v0.1-chatml" / "tokenizer.json"))


@settings(max_examples=200)
@given(st.data())
def test_tokens_of_a_byte_fallback_tokenizer_add_up_where_their_bytes_are_text(
    mistral: Tokenizer, data: st.DataObject
) -> None:
    anywhere = st.integers(0, mistral.get_vocab_size() - 1)
    special = st.sampled_from([0, 1, 2, 32000])
    texts = st.text(max_size=4).map(lambda text: mistral.encode(text, add_special_tokens=False).ids)
    parts = data.draw(st.lists(st.one_of(anywhere.map(lambda t: [t]), special.map(lambda t: [t]), texts), max_size=30))
    ids = [token for part in parts for token in part]
    whole = mistral.decode(ids)
    result = streamed(mistral.decode, ids)
    if REPLACEMENT not in whole:
        assert result == whole


def test_skipped_special_tokens_change_nothing_around_them(mistral: Tokenizer) -> None:
    space, *character = mistral.encode("\U00010000", add_special_tokens=False).ids
    for count in (1, 4, 20):
        skipped = [0] * count
        for ids in (
            [*skipped, space, *character],
            [space, *skipped, space, *skipped, space, *character],
            [space, *character[:2], *skipped, *character[2:], *skipped, space],
        ):
            assert streamed(mistral.decode, ids) == mistral.decode(ids)


def test_a_space_after_a_skipped_special_token_is_kept(mistral: Tokenizer) -> None:
    first, second = mistral.encode("Hello there", add_special_tokens=False).ids
    for count in (1, 3, MAX_HELD_TOKENS, 3 * MAX_HELD_TOKENS):
        assert streamed(mistral.decode, [first, *[2] * count, second]) == "Hello there"


@pytest.mark.parametrize(
    "text", ["Hello world, how are you?", "  two spaces\n\nand 東京 \N{FOX FACE} naïve", "one\ttwo"]
)
def test_streaming_equals_decoding_for_a_sentencepiece_style_tokenizer(mistral: Tokenizer, text: str) -> None:
    ids = mistral.encode(text, add_special_tokens=False).ids
    assert streamed(mistral.decode, ids) == mistral.decode(ids)


def test_broken_bytes_are_sent_before_the_end_and_cost_no_more_the_longer_they_last() -> None:
    longest = calls = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest, calls
        longest, calls = max(longest, len(ids)), calls + 1
        return BYTE_LEVEL.decode(ids)

    for pattern in ([STRAY], [LEAD], [SPECIAL], [SPECIAL, LEAD], BYTE_LEVEL.encode(SAMPLE).ids):
        decoder = StreamDecoder(decode)
        count = calls = 0
        pieces = ""
        for token in pattern * (400 // len(pattern)):
            pieces += decoder.push(token)
            count += 1
        assert longest <= 3 * MAX_HELD_TOKENS
        assert calls <= 6 * count
        if pattern != [SPECIAL]:
            assert len(pieces) > 100


def test_a_decoder_can_be_used_again_after_its_flush() -> None:
    decoder = StreamDecoder(BYTE_LEVEL.decode)
    assert decoder.push(FOX[0]) == ""
    assert decoder.flush() == REPLACEMENT
    assert decoder.flush() == ""
    assert "".join(decoder.push(token) for token in FOX) == "\N{FOX FACE}"


pieces_of_text = st.lists(st.text("ab<|", max_size=4), max_size=12)
stop_texts = st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The naive twin: reads the text character by character until it ends in a stop text, the longest if several."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@settings(max_examples=500)
@given(pieces_of_text, stop_texts)
@example(["abcd"], ["abcd", "bc"])
@example(list("abcd"), ["abcd", "bc"])
@example(["aa", "ab"], ["aab"])
def test_output_is_the_text_cut_at_the_first_stop_however_it_is_divided(pieces: list[str], stops: list[str]) -> None:
    detector = StopDetector(tuple(stops))
    out, stopped = "", False
    for piece in pieces:
        emitted, stopped = detector.push(piece)
        out += emitted
        assert not any(stop in out for stop in stops)
    out += detector.flush()
    assert (out, stopped) == cut("".join(pieces), stops)


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    detector = StopDetector(("<|end|>", "\n\n"))
    assert detector.push("a < b") == ("a < b", False)
    assert detector.push(" <|en") == (" ", False)
    assert detector.push("ter") == ("<|enter", False)
    assert detector.push("\n") == ("", False)
    assert detector.flush() == "\n"


def test_nothing_is_sent_after_a_stop() -> None:
    detector = StopDetector(("stop",))
    assert detector.push("go stop and more") == ("go ", True)
    assert detector.push("still more") == ("", True)
    assert detector.flush() == ""


def test_without_stop_texts_everything_passes() -> None:
    detector = StopDetector(())
    assert detector.push("anything") == ("anything", False)
    assert detector.flush() == ""
