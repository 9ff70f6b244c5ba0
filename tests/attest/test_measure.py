"""Measurement: changing one byte of anything that is listed changes the digest, and nothing else does."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

import cloister
from cloister.attest.measure import Measurement, Part, Subject, measure, required_distributions, this_program
from cloister.errors import AttesterError
from cloister.settings import PlanSettings, Settings


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A small program with every part."""
    for name, content in {
        "package/__init__.py": "x = 1",
        "package/sub/module.py": "y = 2",
        "package/__pycache__/module.cpython-311.pyc": "cached",
        "lib/os.py": "import sys",
        "lib/site-packages/other.py": "not ours",
        "model/config.json": "{}",
        "model/model.safetensors": "weights",
        "tax/adapter_model.safetensors": "low rank",
        "python": "executable",
        "run.lock": "numpy==2.0",
        "plan.toml": "policy = 'all'",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Subject(
        package=tmp_path / "package",
        dependencies=("jinja2",),
        lock=tmp_path / "run.lock",
        interpreter=tmp_path / "python",
        library=tmp_path / "lib",
        plan=tmp_path / "plan.toml",
        model=tmp_path / "model",
        settings=Settings(),
        adapters=(("tax", tmp_path / "tax"),),
    )


def test_every_part_is_listed_with_its_hash(subject: Subject, tmp_path: Path) -> None:
    found = measure(subject)
    assert {item.part for item in found.items} == set(Part)
    listed = {item.name: item.sha256 for item in found.items}
    assert listed["sub/module.py"] == hashlib.sha256(b"y = 2").hexdigest()
    assert listed["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert any(name.startswith("jinja2/jinja2/") for name in listed)
    assert not any("pycache" in name or "other.py" in name for name in listed)
    assert measure(subject) == found
    assert len(found.digest) == 32


FILES = "package/__init__.py package/sub/module.py lib/os.py model/config.json model/model.safetensors python run.lock"


@pytest.mark.parametrize("name", [*FILES.split(), "plan.toml", "tax/adapter_model.safetensors"])
def test_one_changed_bit_of_any_file_changes_the_digest(subject: Subject, tmp_path: Path, name: str) -> None:
    before = measure(subject).digest
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 0x01
    (tmp_path / name).write_bytes(content)
    assert measure(subject).digest != before
    content[-1] ^= 0x01
    (tmp_path / name).write_bytes(content)
    assert measure(subject).digest == before


def test_a_file_more_less_moved_or_renamed_changes_the_digest(subject: Subject, tmp_path: Path) -> None:
    seen = {measure(subject).digest}

    def changed(change: Callable[[], object]) -> None:
        change()
        digest = measure(subject).digest
        assert digest not in seen
        seen.add(digest)

    package = tmp_path / "package"
    changed(lambda: (package / "new.py").write_text(""))
    changed(lambda: (package / "new.py").rename(package / "newer.py"))
    changed(lambda: (package / "newer.py").rename(tmp_path / "model" / "newer.py"))
    changed(lambda: (tmp_path / "model" / "newer.py").write_text("x"))
    subject = dataclasses.replace(subject, adapters=(("law", tmp_path / "tax"),))
    changed(lambda: None)


def test_one_changed_byte_of_a_dependency_changes_the_digest(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Path(__import__("jinja2").__file__).parent
    copy = tmp_path / "site"
    shutil.copytree(source, copy / "jinja2")
    (information,) = source.parent.glob("jinja2-*.dist-info")
    shutil.copytree(information, copy / information.name)
    monkeypatch.syspath_prepend(str(copy))
    before = measure(subject).digest
    victim = copy / "jinja2" / "sandbox.py"
    victim.write_bytes(victim.read_bytes() + b"#")
    assert measure(subject).digest != before


def another(value: Any) -> Any:
    """Returns another allowed value of a setting."""
    if isinstance(value, StrEnum):
        return next(member for member in type(value) if member is not value)
    changes: dict[type, Callable[[Any], Any]] = {
        bool: lambda old: not old,
        int: lambda old: old + 1,
        float: lambda old: old / 2 or 1.0,
        str: lambda old: old + "x",
        tuple: lambda old: (*old, "host:1"),
    }
    return changes[type(value)](value)


def test_every_setting_changes_the_digest(subject: Subject) -> None:
    """Each field of each settings record, changed alone."""
    subject = dataclasses.replace(subject, dependencies=())
    seen = {measure(subject).digest}
    count = 1
    for field in dataclasses.fields(Settings):
        record = getattr(subject.settings, field.name)
        for inner in dataclasses.fields(record):
            changed = dataclasses.replace(record, **{inner.name: another(getattr(record, inner.name))})
            settings = dataclasses.replace(subject.settings, **{field.name: changed})
            seen.add(measure(dataclasses.replace(subject, settings=settings)).digest)
            count += 1
    assert len(seen) == count > 15


def test_the_rules_that_the_settings_name_are_measured_wherever_they_lie(tmp_path: Path) -> None:
    digests = []
    for folder, content in (("a", "x"), ("b", "x"), ("b", "y")):
        rules = tmp_path / folder / "rules.toml"
        rules.parent.mkdir(exist_ok=True)
        rules.write_text(content)
        settings = dataclasses.replace(Settings(), plan=PlanSettings(rules=str(rules)))
        narrow = dataclasses.replace(this_program(settings), dependencies=(), library=None)
        digests.append(measure(narrow).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_sealed_models_root_stands_for_the_model(subject: Subject) -> None:
    digests = {
        measure(dataclasses.replace(subject, model=model)).digest for model in (bytes(32), b"\1" + bytes(31), None)
    }
    assert len(digests) == 3


def test_what_is_absent_is_listed_as_absent(subject: Subject) -> None:
    found = measure(dataclasses.replace(subject, lock=None, plan=None, model=None))
    assert [item.name for item in found.items if item.part in (Part.LOCK, Part.PLAN, Part.MODEL)] == ["(none)"] * 3
    assert found.digest != measure(subject).digest


def test_what_cannot_be_read_is_an_error_and_not_left_out(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(AttesterError, match="not a folder"):
        measure(dataclasses.replace(subject, package=tmp_path / "nowhere"))
    with pytest.raises(AttesterError, match="cannot be measured"):
        measure(dataclasses.replace(subject, plan=tmp_path / "nowhere"))
    (tmp_path / "package" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AttesterError, match="dangling"):
        measure(subject)


def test_links_to_folders_are_followed_once(subject: Subject, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "code.py").write_text("z = 3")
    (tmp_path / "package" / "linked").symlink_to(outside)
    (tmp_path / "package" / "sub" / "up").symlink_to(tmp_path / "package")
    names = [item.name for item in measure(subject).part(Part.PACKAGE)]
    assert "linked/code.py" in names
    assert len(names) == 3


def test_a_pipe_is_not_measured(subject: Subject, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(AttesterError, match="plain file"):
        measure(dataclasses.replace(subject, plan=fifo))


def test_this_program_measures_itself() -> None:
    subject = this_program(Settings())
    package = Path(cloister.__file__).parent
    assert subject.package == package
    assert "numpy" in subject.dependencies
    assert "torch" not in subject.dependencies
    narrow = dataclasses.replace(subject, dependencies=(), library=None)
    items = {item.name: item for item in measure(narrow).part(Part.PACKAGE)}
    assert items["attest/measure.py"].sha256 == hashlib.sha256((package / "attest/measure.py").read_bytes()).hexdigest()


def test_requirements_are_followed_without_extras() -> None:
    found = required_distributions("jinja2")
    assert found == ("markupsafe",)


def test_the_digest_of_a_list_is_fixed() -> None:
    assert Measurement(()).digest == hashlib.sha256(b"cloister/measurement/1").digest()
