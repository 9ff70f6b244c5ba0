"""What may stand for MODEL on the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.assets import demo_model


def run(*arguments: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cloister", *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def test_demo_is_the_shipped_model_unless_a_folder_has_this_name(tmp_path: Path) -> None:
    shipped = json.loads(run("inspect", "demo", "--json", folder=tmp_path).stdout)
    assert shipped["model"] == "demo"
    shutil.copytree(demo_model(), tmp_path / "demo")
    config = tmp_path / "demo" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 77}))
    assert json.loads(run("inspect", "demo", "--json", folder=tmp_path).stdout)["max_context"] == 77
    assert shipped["max_context"] != 77


@pytest.mark.parametrize("command", ["chat", "inspect", "measure"])
def test_the_name_of_a_model_on_a_hub_is_not_a_folder(command: str, tmp_path: Path) -> None:
    done = run(command, "meta-llama/Llama-3.2-1B", folder=tmp_path, code=1)
    assert "nothing is downloaded here" in done.stderr
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in done.stderr


def test_no_file_is_written_into_the_program(tmp_path: Path) -> None:
    before = sorted(path.name for path in demo_model().iterdir())
    assert "Give --out FILE" in run("candidates", "build", "demo", folder=tmp_path, code=1).stderr
    assert sorted(path.name for path in demo_model().iterdir()) == before
