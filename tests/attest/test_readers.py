"""The readers of kernel and Gramine interfaces, unmodified, against stand-ins mounted through FUSE."""

import errno
import struct
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from attest import fuse_stands
from attest.amd import REPORT, Amd, snp_policy
from attest.forge import ENCLAVE, REPORT_DATA, TD, Forge, strict
from cloister.attest import certificate_table
from cloister.attest.configfs import ConfigfsAttester
from cloister.attest.dcap_pki import sign_quote
from cloister.attest.evidence import Attester, Kind
from cloister.attest.gramine import GramineAttester
from cloister.attest.sev_guest import SevGuestAttester
from cloister.attest.sources import collateral_file, find_attester
from cloister.errors import AttesterError


@pytest.fixture(autouse=True)
def fuse_present() -> None:
    fuse_stands.require_fuse()


@pytest.fixture(scope="module")
def amd() -> Amd:
    return Amd.new()


def statements(forge: Forge, tdx: bool) -> Callable[[], bytes]:
    evidence = forge.evidence(TD if tdx else ENCLAVE)
    return lambda: evidence.collateral


def td_quotes(forge: Forge, padding: int = 70) -> fuse_stands.MakeReport:
    return lambda data: sign_quote(forge.authority, replace(TD, report_data=data)) + bytes(padding)


def snp_reports(amd: Amd) -> fuse_stands.MakeReport:
    return lambda data: amd.sign(replace(REPORT, report_data=data))


def table(amd: Amd, little_endian: bool = False, *missing: str) -> bytes:
    """Returns a host's certificate table."""
    names = {
        "vcek": ("63da758d-e664-4564-adc5-f4b93be8accd", amd.vcek()),
        "ask": ("4ab7b379-bbac-4fe4-a02f-05aef327c782", amd.ask),
        "ark": ("c0b406a4-a803-4952-9743-3fb6014cd0ae", amd.ark),
    }
    chosen = [value for name, value in names.items() if name not in missing]
    head, body, offset = b"", b"", 24 * (len(chosen) + 1)
    for text, certificate in chosen:
        der, name = certificate.public_bytes(Encoding.DER), uuid.UUID(text)
        head += (name.bytes_le if little_endian else name.bytes) + struct.pack("<II", offset + len(body), len(der))
        body += der
    return head + bytes(24) + body


def test_a_td_quote_goes_from_configfs_to_a_verdict(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.configfs(td_quotes(forge))
    with fuse_stands.mounted(stand, tmp_path / "report") as reports:
        attester = ConfigfsAttester(statements(forge, tdx=True), reports=reports)
        assert isinstance(attester, Attester)
        assert attester.kind is Kind.TDX
        for data in (REPORT_DATA, bytes(64)):
            assert forge.verify(attester.evidence(data), strict().expecting(data)).require().report_data == data
    assert stand.entries == {}


@pytest.mark.parametrize("little_endian", [False, True])
def test_a_snp_report_goes_from_configfs_to_a_verdict(amd: Amd, tmp_path: Path, little_endian: bool) -> None:
    stand = fuse_stands.configfs(snp_reports(amd), "sev_guest", table(amd, little_endian) + bytes(4096))
    with fuse_stands.mounted(stand, tmp_path / "report") as reports:
        evidence = ConfigfsAttester(reports=reports).evidence(REPORT_DATA)
    assert amd.verify(evidence).require().report_data == REPORT_DATA


@pytest.mark.parametrize("auxiliary", [None, b"", bytes(4096)])
def test_a_host_without_certificates_needs_them_from_files(amd: Amd, tmp_path: Path, auxiliary: bytes | None) -> None:
    stand = fuse_stands.configfs(snp_reports(amd), "sev_guest", auxiliary)
    with fuse_stands.mounted(stand, tmp_path / "report") as reports:
        with pytest.raises(AttesterError, match="key server"):
            ConfigfsAttester(reports=reports).evidence(REPORT_DATA)
        evidence = ConfigfsAttester(certificates=amd.evidence().certificates, reports=reports).evidence(REPORT_DATA)
    assert amd.verify(evidence).require().kind is Kind.SNP


def test_somebody_elses_write_is_noticed_and_asked_again(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.configfs(td_quotes(forge), racers=2)
    with fuse_stands.mounted(stand, tmp_path / "report") as reports:
        evidence = ConfigfsAttester(statements(forge, tdx=True), reports=reports).evidence(REPORT_DATA)
    assert stand.made == 3
    assert forge.verify(evidence).require().report_data == REPORT_DATA


def test_an_endless_race_is_given_up(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.configfs(td_quotes(forge), racers=1000)
    with (
        fuse_stands.mounted(stand, tmp_path / "report") as reports,
        pytest.raises(AttesterError, match="Another program"),
    ):
        ConfigfsAttester(statements(forge, tdx=True), reports=reports).evidence(REPORT_DATA)
    assert stand.entries == {}


@pytest.mark.parametrize(
    ("code", "text"), [(errno.EFBIG, "longer"), (errno.ETIMEDOUT, "does not answer"), (errno.EIO, "Input/output")]
)
def test_the_kernels_errors_are_explained(forge: Forge, tmp_path: Path, code: int, text: str) -> None:
    stand = fuse_stands.configfs(td_quotes(forge), fail=code)
    with fuse_stands.mounted(stand, tmp_path / "report") as reports, pytest.raises(AttesterError, match=text):
        ConfigfsAttester(statements(forge, tdx=True), reports=reports).evidence(REPORT_DATA)
    assert stand.entries == {}


def test_an_unknown_provider_or_an_endless_report_is_refused(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.configfs(td_quotes(forge), "arm_cca_guest")
    with fuse_stands.mounted(stand, tmp_path / "one") as reports, pytest.raises(AttesterError, match="arm_cca"):
        ConfigfsAttester(reports=reports).evidence(REPORT_DATA)
    stand = fuse_stands.configfs(td_quotes(forge, padding=2**17))
    with fuse_stands.mounted(stand, tmp_path / "two") as reports, pytest.raises(AttesterError, match="longer than"):
        ConfigfsAttester(reports=reports).evidence(REPORT_DATA)


def test_many_threads_each_get_their_own_report(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.configfs(td_quotes(forge))
    with fuse_stands.mounted(stand, tmp_path / "report") as reports:
        attester = ConfigfsAttester(statements(forge, tdx=True), reports=reports)
        wanted = [bytes([n]) * 64 for n in range(12)]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(attester.evidence, wanted))
    for data, evidence in zip(wanted, found, strict=True):
        assert forge.verify(evidence, strict().expecting(data)).require().report_data == data


def test_an_sgx_quote_goes_from_gramine_to_a_verdict(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.gramine(lambda data: sign_quote(forge.authority, replace(ENCLAVE, report_data=data)))
    with fuse_stands.mounted(stand, tmp_path / "attestation") as device:
        attester = GramineAttester(statements(forge, tdx=False), device)
        assert isinstance(attester, Attester)
        wanted = [bytes([n]) * 64 for n in range(12)]
        with ThreadPoolExecutor(6) as pool:  # the files are shared by all threads
            found = list(pool.map(attester.evidence, wanted))
    for data, evidence in zip(wanted, found, strict=True):
        assert forge.verify(evidence, strict().expecting(data)).require().report_data == data


def test_gramine_without_attestation_says_what_to_set(forge: Forge, tmp_path: Path) -> None:
    stand = fuse_stands.gramine(lambda data: b"", kind=b"none")
    with fuse_stands.mounted(stand, tmp_path / "attestation") as device, pytest.raises(AttesterError, match="manifest"):
        GramineAttester(bytes, device).evidence(REPORT_DATA)
    with pytest.raises(AttesterError, match="gramine-sgx"):
        GramineAttester(bytes, tmp_path / "nowhere").evidence(REPORT_DATA)
    with pytest.raises(ValueError, match="64 bytes"):
        GramineAttester(bytes, tmp_path / "nowhere").evidence(bytes(32))


@pytest.mark.parametrize("needs", [0, 6 * 4096])
def test_a_snp_report_goes_from_the_ioctl_to_a_verdict(amd: Amd, tmp_path: Path, needs: int) -> None:
    stand = fuse_stands.sev_guest(snp_reports(amd), table(amd), needs=needs)
    with fuse_stands.mounted(stand, tmp_path / "dev") as folder:
        attester = SevGuestAttester(device=folder / "sev-guest")
        assert isinstance(attester, Attester)
        evidence = attester.evidence(REPORT_DATA)
    assert amd.verify(evidence).require().report_data == REPORT_DATA


def test_a_refusing_firmware_and_an_absent_device_are_explained(amd: Amd, tmp_path: Path) -> None:
    stand = fuse_stands.sev_guest(snp_reports(amd), table(amd), status=0x16)
    with fuse_stands.mounted(stand, tmp_path / "dev") as folder, pytest.raises(AttesterError, match="0x16"):
        SevGuestAttester(device=folder / "sev-guest").evidence(REPORT_DATA)
    stand = fuse_stands.sev_guest(snp_reports(amd), table(amd), needs=2**30)
    with fuse_stands.mounted(stand, tmp_path / "dev2") as folder, pytest.raises(AttesterError, match="gave no report"):
        SevGuestAttester(device=folder / "sev-guest").evidence(REPORT_DATA)
    with pytest.raises(AttesterError, match="cannot be opened"):
        SevGuestAttester(device=tmp_path / "none").evidence(REPORT_DATA)


def test_hardware_is_found_and_never_replaced_by_the_stand_in(forge: Forge, amd: Amd, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AttesterError, match="no trusted execution environment"):
        find_attester(bytes, host=empty)
    tdx = tmp_path / "tdx"
    (tdx / "dev").mkdir(parents=True)
    (tdx / "dev" / "tdx_guest").touch()
    with pytest.raises(AttesterError, match=r"6\.7"):
        find_attester(bytes, host=tdx)
    vm = tmp_path / "vm"
    (vm / "sys/kernel/config/tsm").mkdir(parents=True)
    stand = fuse_stands.configfs(td_quotes(forge))
    with fuse_stands.mounted(stand, vm / "sys/kernel/config/tsm/report"):
        found = find_attester(statements(forge, tdx=True), host=vm)
        assert forge.verify(found.evidence(REPORT_DATA)).require().kind is Kind.TDX
    old = tmp_path / "old"
    old.mkdir()
    with fuse_stands.mounted(fuse_stands.sev_guest(snp_reports(amd), table(amd)), old / "dev"):
        found = find_attester(bytes, host=old)
        assert amd.verify(found.evidence(REPORT_DATA), snp_policy()).require().kind is Kind.SNP
    enclave = tmp_path / "enclave"
    (enclave / "dev").mkdir(parents=True)
    gramine = fuse_stands.gramine(lambda data: sign_quote(forge.authority, replace(ENCLAVE, report_data=data)))
    with fuse_stands.mounted(gramine, enclave / "dev/attestation"):
        found = find_attester(statements(forge, tdx=False), host=enclave)
        assert forge.verify(found.evidence(REPORT_DATA)).require().kind is Kind.SGX


def test_collateral_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "collateral.json"
    read = collateral_file(path)
    with pytest.raises(AttesterError, match="cannot be read"):
        read()
    for content in (b"old", b"new"):
        path.write_bytes(content)
        assert read() == content


def test_a_hostile_certificate_table_is_refused(amd: Amd) -> None:
    good = table(amd)
    for hostile in (
        good[:24],
        good[:16] + struct.pack("<II", 2**32 - 1, 2**32 - 1) + good[24:],
        b"\1" * 24 * 65,
    ):
        with pytest.raises(AttesterError):
            certificate_table.parse(hostile)
    with pytest.raises(AttesterError, match="key server"):
        certificate_table.chain_of(table(amd, False, "ask"), ())
