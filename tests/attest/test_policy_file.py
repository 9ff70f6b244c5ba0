"""Policy files: everything must be stated, everything unknown is refused, and the error names the key."""

from pathlib import Path
from typing import Any

import pytest

from attest.forge import REPORT_DATA
from cloister.attest import policy_file
from cloister.attest.evidence import Kind, Skip
from cloister.attest.policy import Required, SgxPolicy, SnpPolicy, SnpTcb, TcbStatus, TdxPolicy, TpmPolicy
from cloister.attest.roots import AMD_ARK_GENOA, INTEL_SGX_ROOT_CA, Roots
from cloister.errors import SettingsError

H32, H48 = "ab" * 32, "cd" * 48
WHOLE = f"""
[roots]
dcap = ["intel"]
snp = ["amd-milan", "amd-genoa"]
tpm = ["{H32}"]
sim = ["{"ef" * 32}"]

[sgx]
mrenclave = ["{H32}"]
mrsigner = {{ skip = "the enclave is pinned" }}
product = 0
min_version = 2
tcb = {{ statuses = ["UpToDate", "SWHardeningNeeded"], advisories = ["INTEL-SA-00615"], min_evaluation = 17 }}

[tdx]
mrtd = ["{H48}"]
rtmr = [["{H48}"], ["{H48}"], {{ skip = "the event log is not used" }}, ["{H48}", "{"00" * 48}"]]
mrconfigid = {{ skip = "unused" }}

[snp]
measurement = ["{H48}"]
host_data = {{ skip = "unused" }}
min_version = 0
min_tcb = {{ bootloader = 3, tee = 0, snp = 8, microcode = 115 }}
id_key = {{ skip = "unused" }}
revocation = "required"

[tpm]
pcrs = {{ 0 = ["{H32}"], 12 = ["{H32}"] }}
resets = {{ skip = "restarts are fine" }}
firmware = [5]

[nitro]
pcrs = {{ 0 = ["{H48}"] }}
max_age_seconds = 300

[gpu]
measurement = ["{H48}"]
revocation = {{ skip = "only online" }}
driver = ["550.90.07"]
vbios = {{ skip = "unused" }}

[sim]
measurement = ["{H32}"]
min_version = 1
"""


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(WHOLE)
    found = policy_file.read(path, REPORT_DATA)
    assert set(found.policy.kinds) == set(Kind)
    assert found.policy.report_data == REPORT_DATA
    assert found.roots.dcap == {INTEL_SGX_ROOT_CA}
    assert AMD_ARK_GENOA in found.roots.snp
    sgx = found.policy.of(Kind.SGX)
    assert isinstance(sgx, SgxPolicy)
    assert sgx.mrsigner == Skip("the enclave is pinned")
    assert sgx.tcb.statuses == {TcbStatus.UP_TO_DATE, TcbStatus.SW_HARDENING_NEEDED}
    tdx = found.policy.of(Kind.TDX)
    assert isinstance(tdx, TdxPolicy)
    assert [isinstance(register, Skip) for register in tdx.rtmr] == [False, False, True, False]
    snp = found.policy.of(Kind.SNP)
    assert isinstance(snp, SnpPolicy)
    assert (snp.min_tcb, snp.revocation) == (SnpTcb(bootloader=3, tee=0, snp=8, microcode=115), Required.REQUIRED)
    tpm = found.policy.of(Kind.TPM)
    assert isinstance(tpm, TpmPolicy)
    assert not isinstance(tpm.pcrs, Skip)
    assert set(tpm.pcrs) == {0, 12}


def test_without_roots_the_vendors_are_believed_and_no_stand_in() -> None:
    table = {"measurement": [H32], "min_version": 0}
    found = policy_file.from_mapping({"sim": table}, Skip("no exchange"))
    assert found.roots == Roots.production()


SGX: dict[str, Any] = {"mrenclave": [H32], "mrsigner": [H32], "product": 0, "min_version": 0}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "empty"),
        ({"sgy": SGX}, "Unknown table 'sgy'"),
        ({"sgx": SGX | {"mrenclaves": []}}, r"Unknown key 'sgx\.mrenclaves'"),
        ({"sgx": {key: SGX[key] for key in SGX if key != "product"}}, r"'sgx\.product' is missing.*skip"),
        ({"sgx": SGX | {"mrenclave": []}}, "mrenclave is empty"),
        ({"sgx": SGX | {"mrenclave": H32}}, "not a list"),
        ({"sgx": SGX | {"mrenclave": ["xyz"]}}, "hexadecimal"),
        ({"sgx": SGX | {"mrenclave": [H48]}}, "32 bytes"),
        ({"sgx": SGX | {"mrenclave": [7]}}, "hexadecimal"),
        ({"sgx": SGX | {"mrenclave": None}}, "not a list"),
        ({"sgx": SGX | {"mrsigner": {"skip": ""}}}, "without a reason"),
        ({"sgx": SGX | {"mrsigner": {"skip": True}}}, "without a reason"),
        ({"sgx": SGX | {"mrsigner": {"skip": "x", "more": 1}}}, "not a list"),
        ({"sgx": SGX | {"product": "0"}}, "number"),
        ({"sgx": SGX | {"product": True}}, "number"),
        ({"sgx": SGX | {"min_version": -1}}, "number"),
        ({"sgx": SGX | {"tcb": {"statuses": ["uptodate"]}}}, "Choose one of"),
        ({"sgx": SGX | {"tcb": {"statuses": ["Revoked"]}}}, "Choose one of"),
        ({"sgx": SGX | {"tcb": {"statuses": []}}}, "empty"),
        ({"sgx": SGX | {"tcb": {"status": ["UpToDate"]}}}, r"Unknown key 'sgx\.tcb\.status'"),
        ({"sgx": SGX | {"tcb": []}}, "not a table"),
        ({"sgx": 5}, "not a table"),
        ({"tdx": {"mrtd": [H48], "rtmr": [[H48]], "mrconfigid": [H48]}}, "1 of the 4"),
        ({"tpm": {"pcrs": {"x": [H32]}, "resets": 0, "firmware": [0]}}, "registers"),
        ({"tpm": {"pcrs": {"99": [H32]}, "resets": 0, "firmware": [0]}}, "no PCR 99"),
        ({"gpu": {"measurement": [H48], "driver": [], "vbios": [], "revocation": "required"}}, "cannot be checked"),
        ({"sgx": SGX, "roots": {"intel": []}}, "roots"),
        ({"sgx": SGX, "roots": {"dcap": ["amd"]}}, "hexadecimal"),
        ({"sgx": SGX, "roots": {"sim": ["intel"]}}, "stand-in"),
        ({"sgx": SGX, "roots": {"dcap": ["ab"]}}, "fingerprints"),
    ],
)
def test_what_is_wrong_is_named(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        policy_file.from_mapping(tables, REPORT_DATA)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    for content in (b"[sgx", b"\xff\xfe", b"#" * (2**20 + 1)):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match="policy"):
            policy_file.read(path, REPORT_DATA)
    with pytest.raises(SettingsError, match="Cannot read"):
        policy_file.read(tmp_path / "none", REPORT_DATA)
