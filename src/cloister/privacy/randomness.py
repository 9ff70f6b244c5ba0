"""Uniform whole numbers from the operating system's randomness, fetched for one prompt at a time.

Covers: the many small draws of noise and pseudonyms, for which a system call each would cost more than the draw.
Guarantees: exactly uniform (by rejection), every bit used once. What is left over goes with the object, so make one for each
prompt and keep none: nothing is shared with a forked process or a later prompt.
"""

import os
from typing import Final

from cloister.errors import PrivacyError
from cloister.privacy.mechanism import RandomSource

CHUNK_BYTES: Final = 512


class Randomness:
    """Draws for one prompt; `source` other than `os.urandom` is for tests."""

    def __init__(self, source: RandomSource = os.urandom) -> None:
        self._source = source
        self._bytes = b""
        self._place = 0

    def below(self, limit: int) -> int:
        """Returns a uniform number of 0 to `limit` - 1."""
        if limit < 1:
            raise PrivacyError(f"There is no number below {limit} to draw.")
        bits = (limit - 1).bit_length()
        size, spare = (bits + 7) >> 3, -bits & 7
        while True:
            start = self._place
            self._place = stop = start + size
            if stop > len(self._bytes):
                self._bytes = self._source(max(CHUNK_BYTES, size))
                start, self._place = 0, size
                stop = size
            drawn = int.from_bytes(self._bytes[start:stop], "little") >> spare
            if drawn < limit:
                return drawn
