"""A TPM 2.0 spoken to directly: a few commands, over `/dev/tpmrm0` or the socket of a software TPM.

Source: TCG TPM Library part 3 (commands): CreatePrimary 24.1, Quote 18.4, PCR_Extend 22.2, PCR_Read 22.4, FlushContext 28.4.
Covers: making an attestation key, reading and extending registers, quoting. Does not cover: sealing; endorsement keys and
the activation of credentials, which `attest.tpm_activation` builds on `command`.

The attestation key is a primary key of the endorsement hierarchy: the same TPM derives the same key each time, so nothing
needs to be stored and an owner enrols it once by its name.
"""

import os
import socket
import stat
import struct
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Final

from cloister.attest import tpm_format as f
from cloister.attest.evidence import Evidence, Kind, require_report_data
from cloister.attest.tpm import TpmCollateral, bound_bytes
from cloister.errors import AttesterError, EvidenceError

RH_ENDORSEMENT: Final = 0x4000000B
RS_PASSWORD: Final = 0x40000009
ST_SESSIONS: Final = 0x8002
ST_NO_SESSIONS: Final = 0x8001
_CC_CREATE_PRIMARY: Final = 0x131
_CC_QUOTE: Final = 0x158
_CC_FLUSH: Final = 0x165
_CC_PCR_READ: Final = 0x17E
_CC_PCR_EXTEND: Final = 0x182
_RC_RETRY: Final = 0x922
_RETRIES: Final = 50
_MAX_ANSWER: Final = 4096
PASSWORD: Final = struct.pack(">IIHBH", 9, RS_PASSWORD, 0, 0, 0)
_KEY_ATTRIBUTES: Final = f.FIXED_TPM | f.FIXED_PARENT | f.SENSITIVE_ORIGIN | 1 << 6 | f.RESTRICTED | f.SIGN
_PCRS: Final = 24


class TpmClient:
    """One open TPM. Commands are serialised; use as a context manager."""

    def __init__(self, path: Path, timeout_seconds: float = 30.0) -> None:
        """Opens a device or a stream socket.

        Raises:
            AttesterError: there is none, or this user may not use it.
        """
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._file = -1
        try:
            if stat.S_ISSOCK(path.stat().st_mode):
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(timeout_seconds)
                self._socket.connect(str(path))
            else:
                self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise AttesterError(
                f"No TPM at {path}: {error.strerror}.",
                remedy="Give a user of the group tss /dev/tpmrm0, or start swtpm.",
            ) from error

    def __enter__(self) -> "TpmClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the TPM; harmless twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def create_attestation_key(self) -> tuple[int, bytes]:
        """Returns handle and TPMT_PUBLIC of the P-256 attestation key; flush the handle after use."""
        template = (
            struct.pack(">HHI", f.ALG_ECC, f.ALG_SHA256, _KEY_ATTRIBUTES)
            + sized(b"")
            + struct.pack(">HHHHH", f.ALG_NULL, f.ALG_ECDSA, f.ALG_SHA256, f.ECC_P256, f.ALG_NULL)
            + sized(b"") * 2
        )
        return self.create_primary(template)

    def create_primary(self, template: bytes) -> tuple[int, bytes]:
        """Returns handle and TPMT_PUBLIC of the key of the endorsement hierarchy that a template stands for."""
        sensitive = sized(sized(b"") * 2)
        body = struct.pack(">I", RH_ENDORSEMENT) + PASSWORD + sensitive + sized(template) + sized(b"") + bytes(4)
        reader = f.Reader(self.command(ST_SESSIONS, _CC_CREATE_PRIMARY, body))
        handle = reader.number(4)
        reader.number(4)  # size of the parameters
        return handle, reader.sized()

    def quote(self, handle: int, extra_data: bytes, pcrs: Collection[int]) -> bytes:
        """Returns TPM2B_ATTEST and TPMT_SIGNATURE over these SHA-256 registers."""
        body = (
            struct.pack(">I", handle) + PASSWORD + sized(extra_data) + struct.pack(">H", f.ALG_NULL) + _selection(pcrs)
        )
        reader = f.Reader(self.command(ST_SESSIONS, _CC_QUOTE, body))
        return reader.take(reader.number(4))

    def read_pcrs(self, pcrs: Collection[int]) -> dict[int, bytes]:
        """Returns SHA-256 register values by number."""
        values: dict[int, bytes] = {}
        while wanted := sorted(set(pcrs) - set(values))[:8]:  # a TPM answers with at most eight values
            reader = f.Reader(self.command(ST_NO_SESSIONS, _CC_PCR_READ, _selection(wanted)))
            reader.take(4 + 4 + 2)  # update counter, number of selections, bank
            mask = reader.take(reader.number(1))
            returned = [bit for bit in range(8 * len(mask)) if mask[bit // 8] >> bit % 8 & 1]
            if reader.number(4) != len(returned) or not set(returned) & set(wanted):
                raise AttesterError("The TPM did not return the registers that were asked for.")
            values |= {number: reader.sized() for number in returned}
        return values

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extends a register: its new value is SHA-256(old value, digest)."""
        if not 0 <= pcr < _PCRS or len(digest) != 32:
            raise ValueError("A register is 0 to 23 and is extended by 32 bytes.")
        self.command(
            ST_SESSIONS,
            _CC_PCR_EXTEND,
            struct.pack(">I", pcr) + PASSWORD + struct.pack(">IH", 1, f.ALG_SHA256) + digest,
        )

    def flush(self, handle: int) -> None:
        """Removes a key from the TPM's few slots."""
        self.command(ST_NO_SESSIONS, _CC_FLUSH, struct.pack(">I", handle))

    def command(self, tag: int, code: int, body: bytes) -> bytes:
        """Returns the answer to a command, without its header.

        Raises:
            AttesterError: the TPM refuses, or does not answer.
        """
        command = struct.pack(">HII", tag, 10 + len(body), code) + body
        with self._lock:
            for _ in range(_RETRIES):
                answer = self._exchange(command)
                result = int.from_bytes(answer[6:10], "big")
                if result != _RC_RETRY:  # the TPM is busy: the same command is to be sent again
                    break
        if result:
            raise AttesterError(f"The TPM refused command {code:#x} with {result:#x}.")
        return answer[10:]

    def _exchange(self, command: bytes) -> bytes:
        try:
            if self._socket is None:
                os.write(self._file, command)
                answer = os.read(self._file, _MAX_ANSWER)
            else:
                self._socket.sendall(command)
                answer = b""
                while len(answer) < 10 or len(answer) < int.from_bytes(answer[2:6], "big"):
                    part = self._socket.recv(_MAX_ANSWER - len(answer))
                    if not part:
                        raise AttesterError(
                            "The TPM closed the connection.", remedy="Is swtpm still running? Ask again."
                        )
                    answer += part
        except OSError as error:
            raise AttesterError(
                f"The TPM does not answer: {error}.", remedy="Ask again; if it stays silent, restart what runs it."
            ) from error
        if len(answer) < 10 or int.from_bytes(answer[2:6], "big") != len(answer):
            raise AttesterError("The TPM's answer is cut.")
        return answer


class TpmAttester:
    """Quotes registers of one TPM."""

    def __init__(self, path: Path, pcrs: Collection[int]) -> None:
        """Takes a device or socket, and the SHA-256 registers to quote."""
        if not pcrs or not all(0 <= number < _PCRS for number in pcrs):
            raise ValueError("At least one register, each 0 to 23, must be quoted.")
        self._path = path
        self._pcrs = tuple(sorted(set(pcrs)))
        self._lock = threading.Lock()

    @property
    def kind(self) -> Kind:
        """`tpm`."""
        return Kind.TPM

    def evidence(self, report_data: bytes) -> Evidence:
        """Returns evidence with the SHA-256 of these 64 bytes bound into it.

        Raises:
            AttesterError: no TPM, or it refused.
        """
        require_report_data(report_data)
        with self._lock, TpmClient(self._path) as tpm:
            try:
                handle, public = tpm.create_attestation_key()
                try:
                    values = tpm.read_pcrs(self._pcrs)
                    quote = tpm.quote(handle, bound_bytes(report_data), self._pcrs)
                finally:
                    tpm.flush(handle)
            except EvidenceError as error:
                raise AttesterError("The TPM's answer cannot be read.") from error
        collateral = TpmCollateral(public=public, pcrs={str(number): values[number] for number in sorted(values)})
        return Evidence(kind=Kind.TPM, report=quote, collateral=collateral.encode())


def sized(value: bytes) -> bytes:
    """Returns a TPM2B: two bytes of length, and the value."""
    return struct.pack(">H", len(value)) + value


def _selection(pcrs: Collection[int]) -> bytes:
    mask = bytearray(3)
    for number in pcrs:
        mask[number // 8] |= 1 << number % 8
    return struct.pack(">IHB", 1, f.ALG_SHA256, 3) + bytes(mask)
