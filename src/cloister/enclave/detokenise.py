"""Streaming detokenisation: pieces of text that are final, never half a character.

A token can hold part of a multi-byte character, and a tokenizer may treat the first token of a text differently (a leading
space). So a piece is the difference between two decodings that start at the same earlier token, and it is held back while
it ends in a replacement character that later tokens may complete.
"""

from collections.abc import Callable
from typing import Final

MAX_HELD_TOKENS: Final = 8
"""Tokens after which a broken character is emitted as it is: no character needs more bytes than this."""

REPLACEMENT: Final = "�"


class StreamDecoder:
    """Turns a stream of tokens into a stream of text; all pieces together equal the decoding of all tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # context whose text is out, then tokens whose text is not
        self._emitted = 0  # how many tokens of the window have their text out
        self._emitted_text = ""

    def push(self, token: int) -> str:
        """Returns the text that became final with `token`, possibly empty."""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._emitted
        if text.endswith(REPLACEMENT) and held < MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Returns what is still held back; call it after the last token."""
        return self._emit(self._decode(self._window)) if self._window else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self._emitted_text) :] if text.startswith(self._emitted_text) else text
        # The tokens just emitted become the context of the next piece; what was before them is dropped.
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        self._emitted_text = self._decode(self._window) if self._window else ""
        return piece
