"""What a verifier expects. Every expectation must be stated, or skipped by name with a reason.

Covers: one frozen record per kind of evidence, and the `Policy` that holds them with the expected report data.
Does not cover: who is believed (`attest.roots`), or reading a policy from a file (`attest.policy_file`).

A kind without a record in the policy is refused. No field has a default that skips its check.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cloister.attest.evidence import REPORT_DATA_BYTES, Kind, Skip
from cloister.errors import SettingsError

ANY_MACHINE: Final = Skip("any machine of the vendor")
"""What a policy says that pins no single machine."""


class Required(StrEnum):
    """The other side of `Skip`, for a check that has no expected value."""

    REQUIRED = "required"


class TcbStatus(StrEnum):
    """What Intel says about a platform's patch level. `Revoked` is missing: it can never be accepted."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"


@dataclass(frozen=True, kw_only=True)
class IntelTcb:
    """Which patch levels of an Intel platform are accepted."""

    statuses: frozenset[TcbStatus] = frozenset({TcbStatus.UP_TO_DATE})
    """Accepted levels."""
    advisories: frozenset[str] | Skip = frozenset()
    """Open advisories (`INTEL-SA-...`) that are accepted; any other is refused."""
    min_evaluation: int | Skip = 0
    """Least TCB evaluation data number of the collateral: raise it to refuse collateral from before a recovery."""
    platforms: frozenset[bytes] | Skip = ANY_MACHINE
    """Accepted machines, by PPID (16 bytes)."""

    def __post_init__(self) -> None:
        _not_empty("tcb statuses", self.statuses)
        _sizes("platforms", self.platforms, 16)


@dataclass(frozen=True, kw_only=True)
class SgxPolicy:
    """What is expected of an SGX enclave."""

    mrenclave: frozenset[bytes] | Skip
    """Accepted enclaves, 32 bytes each."""
    mrsigner: frozenset[bytes] | Skip
    """Accepted authors, 32 bytes each."""
    product: int | Skip
    """ISVPRODID."""
    min_version: int | Skip
    """Least ISVSVN."""
    tcb: IntelTcb = dataclasses.field(default_factory=IntelTcb)

    def __post_init__(self) -> None:
        _sizes("mrenclave", self.mrenclave, 32)
        _sizes("mrsigner", self.mrsigner, 32)


@dataclass(frozen=True, kw_only=True)
class TdxPolicy:
    """What is expected of a TDX virtual machine."""

    mrtd: frozenset[bytes] | Skip
    """Accepted initial memories (firmware), 48 bytes each."""
    rtmr: tuple[frozenset[bytes] | Skip, ...]
    """Accepted values of the four run-time registers, 48 bytes each."""
    mrconfigid: frozenset[bytes] | Skip
    """Accepted configurations, 48 bytes each."""
    tcb: IntelTcb = dataclasses.field(default_factory=IntelTcb)

    def __post_init__(self) -> None:
        _sizes("mrtd", self.mrtd, 48)
        _sizes("mrconfigid", self.mrconfigid, 48)
        if len(self.rtmr) != 4:
            raise SettingsError(
                f"A TDX policy names {len(self.rtmr)} of the 4 run-time registers.",
                remedy='State each of RTMR0 to 3, or { skip = "why not" } for one.',
            )
        for number, register in enumerate(self.rtmr):
            _sizes(f"rtmr{number}", register, 48)


@dataclass(frozen=True, kw_only=True)
class SnpTcb:
    """Least firmware versions of an AMD platform; every component must reach its own."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int = 0
    """Only Turin and later have it."""

    def __str__(self) -> str:
        parts = (f"{field.name} {getattr(self, field.name)}" for field in dataclasses.fields(self))
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SnpPolicy:
    """What is expected of a SEV-SNP virtual machine."""

    measurement: frozenset[bytes] | Skip
    """Accepted launch measurements, 48 bytes each."""
    host_data: frozenset[bytes] | Skip
    """Accepted host data, 32 bytes each."""
    min_version: int | Skip
    """Least guest SVN of a signed identity block."""
    min_tcb: SnpTcb | Skip
    """Least firmware of the platform."""
    id_key: frozenset[bytes] | Skip
    """Accepted signers of the identity block: SHA-384 of the key, 48 bytes each."""
    revocation: Required | Skip
    """Whether AMD's revocation list must come with the evidence."""
    platforms: frozenset[bytes] | Skip = ANY_MACHINE
    """Accepted machines, by chip id (64 bytes)."""
    max_vmpl: int = 0
    """Highest privilege level number (lowest privilege) that may have asked for the report."""

    def __post_init__(self) -> None:
        _sizes("measurement", self.measurement, 48)
        _sizes("host_data", self.host_data, 32)
        _sizes("id_key", self.id_key, 48)
        _sizes("platforms", self.platforms, 64)
        if not 0 <= self.max_vmpl <= 3:
            raise SettingsError(f"max_vmpl is {self.max_vmpl}.", remedy="Allowed: 0 to 3.")


@dataclass(frozen=True, kw_only=True)
class TpmPolicy:
    """What is expected of a machine with a TPM 2.0."""

    pcrs: Mapping[int, frozenset[bytes]] | Skip
    """Accepted SHA-256 values by register number; the quote must cover at least these."""
    resets: int | Skip
    """The reset counter that the machine must have: another means that it was restarted since it was enrolled."""
    firmware: frozenset[int] | Skip
    """Accepted firmware versions."""

    def __post_init__(self) -> None:
        if isinstance(self.pcrs, Skip):
            return
        _not_empty("pcrs", self.pcrs)
        for number, values in self.pcrs.items():
            if not 0 <= number <= 23:
                raise SettingsError(f"There is no PCR {number}.", remedy="Allowed: 0 to 23.")
            _sizes(f"pcr {number}", values, 32)


@dataclass(frozen=True, kw_only=True)
class NitroPolicy:
    """What is expected of an AWS Nitro enclave."""

    pcrs: Mapping[int, frozenset[bytes]] | Skip
    """Accepted SHA-384 values by register number: 0 is the image, 8 its signer."""
    max_age_seconds: int
    """Oldest document: its certificates live for hours, so the document's own time is bounded too."""

    def __post_init__(self) -> None:
        if self.max_age_seconds <= 0:
            raise SettingsError(f"max_age_seconds is {self.max_age_seconds}.", remedy="Allowed: 1 or more.")
        if isinstance(self.pcrs, Skip):
            return
        _not_empty("pcrs", self.pcrs)
        for number, values in self.pcrs.items():
            _sizes(f"pcr {number}", values, 48)


@dataclass(frozen=True, kw_only=True)
class GpuPolicy:
    """What is expected of an NVIDIA GPU in confidential mode."""

    measurement: frozenset[bytes] | Skip
    """Accepted digests of all measurement blocks, 48 bytes each."""
    driver: frozenset[str] | Skip
    """Accepted driver versions, such as 535.86.09."""
    vbios: frozenset[str] | Skip
    """Accepted VBIOS versions, in hexadecimal as the report has them."""
    revocation: Skip
    """Why revocation is not checked: NVIDIA answers only online, which this verifier never does."""

    def __post_init__(self) -> None:
        _sizes("measurement", self.measurement, 48)


@dataclass(frozen=True, kw_only=True)
class SimPolicy:
    """What is expected of the software stand-in. Having this record at all means: no hardware protection is asked for."""

    measurement: frozenset[bytes] | Skip
    """Accepted software measurements, 32 bytes each (see `cloister measure`)."""
    min_version: int | Skip
    """Least version."""

    def __post_init__(self) -> None:
        _sizes("measurement", self.measurement, 32)


KindPolicy = SgxPolicy | TdxPolicy | SnpPolicy | TpmPolicy | NitroPolicy | GpuPolicy | SimPolicy

_KINDS: Mapping[type, Kind] = {
    SgxPolicy: Kind.SGX,
    TdxPolicy: Kind.TDX,
    SnpPolicy: Kind.SNP,
    TpmPolicy: Kind.TPM,
    NitroPolicy: Kind.NITRO,
    GpuPolicy: Kind.GPU,
    SimPolicy: Kind.SIM,
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Everything a verifier expects: which kinds with what in them, and the report data of this exchange."""

    accept: tuple[KindPolicy, ...]
    """One record per accepted kind; any other kind is refused."""
    report_data: bytes | Skip
    """The 64 bytes that the evidence must carry."""

    def __post_init__(self) -> None:
        kinds = [_KINDS[type(record)] for record in self.accept]
        if len(set(kinds)) != len(kinds):
            raise SettingsError(
                "A policy states one kind of evidence twice.", remedy="Merge the two records: one record for each kind."
            )
        _not_empty("accepted kinds", self.accept)
        if not isinstance(self.report_data, Skip) and len(self.report_data) != REPORT_DATA_BYTES:
            raise SettingsError(f"Report data of {len(self.report_data)} bytes.", remedy="It must be 64 bytes.")

    def expecting(self, report_data: bytes) -> "Policy":
        """Returns this policy for one exchange: the evidence must carry these 64 bytes."""
        return dataclasses.replace(self, report_data=report_data)

    def of(self, kind: Kind) -> KindPolicy | None:
        """Returns the record of this kind, or None: then such evidence is refused."""
        return next((record for record in self.accept if _KINDS[type(record)] is kind), None)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The accepted kinds."""
        return tuple(_KINDS[type(record)] for record in self.accept)


def _sizes(name: str, values: frozenset[bytes] | Skip, size: int) -> None:
    if isinstance(values, Skip):
        return
    _not_empty(name, values)
    for value in values:
        if len(value) != size:
            raise SettingsError(f"{name} holds a value of {len(value)} bytes.", remedy=f"It must be {size} bytes.")


def _not_empty(name: str, values: object) -> None:
    if not values:
        raise SettingsError(f"{name} is empty.", remedy="Name what is accepted, or skip the check with a reason.")
