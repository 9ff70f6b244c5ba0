"""What commands say when something is not as it should be: the cause, and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.assets import demo_model
from cloister.bench.record import Record
from cloister.cli.bench import _publish, _shape, _writable
from cloister.cli.receipts import tell
from cloister.errors import AttesterError, BrokerError, SealingKeyError, SettingsError
from cloister.local.broker_link import owner_folder, stand_in_file
from cloister.local.confined import write_policy
from cloister.privacy.candidate_file import check_place
from cloister.seal.signing import write_private
from cloister.seal.store import Store


def run(*arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cloister", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(("given", "folders"), [("7b", False), ("/nowhere", True), (str(demo_model()), False)])
def test_an_unknown_shape_is_refused_before_anything_is_measured(given: str, folders: bool) -> None:
    with pytest.raises(SettingsError, match="--shape"):
        _shape(given, folders=folders)


def test_known_shapes_are_taken() -> None:
    assert [_shape("demo"), _shape("1.1b"), _shape(str(demo_model()), folders=True)] == [
        "demo", "1.1b", str(demo_model()),
    ]  # fmt: skip


def test_serving_without_a_tee_names_the_option_of_the_stand_in() -> None:
    if any(Path(place).exists() for place in ("/dev/attestation", "/sys/kernel/config/tsm/report", "/dev/sev-guest")):
        pytest.skip("this machine has a TEE")
    assert "--stand-in" in run("serve", "demo", code=1).stderr


def test_nothing_but_the_answer_when_nobody_watches() -> None:
    done = run("measure", "--expect", "00" * 32, code=10)
    assert done.stderr.startswith("It is not the expected"), "no bar, no empty line"


def test_the_command_that_verifies_a_receipt_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    tell(Path("my answers/1.json"), "--policy p.toml")
    assert "cloister verify 'my answers/1.json' --request 'my answers/1.request'" in capsys.readouterr().err


def test_a_policy_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    write_policy(path, "one")
    write_policy(path, "one")  # the same command again
    with pytest.raises(SettingsError, match="names another enclave"):
        write_policy(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_half_of_a_picture(tmp_path: Path) -> None:
    small = tmp_path / "plan.svg"
    limit = f"ulimit -f 4; exec {sys.executable} -m cloister plan demo --no-calibrate --picture {small}"  # 4 kB a file
    done = subprocess.run(
        ["/bin/bash", "-c", f"trap '' XFSZ; {limit}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_in_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run("plan", "demo", "--no-calibrate", "--picture", str(tmp_path / "none" / "plan.svg"), code=1)
    assert "Cannot write" in done.stderr
    assert "another folder" in done.stderr


def test_control_c_while_the_program_is_loaded_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")  # as if it came at this very moment
    done = subprocess.run(
        [sys.executable, "-m", "cloister", "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_broker_names_the_models_that_it_knows(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", create=True) as store:
        store.deposit(bytes(32), "story", 1, bytes(32), "now")
        with pytest.raises(BrokerError, match="No model 'stroy'") as refused:
            store.allow("stroy", "", "now", min_version=1)
    assert "Known: story" in refused.value.remedy


def test_a_record_that_cannot_be_written_is_refused_before_it_is_measured_or_shown_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="No record can be written"):
        _writable(tmp_path / "file" / "records")
    assert _writable(tmp_path / "new" / "records") == tmp_path / "new" / "records"
    assert not (tmp_path / "new").exists()
    record = Record("speed", [{"variant": "plain", "tokens/s": 12.5}], {}, {})
    with pytest.raises(SettingsError, match="shown above"):
        _publish(record, tmp_path / "file")
    assert "12.5" in capsys.readouterr().out


def test_half_a_record_is_not_left(tmp_path: Path) -> None:
    record = Record("speed", [{"variant": {1j}}], {}, {})  # what JSON cannot hold
    with pytest.raises(TypeError):
        record.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_before_and_not_after_minutes_of_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "candidates"):
        done = run("candidates", "build", "demo", "--out", str(place), code=1)
        assert f"Cannot write {place}" in done.stderr
        assert "embeddings" not in done.stderr
    check_place(tmp_path / "new" / "candidates")
    check_place(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_keys_that_cannot_be_kept_name_what_moves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    for refused, kind in (
        (lambda: write_private(owner_folder() / "key", b"x"), SealingKeyError),
        (stand_in_file, AttesterError),
    ):
        with pytest.raises(kind) as raised:
            refused()
        assert "XDG_DATA_HOME" in raised.value.remedy


def test_both_models_of_a_slice_may_be_the_shipped_one(tmp_path: Path) -> None:
    done = run("slice", "demo", "demo", "--out", str(tmp_path / "slices"), "--windows", "0", code=1)
    assert "There is nothing to slice" in done.stderr
