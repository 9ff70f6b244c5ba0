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

    def push(self, token: int) -> str:
        """Returns the text that became final with `token`, possibly empty."""
        self._window.append(token)
        text = self._decode(self._window)
        waited = len(self._window) - self._context
        if text.endswith(REPLACEMENT):
            return self._give_up(text) if waited >= MAX_HELD_TOKENS else ""
        piece = self._new(text)
        if piece:
            # Only tokens with a text can be context: after a skipped special one, the next word would seem the first.
            self._restart(self._window[self._context :])
        elif waited >= MAX_HELD_TOKENS:
            del self._window[self._context]
        return piece

    def flush(self) -> str:
        """Returns what is still held back; call it after the last token."""
        piece = self._new(self._decode(self._window)) if self._window else ""
        self._restart([])
        return piece

    def _new(self, text: str) -> str:
        """Returns what `text`, a decoding of the window, adds to what is out."""
        if text.startswith(self._sent):
            return text[len(self._sent) :]
        return self._decode(self._window[self._context :])  # the tokenizer changed its mind about text that is out

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._context = len(window)
        self._sent = self._decode(window) if window else ""

    def _give_up(self, text: str) -> str:
        """Returns all but the last replacement character, which alone may still become a character.

        The window keeps the tokens that can be part of that character: the last few that have a text of their own.
        """
        piece = self._new(text)
        kept = [token for token in self._window if self._decode([token])][-CHARACTER_BYTES:]
        self._restart(kept)
        self._context = 0
        if not self._sent.endswith(REPLACEMENT):
            return piece
        self._sent = self._sent[:-1]
        return piece[:-1]
