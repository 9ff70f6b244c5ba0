"""What is fuzzed: every parser that meets a peer's bytes, and the whole verifier on damaged evidence.

Used by the Hypothesis tests and by `scripts/fuzz.py` (atheris). A target returns normally or raises one of `EXPECTED`;
anything else, and anything slow, is a finding.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from attest.amd import Amd, snp_policy
from attest.cloud_forge import Aws, Nvidia
from attest.forge import NOW, TD, Forge, strict
from attest.tpm_forge import FakeTpm
from cloister.attest import (
    cbor,
    certificate_table,
    certificates,
    collateral,
    dcap_pki,
    der,
    document,
    gpu,
    quote,
    tpm_enrolment,
    vector,
)
from cloister.attest.certificates import load_der
from cloister.attest.evidence import Evidence, Kind, Result, Verdict
from cloister.attest.policy import Policy, SimPolicy, TpmPolicy
from cloister.attest.receipt import Receipt, verify_receipt
from cloister.attest.roots import Roots
from cloister.attest.sim import Installation, SimAttester
from cloister.attest.snp_report import SnpReport
from cloister.attest.tpm import TpmCollateral
from cloister.attest.tpm_format import Attest, PublicArea, signature_holds, split_quote
from cloister.attest.verify import verify
from cloister.errors import CloisterError

EXPECTED = (CloisterError,)
VECTORS = Path(__file__).parents[1] / "vectors"

Target = Callable[[bytes], object]


def _endorsed() -> tuple[bytes, bytes]:
    """Returns an endorsement certificate and the authority that issued it."""
    key = ec.generate_private_key(ec.SECP256R1())
    window = (NOW - timedelta(days=1), NOW + timedelta(days=1))
    authority = dcap_pki.certify("TPM CA", key.public_key(), ("TPM CA", key), window, path=0)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(authority.subject).serial_number(7)
    builder = builder.public_key(key.public_key()).not_valid_before(window[0]).not_valid_after(window[1])
    builder = builder.add_extension(x509.ExtendedKeyUsage([tpm_enrolment.ENDORSEMENT_USAGE]), critical=False)
    leaf = builder.sign(key, hashes.SHA256())
    return leaf.public_bytes(Encoding.DER), authority.public_bytes(Encoding.DER)


ENDORSEMENT, AUTHORITY = _endorsed()


def judged_receipt(document: bytes) -> object:
    """Reads a receipt and judges it; nobody is believed, so nothing may be accepted."""
    nobody = Policy(accept=(SimPolicy(measurement=frozenset({bytes(32)}), min_version=1),), report_data=bytes(64))
    verdict = verify_receipt(Receipt.decode(document), nobody, NOW, Roots())
    if verdict.result is Result.ACCEPTED:
        raise AssertionError("a receipt of a stranger is accepted")
    return verdict


PARSERS: dict[str, Target] = {
    "evidence": Evidence.decode,
    "attestation": document.Attestation.decode,
    "format": document.format_of,
    "vector": vector.Vector.decode,
    "receipt vector": vector.ReceiptVector.decode,
    "receipt": judged_receipt,
    "quote": quote.parse,
    "padding": quote.without_padding,
    "collateral": collateral.read,
    "snp report": SnpReport.decode,
    "tpm attest": Attest.decode,
    "tpm public": PublicArea.decode,
    "tpm collateral": TpmCollateral.decode,
    "tpm split": split_quote,
    "certificate": certificates.load_der,
    "chain": certificates.load_pem_chain,
    "certificate table": certificate_table.parse,
    "der integer": der.read_integer,
    "cbor": cbor.decode,
    "gpu report": gpu.parse,
    "installation": Installation.decode,
    "tpm shown": tpm_enrolment.Shown.decode,
    "tpm credential": tpm_enrolment.Credential.decode,
    "endorsement certificate": lambda data: tpm_enrolment.endorsement_key(data, [load_der(AUTHORITY)], NOW),
}


WITH_INPUTS = (
    "evidence", "quote", "padding", "collateral", "snp report", "tpm attest", "tpm public", "tpm collateral",
    "tpm split", "certificate", "chain", "cbor", "gpu report", "tpm shown", "tpm credential", "endorsement certificate",
)  # fmt: skip
"""Parsers for which `good_inputs` has a well-formed input."""


@dataclass(frozen=True)
class Sample:
    """Good evidence, and the policy and roots under which it is accepted."""

    evidence: Evidence
    policy: Policy
    roots: Roots

    def judge(self, evidence: Evidence | bytes) -> Verdict:
        return verify(evidence, self.policy, NOW, self.roots)


def samples() -> dict[str, Sample]:
    """Returns one good piece of evidence of each kind."""
    forge, amd, tpm = Forge.new(), Amd.new(), FakeTpm(ec.generate_private_key(ec.SECP256R1()))
    installation = Installation.create(NOW)
    report_data = bytes(range(64))
    sim = SimAttester(installation, bytes(32), clock=lambda: NOW + timedelta(0)).evidence(report_data)
    sim_policy = Policy(accept=(SimPolicy(measurement=frozenset({bytes(32)}), min_version=0),), report_data=report_data)
    pcrs = {0: frozenset({bytes(32)})}
    tpm_policy = Policy(accept=(TpmPolicy(pcrs=pcrs, resets=5, firmware=frozenset({0x77})),), report_data=report_data)
    found = {
        "sgx": Sample(forge.evidence(), strict(), forge.roots),
        "tdx": Sample(forge.evidence(TD), strict(), forge.roots),
        "tdx 5": Sample(forge.evidence(TD, version=5), strict(), forge.roots),
        "snp": Sample(amd.evidence(), snp_policy(), amd.roots),
        "tpm": Sample(tpm.evidence(), tpm_policy, tpm.roots),
        "nitro": _of(Aws.new()),
        "gpu": _of(Nvidia.new()),
        "sim": Sample(sim, sim_policy, Roots(sim=frozenset({installation.fingerprint}))),
    }
    for name, sample in found.items():
        if sample.judge(sample.evidence).result is not Result.ACCEPTED:
            raise AssertionError(f"the {name} sample is not accepted as it is")
    return found


def _of(maker: Aws | Nvidia) -> Sample:
    return Sample(maker.evidence(), maker.policy(), maker.roots)


def good_inputs(found: dict[str, Sample]) -> dict[str, bytes]:
    """Returns a well-formed input for each parser that has one here: where mutations begin."""
    sgx, snp, tpm = found["sgx"].evidence, found["snp"].evidence, found["tpm"].evidence
    attest, _ = split_quote(tpm.report)
    public, _ = TpmCollateral.decode(tpm.collateral)
    return {
        "evidence": sgx.encode(),
        "quote": found["tdx 5"].evidence.report,
        "padding": sgx.report,
        "collateral": sgx.collateral,
        "snp report": snp.report,
        "tpm attest": attest,
        "tpm public": public,
        "tpm collateral": tpm.collateral,
        "tpm split": tpm.report,
        "certificate": snp.certificates[0],
        "cbor": found["nitro"].evidence.report,
        "gpu report": found["gpu"].evidence.report,
        "chain": quote.parse(sgx.report).pck_chain,
        "tpm shown": tpm_enrolment.Shown(certificate=ENDORSEMENT, public=public).encode(),
        "tpm credential": tpm_enrolment.Credential(blob=bytes(70), seed=bytes(258)).encode(),
        "endorsement certificate": ENDORSEMENT,
    }


def of_vectors(name: str) -> list[bytes]:
    """Returns what the conformance vectors have for a parser of whole documents."""
    documents = {path.parent.name: path.read_bytes() for path in sorted(VECTORS.glob("*/input.json"))}
    receipts = [documents.pop(found) for found in list(documents) if found.startswith("receipt-")]
    match name:
        case "vector":
            return list(documents.values())
        case "evidence":
            return [vector.Vector.decode(document).evidence for document in documents.values()]
        case "receipt vector":
            return receipts
        case "receipt":
            return [vector.ReceiptVector.decode(document).receipt for document in receipts]
        case _:
            return []


def reports_of_vectors(kind: str) -> list[bytes]:
    """Returns the reports of one kind in the conformance vectors, good and bad."""
    found = []
    for evidence in of_vectors("evidence"):
        with suppress(CloisterError):
            decoded = Evidence.decode(evidence)
            if decoded.kind == kind:
                found.append(decoded.report)
    return found


def signature_target(found: dict[str, Sample]) -> Target:
    """Returns a target for TPM signatures over a fixed structure."""
    public, _ = TpmCollateral.decode(found["tpm"].evidence.collateral)
    area = PublicArea.decode(public)
    return lambda data: signature_holds(area, b"attest", data)


def damaged(sample: Sample, where: str, data: bytes) -> Evidence:
    """Returns the sample's evidence with one part replaced."""
    good = sample.evidence
    certificates_ = good.certificates
    if where.startswith("certificate") and certificates_:
        number = int(where[-1])
        certificates_ = (*certificates_[:number], data, *certificates_[number + 1 :])
    return Evidence(
        kind=Kind(good.kind),
        report=data if where == "report" else good.report,
        collateral=data if where == "collateral" else good.collateral,
        certificates=certificates_,
    )
