"""The `cloister` command: its groups, and what becomes of errors."""

import inspect as introspection
import sys
from typing import Annotated

import typer

from cloister import __version__
from cloister.cli import (
    accelerator,
    bench,
    broker,
    candidates,
    chat,
    demo,
    gateway,
    generate,
    inspect,
    ledger,
    measure,
    plan,
    seal,
    serve,
    slice,
    split,
    streams,
    tpm,
    verify,
)
from cloister.cli.display import foreign, stderr
from cloister.cli.missing import missing_package
from cloister.errors import CloisterError

app = typer.Typer(
    name="cloister",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Run a Llama on hardware that you do not trust. Prompts, activations and the KV cache stay in an enclave process; "
        "an untrusted accelerator multiplies blinded integers, and every answer is checked.\n\n"
        "Begin with [bold]cloister demo[/bold] and [bold]cloister chat demo[/bold], then [bold]cloister chat MODEL[/bold] with "
        "the folder of any Llama, Mistral or Qwen model from Hugging Face."
    ),
)

_RUN, _OWN, _ASK, _STUDY = "Run a model", "Own a model or a server", "Ask servers without a TEE", "Compare and measure"

app.command("demo", rich_help_panel=_RUN)(demo.demo)
app.command("chat", rich_help_panel=_RUN)(chat.chat)
app.command("generate", rich_help_panel=_RUN)(generate.generate)
app.command("verify", rich_help_panel=_RUN)(verify.verify)
app.command("seal", rich_help_panel=_OWN)(seal.seal)
app.add_typer(broker.app, name="broker", rich_help_panel=_OWN)
app.command("slice", rich_help_panel=_OWN)(slice.slice_)
app.command("serve", rich_help_panel=_OWN)(serve.serve)
app.command("measure", rich_help_panel=_OWN)(measure.measure)
app.add_typer(tpm.app, name="tpm", rich_help_panel=_OWN)
app.command("accelerator", rich_help_panel=_OWN)(accelerator.accelerator)
app.add_typer(candidates.app, name="candidates", rich_help_panel=_ASK)
app.command("gateway", rich_help_panel=_ASK)(gateway.gateway)
app.command("ledger", rich_help_panel=_ASK)(ledger.ledger)
app.command("split-server", rich_help_panel=_ASK)(split.split_server)
app.command("split-client", rich_help_panel=_ASK)(split.split_client)
app.command("inspect", rich_help_panel=_STUDY)(inspect.inspect)
app.command("plan", rich_help_panel=_STUDY)(plan.plan)
app.add_typer(bench.app, name="bench", rich_help_panel=_STUDY)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cloister {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a Llama on hardware that you do not trust."""


def _join_lines(group: typer.Typer) -> None:
    """Makes each paragraph of the help texts one line: the terminal breaks it, not the source."""
    for command in group.registered_commands:
        written = command.help or introspection.getdoc(command.callback) or ""
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in written.split("\n\n"))
    for child in group.registered_groups:
        if child.typer_instance is not None:
            _join_lines(child.typer_instance)


_join_lines(app)


def main() -> None:
    """Runs the command line; an error is one line, a remedy and the exit code 1, with a traceback only under --debug."""
    streams.make_usable()
    try:
        with streams.written():
            app()
    except CloisterError as error:
        _end(error, error.message, error.remedy)
    except ModuleNotFoundError as error:
        lacking = missing_package(error)
        if lacking is None:
            raise
        _end(error, lacking.message, lacking.remedy)
    except BrokenPipeError:  # whoever reads the output has seen enough
        sys.exit(1)
    except OSError as error:  # of a file or an output that no part of the program speaks for
        named = f"{error.filename}: " if error.filename else ""
        _end(error, f"{named}{error.strerror or error}.", "To see where it happened: cloister --debug COMMAND ...")
    except KeyboardInterrupt:
        sys.exit(130)


def _end(error: Exception, message: str, remedy: str) -> None:
    if "--debug" in sys.argv:
        raise error
    console = stderr()
    console.print("[bold red]error:[/bold red]", foreign(message), soft_wrap=True)
    if remedy:
        console.print(" ", foreign(remedy), soft_wrap=True)
    sys.exit(1)
