"""`cloister slice`, and adapters on the command line: from a fine-tune to an answer, as a person does it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cloister.assets import demo_model
from cloister.model.checkpoint import expected_tensors
from cloister.model.directory import open_model
from tests.cli.test_commands import DEMO, run

PROMPT = ["-p", "Once upon a time", "-n", "30", "-t", "0", "--weights", "int8x2", "--json"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, each linear changed by a matrix of rank 2, the last norm as well."""
    directory, rng = tmp_path_factory.mktemp("models") / "tuned", np.random.default_rng(3)
    shutil.copytree(demo_model(), directory)
    model, tensors = open_model(demo_model()), {}
    for name in expected_tensors(model.spec):
        values = model.checkpoint.tensor(name)
        if name.endswith("_proj.weight"):
            left, right = (rng.standard_normal(shape) for shape in ((values.shape[0], 2), (2, values.shape[1])))
            values = (values + 0.03 * left @ right).astype(np.float32)
        tensors[name] = values * np.float32(1.5) if name == "model.norm.weight" else values
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def slices(tuned: Path) -> Path:
    out = tuned.parent / "slices"
    done = run("slice", DEMO, str(tuned), "--out", str(out), "--rank", "2", "--windows", "1")
    assert "KL to the fine-tune" in done.stdout
    assert "--adapter" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    return out


def test_help_says_when_to_slice() -> None:
    out = run("slice", "--help").stdout
    assert "fine-tune" in out
    assert "--energy" in out


def test_the_report_lies_beside_the_slices(slices: Path) -> None:
    report = json.loads((slices / "slice_report.json").read_text())
    assert report["criterion"] == {"rank": 2}
    assert len(report["layers"]) == 28
    assert all(layer["rank"] == 2 and layer["relative_error"] < 1e-6 for layer in report["layers"])
    assert list(report["whole"]) == ["model.norm.weight"]
    loss = report["divergence"]
    assert loss["kl_nats"] < 1e-9 < 1e-3 < loss["kl_base_nats"]
    assert report["bytes"]["slices"] < report["bytes"]["finetuned"] / 10
    assert not [path for path in slices.parent.iterdir() if path.name.startswith(".")]


def test_blinded_slices_answer_as_the_fine_tune_does(slices: Path, tuned: Path) -> None:
    expected = json.loads(run("generate", str(tuned), *PROMPT).stdout)
    ours = json.loads(run("generate", DEMO, "--adapter", f"mine={slices}", *PROMPT).stdout)
    assert ours["token_ids"] == expected["token_ids"]
    assert ours["meter"]["products"] == expected["meter"]["products"], "the same products are lent"
    base = json.loads(run("generate", DEMO, "--adapter", f"mine={slices}", "--use", "base", *PROMPT).stdout)
    assert base["token_ids"] != expected["token_ids"]


def test_a_chat_switches_between_adapters(slices: Path) -> None:
    lines = "/adapter\nTell me a story about a cat.\n/adapter base\nAnother.\n/adapter nobody\n/adapter mine\nAnd one more.\n"
    done = run("chat", DEMO, "--adapter", f"mine={slices}", "-n", "10", "--seed", "2", stdin=lines)
    assert "* mine: 28 products of rank 2" in done.stderr
    assert "* base" in done.stderr
    assert "no adapter 'nobody'" in done.stderr
    assert len(done.stdout.strip().splitlines()) == 3


def test_slices_as_json_replaced_only_on_request(slices: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "slices"
    shutil.copytree(slices, out)
    command = ["slice", DEMO, str(tuned), "--out", str(out), "--energy", "0.4", "--windows", "0", "--json"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--force" in run(*command, code=1).stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    report = json.loads(run(*command, "--force").stdout)
    assert report["divergence"] is None
    assert {layer["rank"] for layer in report["layers"]} == {1}
    assert json.loads((out / "slice_report.json").read_text()) == report


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--rank", "2", "--energy", "0.5"], "not both"),
        (["--energy", "2"], "energy is 2"),
        (["--text", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    arguments: list[str], match: str, tuned: Path, tmp_path: Path
) -> None:
    done = run("slice", DEMO, str(tuned), "--out", str(tmp_path / "out"), *arguments, code=1)
    assert match in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--adapter", "mine"], "NAME=FOLDER"),
        (["--adapter", "a=/x", "--adapter", "a=/y"], "two adapters"),
        (["--adapter", "a=/x", "--use", "b"], "Given: a"),
        (["--adapter", "a=/nowhere"], "not a directory"),
    ],
)
def test_bad_adapter_options_are_named(arguments: list[str], match: str) -> None:
    assert match in run("generate", DEMO, "-p", "x", *arguments, code=1).stderr
