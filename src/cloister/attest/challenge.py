"""Nonces that a verifier hands out and takes back once: the only thing that makes evidence fresh.

Covers: single use, expiry, a bound on how many are open. Does not cover: what a nonce is bound to (`attest.binding`).

Evidence itself is not remembered. The bytes of a quote can be changed in unsigned places, so that a memory of hashes of
quotes would let the same quote through twice; a nonce inside the signed report data cannot be changed.
"""

import secrets
import threading
from collections import OrderedDict
from datetime import datetime, timedelta

from cloister.errors import EvidenceRefusedError, SettingsError

NONCE_BYTES = 32


class Challenges:
    """Open nonces of one verifier. Safe to use from threads; kept in memory, so a restart refuses every open exchange."""

    def __init__(self, lifetime: timedelta = timedelta(minutes=2), most: int = 4096) -> None:
        """Keeps at most `most` open nonces, each for `lifetime`; when full, the oldest is given up."""
        if lifetime <= timedelta(0) or most < 1:
            raise SettingsError("Challenges need a positive lifetime and room for at least one.")
        self._lifetime = lifetime
        self._most = most
        self._open: OrderedDict[bytes, datetime] = OrderedDict()
        self._lock = threading.Lock()

    def issue(self, now: datetime) -> bytes:
        """Returns a new nonce of 32 random bytes."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        with self._lock:
            self._open[nonce] = now + self._lifetime
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return nonce

    def redeem(self, nonce: bytes, now: datetime) -> None:
        """Takes back a nonce; whatever comes of it, it is gone.

        Raises:
            EvidenceRefusedError: never issued, used before, or expired.
        """
        with self._lock:
            expires = self._open.pop(nonce, None)
        if expires is None or now > expires:
            raise EvidenceRefusedError(
                "The nonce was not issued here, was used before, or has expired.",
                remedy="Ask for a new one and make new evidence.",
                checks=("report-data",),
            )
