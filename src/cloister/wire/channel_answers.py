"""Answers of the channel: AES-256-GCM frames, nonce = base XOR counter, with the counter and a final flag as data.

Covers: changing, cutting, reordering, dropping and repeating frames, and frames of another answer or connection.
Guarantees: an answer is whole only after its final frame; after any failure nothing more of it is opened.
Assumes: both ends have the secret of one request (`wire.channel`), of which the keys are made with 32 bytes of the enclave's.
Does not cover: lengths beyond padding, number and times of frames.
"""

import secrets
from typing import Never

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import ChannelError
from cloister.isolation.secret_memory import Secret, overwrite_leftovers, wipe_bytes
from cloister.wire.channel_messages import FRAME_PAD, MAX_FRAME_BYTES, NONCE_BYTES, OVERHEAD_BYTES, pad, unpad


class AnswerSealer:
    """Seals one answer, frame by frame. Not for two threads at once. Its key rests in secret memory between frames."""

    def __init__(self, secret: bytes, info: bytes) -> None:
        """Takes over `secret`: it is overwritten."""
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        key, self._base = _answer_keys(secret, info, self._nonce)
        self._key = Secret.take(key)
        wipe_bytes(secret)
        self._count = 0
        self._done = False

    def seal(self, content: bytes, *, final: bool = False) -> bytes:
        """Returns the next frame; after the final one there is none.

        Raises:
            ChannelError: the answer has ended, or the piece is too long.
        """
        if self._done or len(content) > MAX_FRAME_BYTES:
            raise ChannelError("The answer has ended, or a piece of it is too long.")
        with self._key.bytes() as key:
            sealed = AESGCM(key).encrypt(
                _frame_nonce(self._base, self._count), pad(content, FRAME_PAD), _frame_data(self._count, final)
            )
        overwrite_leftovers()
        head = bytes([final]) + (self._nonce if self._count == 0 else b"")
        self._count += 1
        self._done = final
        if final:
            self._key.close()
        return head + sealed


class AnswerReader:
    """Opens one answer, frame by frame, in order. `finished` is true only after the final frame."""

    def __init__(self, secret: bytes, info: bytes) -> None:
        self._secret = secret
        self._info = info
        self._cipher: AESGCM | None = None
        self._base = b""
        self._count = 0
        self.finished = False

    def open(self, frame: bytes) -> bytes:
        """Returns the content of the next frame.

        Raises:
            ChannelError: changed, out of turn, repeated, of another answer, or after the end.
        """
        head = 1 + (NONCE_BYTES if self._count == 0 else 0)
        if self.finished or len(frame) <= head or len(frame) > MAX_FRAME_BYTES + OVERHEAD_BYTES or frame[0] > 1:
            self._broken()
        if self._count == 0:
            key, self._base = _answer_keys(self._secret, self._info, frame[1:head])
            self._cipher = AESGCM(key)
        if self._cipher is None:
            self._broken()
        try:
            padded = self._cipher.decrypt(
                _frame_nonce(self._base, self._count), frame[head:], _frame_data(self._count, bool(frame[0]))
            )
        except InvalidTag:
            self._broken()
        self._count += 1
        self.finished = bool(frame[0])
        return unpad(padded)

    def require_end(self) -> None:
        """Raises `ChannelError` unless the final frame was read: what stops earlier was cut."""
        if not self.finished:
            raise ChannelError("The answer was cut off.", remedy="Ask again; what came so far may be incomplete.")

    def _broken(self) -> Never:
        self._cipher = None
        self._count = max(1, self._count)
        raise ChannelError(
            "A piece of the answer is not what the enclave sent, or not the next one.",
            remedy="Ask again on a new connection.",
        )


def _answer_keys(secret: bytes, info: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """Returns key and base nonce of an answer."""
    made = HKDF(hashes.SHA256(), 44, salt=nonce, info=b"cloister/answer/1" + info).derive(secret)
    parts = made[:32], made[32:]
    wipe_bytes(made)
    return parts


def _frame_nonce(base: bytes, count: int) -> bytes:
    return (int.from_bytes(base, "big") ^ count).to_bytes(12, "big")


def _frame_data(count: int, final: bool) -> bytes:
    return b"cloister/frame/1" + count.to_bytes(8, "big") + bytes([final])
