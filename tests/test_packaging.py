"""What `pyproject.toml` declares is what the package imports, and what its messages tell people to install."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import cloister
from cloister.cli.missing import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")]
BROUGHT = {"regex": "gateway", "spacy": "gateway", "phonenumbers": "gateway"}
"""What Presidio brings with it, and we use only beside it."""


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=;~! ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def installed_by(extra: str) -> set[str]:
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        found.add(distribution(requirement))
        if inner := re.match(r"cloister\[([^\]]+)\]", requirement):
            found |= {name for one in inner[1].split(",") for name in installed_by(one.strip())}
    return found


def imported() -> dict[str, Path]:
    """Returns the first file that imports each package of somebody else."""
    found: dict[str, Path] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"cloister"}:
                found.setdefault(name, path)
    return found


def test_everything_imported_is_declared() -> None:
    always = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    homes = packages_distributions()
    for name, path in imported().items():
        distributions = {one.lower().replace("_", "-") for one in homes.get(name, [name])}
        extra = EXTRAS.get(name) or BROUGHT.get(name)
        assert distributions & always or extra, f"{path} imports {name}, which nothing installs"
        if extra and name not in BROUGHT:
            assert distributions & installed_by(extra), f"the extra {extra} does not install {name}"


def test_every_extra_that_is_named_exists_and_is_described() -> None:
    extras = PROJECT["optional-dependencies"].keys()
    for path in [*SOURCES, *PAGES]:
        named = re.findall(r"cloister\\{0,2}\[([a-z,]+)\\{0,2}\]['\"`. ]", path.read_text(encoding="utf-8"))
        assert {one for group in named for one in group.split(",")} <= extras, path
    described = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(extras)


def test_the_version_is_said_once() -> None:
    assert PROJECT["version"] == cloister.__version__
