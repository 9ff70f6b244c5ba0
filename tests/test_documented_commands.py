"""Every command that documentation, deployments, examples and our own error messages name exists, with its options."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from cloister.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "deploy/**/*.md") for path in ROOT.glob(pattern))
DEPLOYMENTS = sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file() and path.suffix != ".md")
SCRIPTS = sorted([ROOT / "Makefile", *ROOT.glob("scripts/*.sh"), *ROOT.glob("examples/**/*.py"), *ROOT.glob(".ci/*")])
SOURCES = sorted((ROOT / "src").rglob("*.py"))

COMMAND = re.compile(r"(?:(?<![\w./-])cloister|compose run --rm \w+) +([a-z-][^`\n|;#&]*)")
CODE = re.compile(r"```.*?```|(?<=\n\n)(?:    .*\n)+|`[^`\n]+`", re.DOTALL)
MARKUP = re.compile(r"\[/?(?:bold|dim|red|green|yellow|cyan)\]")


def commands_in(text: str) -> Iterator[list[str]]:
    """Yields the words after `cloister` of every command in a text."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for found in COMMAND.finditer(joined):
        yield [word.strip("\"'`.,:()[]{}") for word in found[1].split()]


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def wrong(words: list[str]) -> str:
    """Returns what of a command does not exist, or nothing."""
    command = root_command()
    options = {"--help", *_options(command)}
    named = 0
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            if name not in options:
                return f"{command.name} has no {name}"
        elif hasattr(command, "commands") and word in command.commands:
            command = command.commands[word]
            options |= _options(command)
            named += 1
        elif hasattr(command, "commands") and not named and re.fullmatch("[a-z-]+", word):
            return f"no command {word}"
    return ""


def _options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def without_the_sentence(words: list[str]) -> list[str]:
    """Returns a command of a message without the words that follow it: they are neither options nor their values."""
    for at, word in enumerate(words[2:], 2):
        if word.islower() and not word.startswith("--") and not words[at - 1].startswith("--"):
            return words[:at]
    return words


def texts_of(source: Path) -> str:
    """Returns the strings of a Python file that are not documentation, a line each; what is put in is a word."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_documentation_exist(page: Path) -> None:
    code = "\n".join(CODE.findall(page.read_text()))
    assert [found for words in commands_in(code) if (found := wrong(words))] == []


@pytest.mark.parametrize("file", [*DEPLOYMENTS, *SCRIPTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_in_deployments_and_scripts_exist(file: Path) -> None:
    assert [found for words in commands_in(file.read_text()) if (found := wrong(words))] == []


def test_commands_in_our_messages_exist() -> None:
    problems = [
        f"{source.relative_to(ROOT)}: {found} in {' '.join(words[:8])}"
        for source in SOURCES
        for words in commands_in(MARKUP.sub("", texts_of(source)))
        if (found := wrong(without_the_sentence(words)))
    ]
    assert problems == []


def test_what_does_not_exist_is_seen() -> None:
    assert wrong(["chat", "MODEL", "--no-such-option"]) == "chat has no --no-such-option"
    assert wrong(["chatt", "MODEL"]) == "no command chatt"
    assert wrong(["seal", "MODEL", "--out", "PACKAGE"]) == ""
    assert [words[:2] for words in commands_in("docker compose run --rm broker broker allow demo; cloister demo\n")] == [
        ["broker", "allow"], ["demo"],
    ]  # fmt: skip


def all_commands(command: Any) -> Iterator[Any]:
    children = getattr(command, "commands", {})
    yield from [command] if not children else (found for child in children.values() for found in all_commands(child))


def test_long_lists_of_options_have_headings() -> None:
    for command in all_commands(root_command()):
        unnamed = [option for option in command.params if not getattr(option, "rich_help_panel", None)]
        assert len(unnamed) <= 14, f"{command.name} has {len(unnamed)} options under no heading"


def test_paragraphs_of_help_are_broken_by_the_terminal() -> None:
    for command in all_commands(root_command()):
        assert [part for part in command.help.split("\n\n") if "\n" in part] == [], command.name
