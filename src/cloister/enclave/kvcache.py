"""The paged KV cache: keys and values of several sequences in one pool, in enclave memory.

Covers: taking pages as a sequence grows, giving them back when it is cut or freed.
Guarantees: what is cut off is zeroed, in pages that are given back and in the one that is kept; a sequence never grows
past `max_tokens`; a call that is refused changes nothing.
Layout: `[pages, kv_heads, page_tokens, head_dim]` per layer, so that one head's tokens of a page are contiguous: the order
in which attention reads them.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32

from cloister.errors import RequestError


@dataclass
class CachedSequence:
    """One sequence of the cache: its pages, in order, and how many tokens they hold."""

    table: Int32[np.ndarray, " pages"] = field(repr=False)
    pages: int = 0
    tokens: int = 0


class PagedKVCache:
    """A pool of pages for all layers of a model: room for `max_tokens` tokens, of one sequence or shared by several."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, page_tokens: int, max_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.max_tokens = max_tokens
        count = -(-max_tokens // page_tokens)
        shape = (layers, count, kv_heads, page_tokens, head_dim)
        self.keys: Float32[np.ndarray, "layers pages kv_heads page_tokens head_dim"] = np.zeros(shape, np.float32)
        self.values: Float32[np.ndarray, "layers pages kv_heads page_tokens head_dim"] = np.zeros(shape, np.float32)
        self._free = list(range(count - 1, -1, -1))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def sequence(self) -> CachedSequence:
        """Returns a new, empty sequence."""
        return CachedSequence(np.zeros(self.keys.shape[1], np.int32))

    def grow(self, sequence: CachedSequence, tokens: int) -> None:
        """Makes room for `tokens` more tokens.

        Raises:
            RequestError: the sequence would be too long, or the pool has no page left; nothing was taken.
        """
        wanted = sequence.tokens + tokens
        if tokens < 0 or wanted > self.max_tokens:
            raise RequestError(
                f"The context holds {self.max_tokens} tokens and this session needs {wanted}.",
                remedy="Shorten the conversation or raise cache.max_context.",
            )
        needed = -(-wanted // self.page_tokens) - sequence.pages
        if needed > len(self._free):
            raise RequestError(
                f"This session needs {needed} more pages of the cache, and other sessions left {len(self._free)}.",
                remedy="Wait for one of them to end or raise cache.max_context.",
            )
        for _ in range(needed):
            sequence.table[sequence.pages] = self._free.pop()
            sequence.pages += 1
        sequence.tokens = wanted

    def truncate(self, sequence: CachedSequence, tokens: int) -> None:
        """Cuts a sequence down to its first `tokens` tokens (all if it has fewer); what is cut off is zeroed.

        Raises:
            RequestError: `tokens` is negative.
        """
        if tokens < 0:
            raise RequestError(f"A sequence cannot be cut to {tokens} tokens.", remedy="Allowed: 0 or more.")
        if tokens >= sequence.tokens:
            return
        keep = -(-tokens // self.page_tokens)
        for position in range(keep, sequence.pages):
            self._zero(int(sequence.table[position]), 0)
            self._free.append(int(sequence.table[position]))
        if used := tokens % self.page_tokens:
            self._zero(int(sequence.table[keep - 1]), used)
        sequence.pages = keep
        sequence.tokens = tokens

    def free(self, sequence: CachedSequence) -> None:
        """Gives all pages of a sequence back, zeroed; the sequence is empty then and can be used again."""
        self.truncate(sequence, 0)

    def _zero(self, page: int, first: int) -> None:
        self.keys[:, page, :, first:] = 0
        self.values[:, page, :, first:] = 0
