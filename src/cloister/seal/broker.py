"""The broker's decision: a key for evidence that the owner's grants accept, and a line in the log for everything.

Covers: single-use nonces that survive a restart; the owner's policy per model; counting; answers lost on the way.
Guarantees: a key is released only if, in one transaction, the nonce was unused, a grant accepted the evidence, the grant's
count was lowered and the line was written. Killed before that, nothing was issued; killed after it, asking again with the same
nonce and key returns the same sealed bytes and nothing new is issued. Every refusal is a line too; the peer learns no reason.
Does not cover: taking a key back from an enclave that has it (`revoke` ends future releases).
"""

import hashlib
import secrets
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from cloister.attest.evidence import Verdict
from cloister.attest.policy import Policy
from cloister.attest.roots import Roots
from cloister.attest.verify import verify
from cloister.errors import ChannelError, CloisterError, KeyRefusedError
from cloister.isolation.secret_memory import overwrite_leftovers, wipe_bytes
from cloister.seal.release import NONCE_BYTES, Challenge, Released, ReleaseRequest
from cloister.seal.store import Grant, KnownModel, Store
from cloister.wire.channel_keys import seal_to

CHALLENGE_SECONDS: Final = 300.0
"""How long a nonce may be used."""
MOST_CHALLENGES: Final = 4096
"""Most open nonces; when there are more, the oldest are given up."""

ReadPolicy = Callable[[str], tuple[Policy, Roots]]
"""Returns the policy and the roots in the text of a grant."""

Clock = Callable[[], datetime]


class Broker:
    """Releases keys from one store. Safe to use from threads."""

    def __init__(self, store: Store, read_policy: ReadPolicy, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._read_policy = read_policy
        self._clock = clock
        self._lock = threading.Lock()

    def challenge(self) -> Challenge:
        """Returns a new nonce, kept on disk until it is used or too old."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        now = self._clock().timestamp()
        with self._lock, self._store.transaction() as database:
            database.execute("DELETE FROM challenges WHERE expires < ?", (now,))
            database.execute(
                "DELETE FROM challenges WHERE request IS NULL AND nonce IN "
                "(SELECT nonce FROM challenges WHERE request IS NULL ORDER BY expires DESC LIMIT -1 OFFSET ?)",
                (MOST_CHALLENGES - 1,),
            )
            database.execute("INSERT INTO challenges (nonce, expires) VALUES (?, ?)", (nonce, now + CHALLENGE_SECONDS))
        return Challenge(nonce)

    def release(self, request: ReleaseRequest, peer: str = "") -> Released:
        """Returns the sealed key of a package.

        Raises:
            KeyRefusedError: anything is not as the owner wants it. The reason is in the log, and in the error for local use.
            BrokerError: the store cannot be written; nothing was issued.
        """
        now = self._clock()
        about = {"model_root": request.root.hex(), "key": hashlib.sha256(request.key).hexdigest(), "peer": peer}
        with self._lock:
            try:
                with self._store.transaction():
                    return self._decide(request, now, about)
            except KeyRefusedError as error:
                self._store.note({"time": _text(now), "event": "refuse", "reason": error.message, **about})
                raise

    def refuse(self, reason: str, peer: str = "") -> None:
        """Writes a line about a request that could not even be read."""
        with self._lock:
            self._store.note({"time": _text(self._clock()), "event": "refuse", "reason": reason[:400], "peer": peer})

    def _decide(self, request: ReleaseRequest, now: datetime, about: dict[str, Any]) -> Released:
        database = self._store.database
        asked = hashlib.sha256(request.info()).digest()
        row = database.execute(
            "SELECT expires, request, response FROM challenges WHERE nonce = ?", (request.nonce,)
        ).fetchone()
        if row is None or row[0] < now.timestamp():
            raise KeyRefusedError("The nonce was not issued here, or is too old.")
        if row[1] is not None:
            if row[1] == asked:  # the answer was lost: the same bytes, sealed to the same key
                self._store.log.append({"time": _text(now), "event": "repeat", "nonce": request.nonce.hex(), **about})
                return Released(row[2])
            raise KeyRefusedError("The nonce was used for another request.")
        model = self._store.model(request.root)
        if model is None:
            raise KeyRefusedError("The package is not known.")
        grant, verdict = self._granted(model, request, now)
        key = self._store.content_key(model.root)
        try:
            sealed = seal_to(request.suite, request.key, key, request.info())
        except ChannelError as error:
            raise KeyRefusedError(error.message) from error
        finally:
            wipe_bytes(key)
            overwrite_leftovers()
        database.execute(
            "UPDATE challenges SET request = ?, response = ? WHERE nonce = ?", (asked, sealed, request.nonce)
        )
        database.execute("UPDATE grants SET uses = uses - 1 WHERE number = ? AND uses IS NOT NULL", (grant.number,))
        claims = verdict.require()
        event = {"time": _text(now), "event": "release", "grant": grant.number, "model": model.name}
        event |= {"version": model.version, "kind": claims.kind.value, "measurement": claims.measurement.hex()}
        self._store.log.append({**event, "tcb": claims.tcb_status, "nonce": request.nonce.hex(), **about})
        return Released(sealed)

    def _granted(self, model: KnownModel, request: ReleaseRequest, now: datetime) -> tuple[Grant, Verdict]:
        """Returns the first grant that accepts the request, or raises with every grant's reason."""
        reasons = []
        for grant in self._store.grants(model.name):
            if grant.revoked or grant.uses == 0 or (grant.until is not None and grant.until < now.timestamp()):
                reasons.append(f"grant {grant.number} has ended")
            elif model.version < grant.min_version:
                reasons.append(f"grant {grant.number}: version {model.version} is below {grant.min_version}")
            else:
                try:
                    policy, roots = self._read_policy(grant.policy)
                except CloisterError as error:
                    reasons.append(f"grant {grant.number}: its policy does not read: {error.message}")
                    continue
                verdict = verify(request.evidence, policy.expecting(request.binding().report_data()), now, roots)
                if not verdict.failed and verdict.result.value == "accepted":
                    return grant, verdict
                failed = ", ".join(check.value for check in verdict.failed) or verdict.result.value
                reasons.append(f"grant {grant.number}: {failed}")
        raise KeyRefusedError("; ".join(reasons) or "Nothing is allowed for this model.")


def encode(message: Challenge | Released | ReleaseRequest) -> bytes:
    """Returns a message as JSON."""
    return msgspec.json.encode(message)


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
