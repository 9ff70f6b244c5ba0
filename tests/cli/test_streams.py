"""The command line with standard streams as scripts leave them: closed, empty, full, cut, not UTF-8."""

import subprocess
import sys
from pathlib import Path

import pytest

import cloister
from cloister.assets import demo_model
from cloister.errors import RequestError

CLOISTER = f"{sys.executable} -m cloister"
DEMO = str(demo_model())
GENERATE = f"{CLOISTER} generate {DEMO} -n 3 -t 0"


def shell(command: str, code: int, stdin: bytes = b"") -> tuple[str, str]:
    """Returns what a command of bash wrote; a part of a pipe that fails is its exit code."""
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command], input=stdin, capture_output=True, timeout=120, check=False
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, err
    assert "Traceback" not in out + err
    assert "Exception ignored" not in err
    return out, err


@pytest.mark.parametrize("command", [GENERATE, f"{CLOISTER} chat {DEMO} -q"])
def test_input_that_is_not_utf8_is_named_and_never_sent(command: str) -> None:
    out, err = shell(command, 1, b"caf\xe9 and more\n")
    assert "not UTF-8" in err
    assert "iconv" in err
    assert out.strip() == ""


def test_a_prompt_in_another_encoding_is_refused() -> None:
    assert "UTF-8" in shell(GENERATE + " -p $'caf\\xe9'", 1)[1]


@pytest.mark.parametrize("given", [" <&-", " </dev/null"])
def test_an_empty_input_is_no_prompt(given: str) -> None:
    out, err = shell(GENERATE + given, 1)
    assert "standard input is empty" in err
    assert out == ""


def test_a_chat_without_input_ends() -> None:
    assert shell(f"{CLOISTER} chat {DEMO} -q <&-", 0)[0].strip() == ""


@pytest.mark.parametrize("command", [f"{CLOISTER} --version", f"{CLOISTER} inspect {DEMO} --json"])
def test_a_full_disk_is_an_error_and_one_line(command: str) -> None:
    err = shell(f"{command} > /dev/full", 1)[1]
    assert "error: No space left on device." in err
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize("command", [f"{CLOISTER} plan --list", f"{GENERATE} -q -p Once"])
def test_a_reader_that_has_left_is_no_error_to_report(command: str) -> None:
    assert shell(f"{command} | true", 1) == ("", "")


def test_closed_outputs_take_no_numbers_of_sockets() -> None:
    assert "tokens/s" in shell(f"{GENERATE} -p Once >&-", 0)[1]
    out, err = shell(f"{GENERATE} -p Once 2>&-", 0)
    assert "tokens/s" not in out
    assert err == ""


def test_what_an_output_cannot_spell_is_replaced() -> None:
    assert "\\u03b5 of one" in shell(f"PYTHONIOENCODING=ascii {CLOISTER} gateway -h", 0)[0]


def test_brackets_in_a_path_are_no_markup(tmp_path: Path) -> None:
    err = shell(f"{CLOISTER} generate '{tmp_path}/a[/b]' -p x", 1)[1]
    assert "a[/b]" in err


def test_an_error_of_the_system_has_a_traceback_on_request() -> None:
    done = subprocess.run(
        ["/bin/bash", "-c", f"{CLOISTER} --debug --version > /dev/full"], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_short_help_option() -> None:
    assert "--max-tokens" in shell(f"{CLOISTER} generate -h", 0)[0]


def test_requests_from_python_that_are_no_text_are_refused_before_they_are_sent() -> None:
    with cloister.load(demo_model()) as llm:
        with pytest.raises(RequestError, match="no character"):
            llm.generate("caf\udce9")
        with pytest.raises(RequestError, match="Expected `str`"):
            llm.chat([{"role": "user", "content": 5}])  # type: ignore[dict-item]
        assert llm.generate("", max_new_tokens=2, temperature=0.0).text, "an empty prompt that is given is one"
