"""The command line as a person and as a script use it."""

import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloister.assets import demo_model
from cloister.attest.sim import SimAttester
from cloister.cli import main, serve, split
from cloister.errors import EngineProtocolError, IsolationError
from cloister.settings import Settings

CLOISTER = [sys.executable, "-m", "cloister"]
DEMO = str(demo_model())


def run(*arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*CLOISTER, *arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return done


COMMANDS = ["chat", "generate", "inspect", "demo", "accelerator", "bench", "plan", "slice"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_teaches(command: list[str]) -> None:
    out = run(*command, "--help").stdout
    assert "Usage" in out
    assert len(out) > 300


@pytest.mark.parametrize(("module", "extra"), [("sklearn.linear_model", "bench"), ("torch", "accelerator")])
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        main.main()
    assert f"pip install 'cloister[{extra}]'" in capsys.readouterr().err


def test_a_module_of_ours_that_is_missing_is_a_fault_and_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'cloister.lost'", name="cloister.lost")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(ModuleNotFoundError):
        main.main()


def test_an_error_that_quotes_a_server_is_shown_as_it_is_and_steers_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise EngineProtocolError(
            "It serves x[/bold]y[red]\x1b]0;owned\x07\x9b2J.", remedy="pip install cloister[gateway]"
        )

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "It serves x[/bold]y[red]\ufffd]0;owned\ufffd\ufffd2J." in said
    assert "  pip install cloister[gateway]" in said


@pytest.mark.parametrize("refuses", [False, True])
def test_a_server_in_a_tee_is_hardened_before_it_opens_anything(
    refuses: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []

    def harden() -> None:
        steps.append("harden")
        if refuses:
            raise IsolationError("This process cannot be hardened: no such call.")

    def opened(*_: object, **__: object) -> None:
        steps.append("open")
        raise KeyboardInterrupt

    monkeypatch.setattr("cloister.isolation.hardening.harden", harden)
    monkeypatch.setattr("cloister.local.serve.EnclaveServer", opened)
    with pytest.raises(KeyboardInterrupt):
        serve._inside(Path(DEMO), "127.0.0.1:0", Settings(), lambda digest: SimAttester(None, digest), None, {})  # type: ignore[arg-type]
    assert steps == ["harden", "open"]
    assert ("cannot be hardened" in capsys.readouterr().err) == refuses


@pytest.mark.parametrize("terminal", [True, False])
def test_a_split_server_steers_no_terminal_by_the_tokens_that_it_names(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spent = SimpleNamespace(tokens=[])

    def generate(*_: object, **__: object) -> Iterator[int]:
        for token in b"a\t\x1b[2J\n":
            spent.tokens.append(token)
            yield token

    client, tokenizer = (
        SimpleNamespace(generate=generate),
        SimpleNamespace(decode=lambda tokens: bytes(tokens).decode()),
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    split._answer(client, tokenizer, [1], 9, spent, {}, False)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ("a\t\ufffd[2J\n\n" if terminal else "a\t\x1b[2J\n\n")


def test_generate_prints_the_text_and_nothing_else_when_quiet() -> None:
    done = run("generate", DEMO, "-p", "Once upon a time", "-n", "12", "-t", "0", "--quiet")
    assert done.stderr == ""
    assert len(done.stdout.split()) > 5
    assert "\x1b" not in done.stdout


def test_generate_as_json_has_everything_a_script_needs() -> None:
    record = json.loads(run("generate", DEMO, "-p", "Once upon a time", "-n", "12", "-t", "0", "--json").stdout)
    assert record["completion_tokens"] == 12
    assert len(record["token_ids"]) == 12
    assert record["reason"] == "length"
    assert record["meter"]["products"] > 0
    assert record["incidents"] == []


def test_a_prompt_can_be_piped_in_and_a_summary_goes_to_stderr() -> None:
    done = run("generate", DEMO, "-n", "8", "--seed", "1", stdin="Once upon a time")
    assert "tokens/s" in done.stderr
    assert "products checked" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "no colour when piped"


def test_errors_are_one_line_with_a_remedy_and_no_traceback(tmp_path: Path) -> None:
    done = run("generate", str(tmp_path), "-p", "x", code=1)
    assert "config.json" in done.stderr
    assert "Give the folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("--debug", "generate", str(tmp_path), "-p", "x", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "int4"], "int4"),
        (["--timeout", "0"], "timeout_seconds"),
        (["-t", "-3"], "temperature"),
        (["--accelerator", "nowhere"], "not an address"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [*CLOISTER, "generate", DEMO, "-p", "x", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_inspect_reports_what_crosses_and_what_is_learned() -> None:
    report = json.loads(run("inspect", DEMO, "--json").stdout)
    spec = json.loads((demo_model() / "config.json").read_text())
    lm_head = next(product for product in report["products"] if product["name"] == "LM head")
    assert lm_head["d_out"] == spec["vocab_size"]
    assert report["crossing_bytes_per_token"] == sum(product["crossing_bytes"] for product in report["products"])
    assert report["learns"]
    assert "blinded, on the accelerator" in run("inspect", DEMO).stdout
    fine = json.loads(run("inspect", DEMO, "--weights", "int8x2", "--json").stdout)
    assert fine["crossing_bytes_per_token"] > report["crossing_bytes_per_token"]


def test_what_inspect_predicts_is_what_crosses() -> None:
    report = json.loads(run("inspect", DEMO, "--json").stdout)
    record = json.loads(
        run("generate", DEMO, "-p", "Once", "-n", "10", "-t", "0", "--prefill", "enclave", "--json").stdout
    )
    crossed = record["meter"]["bytes_sent"] + record["meter"]["bytes_received"]
    assert crossed == 9 * report["crossing_bytes_per_token"], "nine decode passes follow the prompt's"


def test_the_demo_shows_uniform_rows_and_a_caught_cheat() -> None:
    record = json.loads(run("demo", "--max-tokens", "60", "--json").stdout)
    assert record["text_unchanged"]
    assert record["sightings"]["uniform"]
    assert len(record["incidents"]) == 1
    assert "another accelerator" in record["incidents"][0]["outcome"]


def test_a_chat_reads_lines_answers_and_forgets_on_request() -> None:
    script = "Tell me a story about a cat.\n/status\n/reset\n\n/help\nTell me a story about a dog.\n/exit\n"
    done = run("chat", DEMO, "-n", "30", "--seed", "2", stdin=script)
    assert len(done.stdout.strip().splitlines()) >= 2
    assert "stand-in" in done.stderr
    assert '"products"' in done.stderr


def test_a_chat_that_has_grown_too_long_says_how_to_go_on() -> None:
    script = "word " * 100 + "\n" + "word " * 160 + "\n/reset\nTell me a story.\n"
    done = run("chat", "demo", "-n", "5", "-q", stdin=script)
    assert done.stderr.count("/reset forgets") == 1
    assert len(done.stdout.strip().splitlines()) == 2, "the first line and the last are answered"


def test_a_chat_with_a_model_without_template_says_what_to_do(tinystories_656k: Path) -> None:
    done = run("chat", str(tinystories_656k), stdin="hello\n", code=1)
    assert "chat template" in done.stderr
    assert "generate" in done.stderr


def test_control_c_stops_the_answer_and_not_the_session() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*CLOISTER, "chat", DEMO, "-n", "450", "-t", "1.5", "--seed", "5"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def wait_for(pattern: str, seconds: float = 20.0) -> None:
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, f"{pattern!r} did not come; seen: {seen[-2000:]!r}"
            if select.select([master], [], [], 1.0)[0]:
                seen += os.read(master, 4096).decode("utf-8", "replace")

    try:
        wait_for("> ")
        seen = ""  # the progress bars say tokens/s as well
        os.write(master, b"Tell me a story about a bear.\n")
        wait_for("tokens/s")
        os.kill(process.pid, signal.SIGINT)
        wait_for("products checked")
        seen = ""
        os.write(master, b"/status\n")
        wait_for('"products"')
        os.write(master, b"/exit\n")
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
        os.close(master)


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"cloister \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.slow
def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [*CLOISTER, "generate", DEMO, "-p", "Once upon a time", "-n", "30", "--quiet"]

    def compiled() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}

    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=280)
    first = compiled()
    assert len(first) > 20
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=280)
    assert compiled() == first


@pytest.mark.parametrize(
    ("server", "order"),
    [
        *itertools.product(["accelerator", "broker"], [signal.SIGINT, signal.SIGTERM]),
        ("split-server", signal.SIGTERM),
    ],
)
def test_what_serves_ends_cleanly_when_told(server: str, order: signal.Signals, tmp_path: Path) -> None:
    command = [server, "--listen", "127.0.0.1:0"]
    if server == "split-server":
        command = [server, DEMO, "--allow-tied", "--port", "0"]
    if server == "broker":
        owner = ["--broker", str(tmp_path / "owner")]
        run("broker", "init", *owner)
        command = ["broker", "serve", *owner, "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*CLOISTER, *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert "127.0.0.1:" in process.stderr.readline()
            if server == "split-server":
                assert "the table is no secret here" in process.stderr.readline()
            process.send_signal(order)
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stderr.read() == "Ended.\n"
