"""Streaming detokenisation: pieces of text that are final, never half a character.

A token can hold part of a multi-byte character, and a tokenizer may treat the first token of a text differently (a leading
space). So a piece is what a decoding that starts at an earlier token has gained, and it is held back while it ends in a
replacement character that later tokens may complete.

Guarantees: all pieces together are the decoding of all tokens, for byte-level tokenizers whatever the tokens are. One
push decodes a window of a few tokens, however long the text is.
Does not cover: bytes that are no text, from a tokenizer with byte fallback. It decodes a run of bytes wholly or, if
one is wrong, not at all; by then the good characters of the run have been sent, and stay.
"""

from collections.abc import Callable
from typing import Final

MAX_HELD_TOKENS: Final = 8
"""Tokens after which a broken character is no longer waited for: no character needs more bytes than this."""

CHARACTER_BYTES: Final = 4
"""Most bytes of a character, and so most tokens that one is spread over."""

REPLACEMENT: Final = "\ufffd"


class StreamDecoder:
    """Turns a stream of tokens into a stream of text; all pieces together equal the decoding of all tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode` returns the text of some tokens, incomplete characters as U+FFFD."""
        self._decode = decode
        self._window: list[int] = []  # context whose text is out, then tokens whose text is not
        self._context = 0  # how many tokens of the window are context
        self._sent = ""  # what of the window's decoding is out
        self._text = ""  # the window's decoding
        self._waited = 0  # how many tokens a broken character was waited for

    def push(self, token: int) -> str:
        """Returns the text that became final with `token`, possibly empty."""
        text = self._decode([*self._window, token])
        if text == self._text and not self._decode([token, token]):
            # A skipped special token. It must not become context: after it, the next word would seem the first of all.
            # Once is not enough to tell: a space at the beginning is left out, and so is its token when decoded alone.
            return ""
        self._window.append(token)
        self._text = text
        if text.endswith(REPLACEMENT):
            self._waited += 1
            return self._give_up() if self._waited >= MAX_HELD_TOKENS else ""
        piece = self._new(text)
        if piece:
            self._restart(self._window[self._context :])
        return piece

    def flush(self) -> str:
        """Returns what is still held back; call it after the last token."""
        piece = self._new(self._text)
        self._restart([])
        return piece

    def _new(self, text: str) -> str:
        """Returns what `text`, the decoding of the window, adds to what is out."""
        if text.startswith(self._sent):
            return text[len(self._sent) :]
        return self._decode(self._window[self._context :])  # the tokenizer changed its mind about text that is out

    def _restart(self, window: list[int]) -> None:
        """Goes on with `window` as context: all of its text is out."""
        self._window = window
        self._context = len(window)
        self._sent = self._text = self._decode(window) if window else ""
        self._waited = 0

    def _give_up(self) -> str:
        """Returns all but the last replacement character, which alone may still become a character.

        The window keeps the tokens that can be part of that character.
        """
        piece = self._new(self._text)
        self._restart(self._window[-CHARACTER_BYTES:])
        self._context = 0
        if not self._text.endswith(REPLACEMENT):
            return piece
        self._sent = self._text[:-1]
        return piece[:-1]
