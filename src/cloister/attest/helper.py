"""A small process that owns configfs-tsm, and the attester that asks it: so that the service itself needs no rights of root.

    service → helper   64 bytes of report data
    helper  → service  evidence as JSON, or nothing when there is none

Runs as `python -m cloister.attest.helper --listen PATH --user UID`. Covers: one question per connection, from one user.
Guarantees: the helper accepts exactly 64 bytes from the named user (asked of the kernel, not of the peer) and gives evidence over
them; it does nothing else. Does not cover: what the report data mean; a service that is taken over gets evidence, as it would.
"""

import argparse
import os
import socket
import struct
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from cloister.attest.evidence import (
    MAX_EVIDENCE_BYTES,
    REPORT_DATA_BYTES,
    Attester,
    Evidence,
    Kind,
    require_report_data,
)
from cloister.attest.sources import collateral_file, find_attester
from cloister.errors import AttestationError, AttesterError

ASK_SECONDS: Final = 30.0


class HelperAttester:
    """Asks a helper on this machine for evidence."""

    def __init__(self, path: Path) -> None:
        """`path`: the helper's Unix socket."""
        self._path = path

    @property
    def kind(self) -> Kind:
        """The kind of the evidence that the helper makes."""
        return self.evidence(bytes(REPORT_DATA_BYTES)).kind

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with these 64 bytes bound into it.

        Raises:
            AttesterError: the helper does not answer, refuses, or could not get any.
        """
        require_report_data(report_data)
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(ASK_SECONDS)
                sock.connect(str(self._path))
                sock.sendall(report_data)
                sock.shutdown(socket.SHUT_WR)
                document = _all(sock, MAX_EVIDENCE_BYTES)
        except OSError as error:
            raise AttesterError(
                f"The helper at {self._path} does not answer: {error}.", remedy="Is its unit started?"
            ) from error
        if not document:
            raise AttesterError(f"The helper at {self._path} gives no evidence.", remedy="See its log.")
        try:
            return Evidence.decode(document)
        except AttestationError as error:
            raise AttesterError(f"What answers at {self._path} is no helper.", remedy="Check the path.") from error


def serve(listener: socket.socket, user: int, attester: Attester) -> None:
    """Answers questions of one user until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with closing(connection), suppress(OSError):
            connection.settimeout(ASK_SECONDS)
            _, asking, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if asking != user:
                continue
            report_data = _all(connection, REPORT_DATA_BYTES)
            if len(report_data) != REPORT_DATA_BYTES:
                continue
            try:
                connection.sendall(attester.evidence(report_data).encode())
            except AttestationError as error:
                sys.stderr.write(f"{error}\n")


def main() -> int:
    """Runs the helper; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cloister.attest.helper", description=__doc__)
    parser.add_argument("--listen", type=Path, required=True, help="Unix socket to make")
    parser.add_argument("--user", type=int, required=True, help="user id that may ask")
    parser.add_argument("--collateral", type=Path, help="file with the vendor's statements")
    given = parser.parse_args()
    attester = find_attester(collateral_file(given.collateral) if given.collateral is not None else bytes)
    with socket.socket(socket.AF_UNIX) as listener:
        given.listen.unlink(missing_ok=True)
        before = os.umask(0o177)
        listener.bind(str(given.listen))
        os.umask(before)
        os.chown(given.listen, given.user, -1)
        listener.listen(16)
        serve(listener, given.user, attester)
    return 0


def _all(sock: socket.socket, limit: int) -> bytes:
    """Returns what the peer sends until it stops; at most one byte more than `limit`."""
    made = bytearray()
    while len(made) <= limit and (piece := sock.recv(min(2**16, limit + 1 - len(made)))):
        made += piece
    return bytes(made)


if __name__ == "__main__":
    sys.exit(main())
