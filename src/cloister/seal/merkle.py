"""Merkle roots as in certificate transparency: the one name of everything that a package holds.

    leaf(d) = SHA-256(0x00 ‖ d)        node(a, b) = SHA-256(0x01 ‖ a ‖ b)

The tree over n leaves splits at the largest power of two below n. Source: RFC 6962, section 2.1.

Guarantees: two lists of leaves with the same root are the same list, unless SHA-256 is broken.
"""

import hashlib
from collections.abc import Sequence


def leaf_hash(data: bytes) -> bytes:
    """Returns the hash of one leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Returns the root over leaf hashes, 32 bytes; of no leaves, SHA-256 of nothing.

    Works from the bottom up: pairing neighbours and carrying an odd one along gives the tree that RFC 6962 defines.
    """
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + level[at] + level[at + 1]).digest() for at in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]
