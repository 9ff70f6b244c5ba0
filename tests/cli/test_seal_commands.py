"""`cloister seal` and `cloister broker`, as a person or a script uses them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.assets import demo_model

DEMO = str(demo_model())


class Owner:
    """An owner with a home of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "XDG_DATA_HOME": str(self.home), "COLUMNS": "200"}
        command = [sys.executable, "-m", "cloister", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "home")


def test_from_sealing_to_revoking(owner: Owner, tmp_path: Path) -> None:
    package = str(tmp_path / "package")
    sealed = owner.run("seal", DEMO, "--out", package, "--name", "demo", "--json")
    assert sealed.returncode == 0, sealed.stderr
    record = json.loads(sealed.stdout)
    assert record["version"] == 1
    assert record["private_tensors"] == record["tensors"] > 0
    checked = json.loads(owner.run("seal", package, "--check", "--json").stdout)
    assert checked["root"] == record["root"]
    again = json.loads(owner.run("seal", DEMO, "--out", f"{package}-2", "--name", "demo", "--json").stdout)
    assert (again["version"], again["signer"]) == (2, record["signer"])

    assert owner.run("broker", "allow", "demo").returncode == 1
    allowed = owner.run("broker", "allow", "demo", "--stand-in", "--min-version", "2", "--uses", "3")
    assert "no TEE" in allowed.stderr
    listed = json.loads(owner.run("broker", "list", "--json").stdout)
    assert [model["version"] for model in listed["models"]] == [2, 1]
    assert listed["grants"][0]["uses"] == 3
    assert owner.run("broker", "revoke", "1").returncode == 0
    lines = [json.loads(line) for line in owner.run("broker", "log", "--json").stdout.splitlines()]
    assert [line["event"] for line in lines] == ["deposit", "deposit", "allow", "revoke"]
    head = f"3:{lines[2]['hash']}"
    assert owner.run("broker", "log", "--head", head).returncode == 0
    cut = owner.run("broker", "log", "--head", f"9:{lines[2]['hash']}")
    assert cut.returncode == 1
    assert "does not continue" in cut.stderr


def test_errors_say_what_to_do(owner: Owner, tmp_path: Path) -> None:
    missing = owner.run("broker", "list")
    assert missing.returncode == 1
    assert "cloister broker init" in missing.stderr
    assert "--out" in owner.run("seal", DEMO).stderr
    policy = tmp_path / "policy.toml"
    policy.write_text("[sgx]\nmrenclave = []\n")
    assert owner.run("broker", "init").returncode == 0
    refused = owner.run("broker", "allow", "demo", "--policy", str(policy))
    assert refused.returncode == 1
    assert json.loads(owner.run("broker", "list", "--json").stdout)["grants"] == []
