"""Writes the conformance vectors under tests/vectors from PKIs of our own, and checks them.

Usage: make_vectors.py [--check]

Each case states by hand what must come of it; nothing is written unless our verifier agrees. Keys are made anew each run
and are thrown away, so every run gives other bytes: run it only when a case or a format changes. --check writes nothing
and fails when a case is missing, left over, or expects something else than is stated here.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

from attest import amd as amds  # noqa: E402
from attest.cloud_forge import GPU_MEASUREMENT, Aws, Nvidia  # noqa: E402
from attest.cloud_forge import PCRS as CLOUD_PCRS  # noqa: E402
from attest.forge import ENCLAVE, MRENCLAVE, MRSIGNER, MRTD, NOW, REPORT_DATA, RTMR, TD, WINDOW, Forge  # noqa: E402
from attest.tpm_forge import PCRS, FakeTpm  # noqa: E402
from cloister.attest.evidence import Evidence, Kind  # noqa: E402
from cloister.attest.sim import Installation, SimAttester  # noqa: E402
from cloister.attest.vector import FORMAT, Vector  # noqa: E402
from cloister.attest.verify import verify  # noqa: E402
from vectors import run  # noqa: E402

ANY = {"skip": "not the subject of this vector"}
MEASURED = bytes([8]) * 32


@dataclass(frozen=True)
class Case:
    """One vector, with what must come of it."""

    name: str
    description: str
    evidence: Evidence | bytes
    policy: Mapping[str, Any]
    result: str = "accepted"
    failed: tuple[str, ...] = ()
    time: datetime = NOW
    report_data: bytes = REPORT_DATA

    def document(self) -> bytes:
        """Returns input.json."""
        evidence = self.evidence.encode() if isinstance(self.evidence, Evidence) else self.evidence
        return json.dumps(
            {
                "format": FORMAT,
                "description": self.description,
                "time": self.time.isoformat(),
                "report_data": self.report_data.hex(),
                "policy": self.policy,
                "evidence": evidence.decode(),
            },
            indent=1,
        ).encode()


def fingerprint(certificate: x509.Certificate) -> str:
    """Returns what a policy file calls a root."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def with_report(evidence: Evidence, report: bytes) -> Evidence:
    """Returns the evidence with another report."""
    return Evidence(
        kind=evidence.kind, report=report, collateral=evidence.collateral, certificates=evidence.certificates
    )


def dcap_cases() -> Iterator[Case]:
    """Yields SGX, TDX and malformed documents."""
    forge, stranger = Forge.new("Vector SGX"), Forge.new("Vector SGX")
    roots = {"dcap": [forge.authority.fingerprint.hex()]}
    sgx = {"mrenclave": [MRENCLAVE.hex()], "mrsigner": [MRSIGNER.hex()], "product": 7, "min_version": 3}
    tdx = {"mrtd": [MRTD.hex()], "rtmr": [[value.hex()] for value in RTMR], "mrconfigid": [bytes(48).hex()]}
    policy = {"roots": roots, "sgx": sgx, "tdx": tdx}

    def refused(name: str, description: str, evidence: Evidence, *failed: str, **more: Any) -> Case:
        return Case(name, description, evidence, more.pop("policy", policy), "refused", failed, **more)

    good = forge.evidence()
    yield Case("sgx-accepted", "a good SGX quote, version 3", good, policy)
    yield Case("tdx-v4-accepted", "a good TDX quote, version 4", forge.evidence(TD), policy)
    yield Case("tdx-v5-accepted", "a good TDX quote, version 5, TD report 1.0", forge.evidence(TD, version=5), policy)
    td15 = replace(TD, tdx_15=bytes(64))
    yield Case(
        "tdx-v5-15-accepted", "a good TDX quote, version 5, TD report 1.5", forge.evidence(td15, version=5), policy
    )
    yield refused("sgx-debug", "a debug enclave", forge.evidence(replace(ENCLAVE, flags=0x7)), "debug", "signature")
    debug = forge.evidence(replace(TD, td_attributes=1 << 28 | 1))
    yield refused("tdx-debug", "a debug TD", debug, "debug", "signature")
    for name, flags in (("no-flags", 0), ("provision-key", 0x15), ("einittoken-key", 0x25), ("not-init", 0x4)):
        evidence = forge.evidence(replace(ENCLAVE, flags=flags))
        yield refused(f"sgx-attributes-{name}", f"attributes {flags:#x}", evidence, "attributes")
    for name, bit in (("pks", 30), ("perfmon", 63)):
        evidence = forge.evidence(replace(TD, td_attributes=1 << 28 | 1 << bit))
        yield refused(f"tdx-attributes-{name}", f"TD attribute bit {bit} set", evidence, "attributes")
    migratable = forge.evidence(replace(TD, td_attributes=1 << 28 | 1 << 29))
    yield refused("tdx-attributes-migratable", "a TD that may migrate", migratable, "attributes", "signature")
    yield refused("sgx-qe-debug", "a debug quoting enclave", forge.evidence(qe_flags=0x13), "signature")
    for status in ("OutOfDate", "ConfigurationNeeded", "SWHardeningNeeded", "OutOfDateConfigurationNeeded"):
        evidence = forge.evidence(statements=forge.statements(tcb={"status": status}))
        yield refused(f"sgx-tcb-{status.lower()}", f"a platform that is {status}", evidence, "tcb-status")
    lenient = {"roots": roots, "sgx": sgx | {"tcb": {"statuses": ["UpToDate", "OutOfDate"]}}}
    old = forge.evidence(statements=forge.statements(tcb={"status": "OutOfDate"}))
    yield Case("sgx-tcb-outofdate-allowed", "an OutOfDate platform under a policy that names it", old, lenient)
    revoked = forge.evidence(statements=forge.statements(tcb={"status": "Revoked"}))
    yield refused("sgx-tcb-revoked", "a revoked platform", revoked, "signature")
    advised = forge.evidence(statements=forge.statements(tcb={"advisories": ["INTEL-SA-00001"]}))
    yield refused("sgx-advisory", "an open advisory", advised, "advisories")
    newer = {"roots": roots, "sgx": sgx | {"tcb": {"min_evaluation": 21}}}
    yield refused("sgx-collateral-old", "collateral from before a recovery", good, "collateral-version", policy=newer)
    for part in ("tcb_info", "qe_identity"):
        statements = forge.statements()
        statements[f"{part}_signature"] = forge.authority.platform.sign(statements[part].encode()).hex()
        statements[f"{part}_issuer_chain"] = forge.authority.pck_chain
        name = f"sgx-collateral-pck-signed-{part.replace('_', '-')}"
        evidence = forge.evidence(statements=statements)
        yield refused(
            name, f"{part} signed by a platform (PCK) key under the right root", evidence, "collateral-signer"
        )
    statements = forge.statements() | {"tcb_info": forge.statements()["tcb_info"].replace("UpToDate", "uptodate")}
    yield refused(
        "sgx-collateral-changed", "TCB info that nobody signed", forge.evidence(statements=statements), "signature"
    )
    platform = forge.authority.platform.certificate
    evidence = forge.evidence(statements=forge.statements(revoked=(platform,)))
    yield refused("sgx-pck-revoked", "a revoked platform certificate", evidence, "revocation", "signature")
    after = WINDOW[1] + timedelta(seconds=1)
    yield refused("sgx-collateral-expired", "expired collateral", good, "collateral-time", "signature", time=after)
    before = WINDOW[0] - timedelta(seconds=1)
    yield refused(
        "sgx-collateral-future", "collateral of the future", good, "collateral-time", "signature", time=before
    )
    yield refused("sgx-other-root", "the quote of an unknown root", stranger.evidence(), "root")
    mixed = stranger.evidence(statements=forge.statements())
    yield refused("sgx-mixed-roots", "quote and collateral of different roots", mixed, "root", "signature")
    yield refused("sgx-replay", "evidence for another exchange", good, "report-data", report_data=bytes(64))
    for field, value, check in (
        ("mrenclave", bytes(32), "measurement"),
        ("mrsigner", bytes(32), "signer"),
        ("product", 8, "product"),
        ("version", 2, "version"),
    ):
        evidence = forge.evidence(replace(ENCLAVE, **{field: value}))
        yield refused(f"sgx-other-{field}", f"another {field}", evidence, check)
    evidence = forge.evidence(replace(TD, mrtd=bytes(48)))
    yield refused("tdx-other-mrtd", "another MRTD", evidence, "measurement")
    for number in range(4):
        values = tuple(bytes(48) if index == number else value for index, value in enumerate(RTMR))
        evidence = forge.evidence(replace(TD, rtmr=values))
        yield refused(f"tdx-other-rtmr{number}", f"another RTMR{number}", evidence, "registers")
    only_tdx = {"roots": roots, "tdx": tdx}
    yield refused("sgx-kind-not-accepted", "a kind that the policy does not state", good, "kind", policy=only_tdx)
    malformed: dict[str, tuple[str, bytes]] = {
        "sgx-trailing": ("zeros behind the quote", good.report + bytes(16)),
        "sgx-truncated": ("a quote cut in its certificates", good.report[:-100]),
        "sgx-huge-length": (
            "signature data of 2^31-1 bytes",
            good.report[:432] + b"\xff\xff\xff\x7f" + good.report[436:],
        ),
        "sgx-empty": ("no quote at all", b""),
    }
    for name, (description, report) in malformed.items():
        yield Case(name, description, with_report(good, report), policy, "malformed", ("format",))
    future = with_report(good, b"\x06\x00" + good.report[2:])
    yield Case("sgx-version-6", "a quote version that does not exist", future, policy, "unsupported", ("format",))
    tdx_quote = with_report(good, forge.evidence(TD).report)
    yield Case("sgx-holds-tdx", "a TDX quote under the name of SGX", tdx_quote, policy, "malformed", ("format",))
    bare = Evidence(kind=Kind.SGX, report=good.report)
    yield Case("sgx-without-collateral", "a quote without collateral", bare, policy, "malformed", ("format",))
    text = good.encode()
    yield Case("document-cut", "a document that ends early", text[: len(text) // 2], policy, "malformed", ("format",))
    extra = text[:-1] + b',"extra":1}'
    yield Case("document-unknown-field", "a document with an unknown field", extra, policy, "malformed", ("format",))
    other = text.replace(b'"sgx"', b'"cca"', 1)
    yield Case("document-unknown-kind", "a kind that nobody knows", other, policy, "unsupported", ("format",))
    version = text.replace(b"evidence/1", b"evidence/9", 1)
    yield Case("document-unknown-version", "a later document format", version, policy, "unsupported", ("format",))


def sim_cases() -> Iterator[Case]:
    """Yields the software stand-in."""
    installation = Installation.create(NOW)
    good = SimAttester(installation, MEASURED, 2, clock=lambda: NOW).evidence(REPORT_DATA)
    table = {"measurement": [MEASURED.hex()], "min_version": 2}
    roots = {"sim": [installation.fingerprint.hex()]}
    policy = {"roots": roots, "sim": table}
    yield Case("sim-accepted", "the stand-in, asked for by name and root", good, policy)
    yield Case(
        "sim-production-roots", "the stand-in under the vendors' roots", good, {"sim": table}, "refused", ("root",)
    )
    sgx = {"mrenclave": ANY, "mrsigner": ANY, "product": ANY, "min_version": ANY}
    dressed = Evidence(kind=Kind.SGX, report=good.report, collateral=good.collateral)
    both = {"roots": roots, "sgx": sgx, "sim": table}
    yield Case("sim-dressed-as-sgx", "the stand-in under the name of SGX", dressed, both, "refused", ("root",))
    yield Case("sim-not-accepted", "the stand-in where hardware is wanted", good, {"sgx": sgx}, "refused", ("kind",))
    other = {"roots": roots, "sim": table | {"measurement": [bytes(32).hex()]}}
    yield Case("sim-other-measurement", "other software", good, other, "refused", ("measurement",))
    forge = Forge.new("Vector SGX")
    hardware = forge.evidence()
    dressed = Evidence(kind=Kind.SIM, report=hardware.report, collateral=hardware.collateral)
    believed = {"roots": {"sim": [forge.authority.fingerprint.hex()]}, "sim": {"measurement": ANY, "min_version": ANY}}
    yield Case("sim-unmarked", "a quote without the stand-in's mark", dressed, believed, "refused", ("signer",))


def snp_cases() -> Iterator[Case]:
    """Yields SEV-SNP."""
    amd, stranger = amds.Amd.new(), amds.Amd.new()
    table = {
        "measurement": [amds.MEASUREMENT.hex()],
        "host_data": [amds.HOST_DATA.hex()],
        "min_version": 4,
        "min_tcb": {"bootloader": 3, "tee": 1, "snp": 8, "microcode": 115},
        "id_key": [amds.ID_KEY.hex()],
        "revocation": "required",
    }
    roots = {"snp": [next(iter(amd.roots.snp)).hex()]}
    policy = {"roots": roots, "snp": table}
    crl = amd.revocations()

    def refused(name: str, description: str, evidence: Evidence, *failed: str) -> Case:
        return Case(f"snp-{name}", description, evidence, policy, "refused", failed)

    good = amd.evidence(revocations=crl)
    yield Case("snp-accepted", "a good report with VCEK", good, policy)
    vlek = amd.evidence(amds.changed(flags=1 << 2), amd.vcek(chip=None), crl)
    yield Case("snp-vlek-accepted", "a good report with VLEK", vlek, policy)
    for name, bits, check in (
        ("debug", 0x30000 | 1 << 19, "debug"),
        ("migration-agent", 0x30000 | 1 << 18, "attributes"),
        ("reserved-bit-zero", 0x10000, "attributes"),
        ("reserved-bit-set", 0x30000 | 1 << 40, "attributes"),
    ):
        yield refused(name, f"guest policy {bits:#x}", amd.evidence(amds.changed(policy=bits), None, crl), check)
    for field, value, check in (
        ("measurement", bytes(48), "measurement"),
        ("host_data", bytes(32), "registers"),
        ("id_key_digest", bytes(48), "signer"),
        ("guest_svn", 3, "version"),
        ("vmpl", 2, "attributes"),
        ("report_data", bytes(64), "report-data"),
        ("committed_tcb", 0, "tcb-status"),
    ):
        evidence = amd.evidence(amds.changed(**{field: value}), None, crl)
        yield refused(f"other-{field.replace('_', '-')}", f"another {field}", evidence, check)
    tcb = replace(amds.TCB, microcode=116)
    yield refused(
        "vcek-tcb-mismatch",
        "a VCEK of another patch level",
        amd.evidence(vcek=amd.vcek(tcb=tcb), revocations=crl),
        "tcb-status",
    )
    chip = amd.vcek(chip=bytes(63) + b"\1")
    yield refused("vcek-other-chip", "the VCEK of another chip", amd.evidence(vcek=chip, revocations=crl), "chain")
    yield refused(
        "other-root", "the report of an unknown root", stranger.evidence(revocations=stranger.revocations()), "root"
    )
    yield refused("without-revocations", "no revocation list", amd.evidence(), "revocation")
    yield refused(
        "intermediate-revoked", "a revoked ASK", amd.evidence(revocations=amd.revocations(amd.ask)), "revocation"
    )
    flipped = bytearray(good.report)
    flipped[0x90] ^= 1
    yield refused(
        "changed", "one changed bit of the measurement", with_report(good, bytes(flipped)), "measurement", "signature"
    )
    yield Case(
        "snp-short", "a report that is too short", with_report(good, good.report[:-1]), policy, "malformed", ("format",)
    )
    unsigned = with_report(good, good.report[:-1] + b"\1")
    yield Case("snp-unsigned-tail", "bytes in the unsigned end", unsigned, policy, "malformed", ("format",))
    bare = Evidence(kind=Kind.SNP, report=good.report, collateral=crl)
    yield Case("snp-without-certificates", "no certificates", bare, policy, "malformed", ("format",))
    future = amd.evidence(amds.changed(version=9), None, crl)
    yield Case("snp-version-9", "a report version that does not exist", future, policy, "unsupported", ("format",))


def tpm_cases() -> Iterator[Case]:
    """Yields TPM 2.0."""
    fake, other = (FakeTpm(ec.generate_private_key(ec.SECP256R1())) for _ in range(2))
    pcrs = {str(number): [value.hex()] for number, value in PCRS.items()}
    policy = {
        "roots": {"tpm": [next(iter(fake.roots.tpm)).hex()]},
        "tpm": {"pcrs": pcrs, "resets": 5, "firmware": [0x77]},
    }

    def refused(name: str, description: str, evidence: Evidence, *failed: str) -> Case:
        return Case(f"tpm-{name}", description, evidence, policy, "refused", failed)

    yield Case("tpm-accepted", "a good quote by an enrolled key", fake.evidence(), policy)
    yield refused("not-enrolled", "a good quote by an unknown key", other.evidence(), "root")
    yield refused("other-key", "a quote that another key signed", other.evidence(public=fake.public()), "signature")
    yield refused(
        "wrong-magic", "a structure that no TPM made", fake.evidence(fake.attest(magic=0xFF544348)), "signature"
    )
    lies = fake.evidence(pcrs={**PCRS, 12: bytes(32)})
    yield refused("unsigned-registers", "registers that were not signed", lies, "signature", "registers")
    other_pcrs = {**PCRS, 12: bytes(32)}
    yield refused("other-register", "another PCR 12", fake.evidence(fake.attest(other_pcrs), other_pcrs), "registers")
    yield refused("replay", "evidence for another exchange", fake.evidence(fake.attest(extra=bytes(32))), "report-data")
    yield refused("restarted", "another reset counter", fake.evidence(fake.attest(resets=6)), "version")
    yield refused("unsafe-clock", "a clock that is not safe", fake.evidence(fake.attest(safe=0)), "attributes")
    cut = with_report(fake.evidence(), fake.evidence().report[:-1])
    yield Case("tpm-truncated", "a quote that ends early", cut, policy, "malformed", ("format",))
    bank = fake.evidence(fake.attest(bank=0x0C))
    yield Case("tpm-other-bank", "a quote over SHA-384 registers", bank, policy, "unsupported", ("format",))


def cloud_cases() -> Iterator[Case]:
    """Yields AWS Nitro documents and GPU reports."""
    aws, gpu = Aws.new(), Nvidia.new()
    pcrs = {str(number): [CLOUD_PCRS[number].hex()] for number in (0, 8)}
    nitro = {"roots": {"nitro": [fingerprint(aws.root)]}, "nitro": {"pcrs": pcrs, "max_age_seconds": 300}}

    def refused(name: str, description: str, evidence: Evidence, *failed: str, time: datetime = NOW) -> Case:
        return Case(f"nitro-{name}", description, evidence, nitro, "refused", failed, time)

    good = aws.evidence()
    yield Case("nitro-accepted", "a good document", good, nitro)
    debug = aws.evidence(pcrs={**CLOUD_PCRS, 0: bytes(48)})
    yield refused("debug", "an enclave in debug mode", debug, "debug", "registers")
    yield refused("other-register", "another PCR 8", aws.evidence(pcrs={**CLOUD_PCRS, 8: bytes(48)}), "registers")
    yield refused("replay", "a document for another exchange", aws.evidence(user_data=bytes(64)), "report-data")
    yield refused("old", "an old document", good, "collateral-time", time=NOW + timedelta(seconds=301))
    yield refused("other-root", "a document of an unknown root", Aws.new().evidence(), "root")
    yield refused(
        "other-key", "a document that another key signed", replace(aws, key=Aws.new().key).evidence(), "signature"
    )
    tail = with_report(good, good.report + bytes(1))
    yield Case("nitro-trailing", "a byte behind the document", tail, nitro, "malformed", ("format",))
    other = aws.evidence(digest="SHA256")
    yield Case("nitro-other-digest", "registers of another hash", other, nitro, "unsupported", ("format",))

    table = {"measurement": [GPU_MEASUREMENT.hex()], "driver": ["550.90.07"], "vbios": ["9600"], "revocation": ANY}
    policy = {"roots": {"gpu": [fingerprint(gpu.root)]}, "gpu": table}
    good = gpu.evidence()
    yield Case("gpu-accepted", "a good GPU report", good, policy)
    for name, description, report, check in (
        ("gpu-replay", "a report for another exchange", gpu.report(nonce=bytes(32)), "report-data"),
        ("gpu-other-firmware", "a certificate for other firmware", gpu.report(fwid=bytes(48)), "chain"),
        ("gpu-other-driver", "another driver", gpu.report(_3=b"1.0"), "version"),
        ("gpu-other-vbios", "another VBIOS", gpu.report(_6=b"1"), "product"),
        ("gpu-other-key", "a report that another key signed", Nvidia.new().report(), "signature"),
    ):
        yield Case(name, description, gpu.evidence(report), policy, "refused", (check,))
    yield Case("gpu-other-root", "a report of an unknown root", Nvidia.new().evidence(), policy, "refused", ("root",))
    cut = gpu.evidence(gpu.report()[:-1])
    yield Case("gpu-truncated", "a report that ends early", cut, policy, "malformed", ("format",))


def cases() -> list[Case]:
    """Returns every case."""
    return [*dcap_cases(), *sim_cases(), *snp_cases(), *tpm_cases(), *cloud_cases()]


def judged(document: bytes) -> tuple[str, list[str], str | None]:
    """Returns result, failed checks and measurement, as our verifier finds them."""
    vector = Vector.decode(document)
    verdict = verify(vector.evidence, vector.expectations.policy, vector.time, vector.expectations.roots)
    failed = sorted({check.value for check in verdict.failed})
    return verdict.result.value, failed, verdict.claims.measurement.hex() if verdict.claims else None


if __name__ == "__main__":
    run(__doc__, receipts=False, cases=cases, judged=judged)
