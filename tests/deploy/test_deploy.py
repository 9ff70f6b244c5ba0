"""The deployments: complete, parsed by the tools' own formats, without an insecure option, with commands that exist."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, StrictUndefined

from cloister.settings import from_toml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


class Gramine:
    libos = "/usr/lib/gramine/libsysdb.so"

    @staticmethod
    def runtimedir() -> str:
        return "/usr/lib/gramine/runtime/glibc"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """The manifest, rendered as gramine-manifest renders it."""
    template = (DEPLOY / "gramine" / "cloister.manifest.template").read_text()
    makefile = (DEPLOY / "gramine" / "Makefile").read_text()
    given = dict.fromkeys(re.findall(r"-D(\w+)=", makefile), "1")
    engine = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701 - TOML, not HTML
    text = engine.from_string(template).render(gramine=Gramine, **given)
    return tomllib.loads(text)


def test_the_enclave_is_attested_not_debuggable_and_grows_on_demand(manifest: dict[str, Any]) -> None:
    sgx = manifest["sgx"]
    assert sgx["remote_attestation"] == "dcap"
    assert sgx["debug"] is False
    assert sgx["edmm_enable"] is True


def test_nothing_insecure_is_allowed(manifest: dict[str, Any]) -> None:
    def keys(table: dict[str, Any]) -> set[str]:
        inner = (keys(value) for value in table.values() if isinstance(value, dict))
        return set(table).union(*inner)

    assert not [key for key in keys(manifest) if key.startswith("insecure") or "allowed" in key]
    assert "file_check_policy" not in manifest["sgx"]
    assert all(
        "=" not in str(value) and "passthrough" not in str(value) for value in manifest["loader"]["env"].values()
    )
    assert isinstance(manifest["loader"]["argv"], list)


def test_what_is_executed_is_trusted_or_made_inside(manifest: dict[str, Any]) -> None:
    trusted = {uri.rstrip("/") for uri in manifest["sgx"]["trusted_files"]}
    for mount in manifest["fs"]["mounts"]:
        if mount["path"] not in ("/model", "/collateral.json"):
            assert mount.get("type") == "tmpfs" or mount["uri"].rstrip("/") in trusted, mount
    written = manifest["loader"]["env"]["NUMBA_CACHE_DIR"]
    assert any(mount.get("type") == "tmpfs" and written.startswith(mount["path"]) for mount in manifest["fs"]["mounts"])


def test_its_settings_are_read(manifest: dict[str, Any]) -> None:
    assert from_toml(DEPLOY / "gramine" / "settings.toml").blinding.checks == 1


@pytest.mark.parametrize("name", ["cloister-tsm.service", "cloister-enclave.service"])
def test_units_are_valid(name: str, tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in (DEPLOY / "vm").glob("*.service"):
        text = unit.read_text().replace("/opt/cloister/.venv/bin/python", sys.executable)
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        [tool, "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "cloister" in line]
    assert complaints == []


def test_units_give_up_what_they_do_not_need() -> None:
    enclave = (DEPLOY / "vm" / "cloister-enclave.service").read_text()
    helper = (DEPLOY / "vm" / "cloister-tsm.service").read_text()
    for line in (
        "User=cloister",
        "CapabilityBoundingSet=\n",
        "NoNewPrivileges=yes",
        "LimitCORE=0",
        "ProtectSystem=strict",
    ):
        assert line in enclave
    assert "PrivateNetwork=yes" in helper
    variables = set(re.findall(r"\$\{(\w+)\}", enclave + helper))
    given = {line.split("=")[0] for line in (DEPLOY / "vm" / "enclave.env").read_text().splitlines() if "=" in line}
    assert variables <= given


@pytest.mark.parametrize("name", ["docker/compose.yml", "dstack/docker-compose.yml"])
def test_containers_are_confined(name: str) -> None:
    services = yaml.safe_load((DEPLOY / name).read_text())["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
    accelerator = services.get("accelerator")
    if accelerator is not None:
        assert "volumes" not in accelerator
        assert accelerator["networks"] == ["products"]


def compose() -> list[str]:
    """The compose command of this machine, whichever it has."""
    for words in (["docker", "compose"], ["docker-compose"]):
        tool = shutil.which(words[0])
        if (
            tool is not None
            and subprocess.run([tool, *words[1:], "version"], capture_output=True, check=False).returncode == 0
        ):
            return [tool, *words[1:]]
    pytest.skip("compose is not installed (Debian: apt install docker-compose)")


@pytest.mark.parametrize("name", ["docker/compose.yml", "dstack/docker-compose.yml"])
def test_compose_reads_its_files(name: str) -> None:
    given = {
        "CLOISTER_IMAGE": "registry/cloister@sha256:" + "0" * 64,
        "BROKER": "broker:1",
        "ACCELERATOR": "accelerator:1",
    }
    command = [*compose(), "-f", str(DEPLOY / name), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **given})
    assert done.returncode == 0, done.stderr


def commands() -> list[list[str]]:
    """Every command line of every deployment, from the word after `cloister` on."""
    found = []
    for name in ("docker/compose.yml", "dstack/docker-compose.yml"):
        services = yaml.safe_load((DEPLOY / name).read_text())["services"].values()
        found += [list(map(str, service["command"])) for service in services if "entrypoint" not in service]
    for unit in ("cloister-enclave.service",):
        line = re.search(r"-m cloister (.*)", (DEPLOY / "vm" / unit).read_text())
        assert line is not None
        found.append(line[1].split())
    return found


def test_every_command_and_option_exists(manifest: dict[str, Any]) -> None:
    import typer

    from cloister.cli.main import app

    root: Any = typer.main.get_command(app)
    argv = manifest["loader"]["argv"]
    for words in [*commands(), argv[argv.index("cloister") + 1 :]]:
        command = root.commands[words[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_the_image_runs_as_a_user_with_pinned_packages() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert "--require-hashes -r /src/requirements/run.lock" in text
    assert text.rindex("USER cloister") > text.rindex("FROM")
    assert '"-I"' in text
