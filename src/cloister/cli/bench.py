"""`cloister bench`: measurements that write JSON records."""

import os
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.cli.display import stderr, stdout
from cloister.errors import SettingsError

if TYPE_CHECKING:
    from cloister.bench.record import Record

app = typer.Typer(
    no_args_is_help=True, help="Measure speed, trusted CPU time and fidelity; each run writes a JSON record."
)


def _writable(folder: Path) -> Path:
    """Returns the folder of the records, or raises before anything is measured."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise SettingsError(f"No record can be written to {folder}.", remedy="Give another --out.")
    return folder


OutOption = Annotated[Path, typer.Option("--out", help="Folder of the records.", callback=_writable)]
SmokeOption = Annotated[bool, typer.Option("--smoke", help="A few seconds on tiny shapes: does it run at all?")]


class Classifier(StrEnum):
    """With what the utility of sanitised text is measured."""

    LINEAR = "linear"
    NETWORK = "network"


@app.command("latency")
def latency(
    shape: Annotated[str, typer.Option("--shape", help="demo, 1.1b, or the folder of a model.")] = "1.1b",
    tokens: Annotated[int, typer.Option("--tokens", help="Decoded tokens per variant.")] = 48,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """Prefill and decode, side by side: unprotected, enclave-only, blinded online, blinded online and pads."""
    from cloister.bench.latency import run

    record = run(_shape(shape, folders=True), tokens, smoke, stderr())
    _publish(record, out)


@app.command("fidelity")
def fidelity(
    model: Annotated[str, typer.Option("--model", help="demo, or the folder of a model.")] = "demo",
    text: Annotated[Path | None, typer.Option("--text", help="Held-out text; default: the shipped one.")] = None,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """Perplexity and KL divergence against the float32 model, for int8 and int8x2 weights."""
    from cloister.bench.fidelity import run

    record = run(model, text, smoke, stderr())
    _publish(record, out)


@app.command("products")
def products(smoke: SmokeOption = False, out: OutOption = Path("bench/results")) -> None:
    """The int8 product of the accelerator: bytes and operations per second of each installed backend, beside the ceiling."""
    from cloister.bench.products import run

    record = run(smoke, stderr())
    _publish(record, out)


@app.command("plans")
def plans(
    shape: Annotated[str, typer.Option("--shape", help="demo or 1.1b.")] = "1.1b",
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """Every policy: the decode time that the planner predicts, and the one that is measured."""
    from cloister.bench.plans import run

    record = run(_shape(shape), smoke, stderr())
    _publish(record, out)


@app.command("load")
def load(
    gigabytes: Annotated[
        float, typer.Option("--gigabytes", help="Size of the checkpoint that is written and loaded.")
    ] = 8.0,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """Memory and time to load and quantise a checkpoint; needs that much room for temporary files."""
    from cloister.bench.load import run

    record = run(gigabytes, smoke, stderr())
    _publish(record, out)


@app.command("seal")
def seal(smoke: SmokeOption = False, out: OutOption = Path("bench/results")) -> None:
    """Sealing and loading a sealed package, on one core; needs 3 GiB for temporary files."""
    from cloister.bench.seal import run

    record = run(smoke, stderr())
    _publish(record, out)


@app.command("startup")
def startup(smoke: SmokeOption = False, out: OutOption = Path("bench/results")) -> None:
    """Seconds from the start of `cloister generate` to its first token, with a warm cache."""
    from cloister.bench.startup import run

    record = run(smoke, stderr())
    _publish(record, out)


@app.command("leakage")
def leakage(
    model: Annotated[str, typer.Option("--model", help="demo, or the folder of a model.")] = "demo",
    text: Annotated[
        Path | None, typer.Option("--text", help="What is read; the last third is attacked. Default: the shipped text.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="One policy, operator by operator, instead of all.")
    ] = None,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """What the accelerator of each policy learns, insecure baselines included: all in this process, exposed to no one."""
    from cloister.bench.leakage import run

    record = run(model, text, policy, smoke, stderr())
    _publish(record, out)


@app.command("attention")
def attention(
    shape: Annotated[str, typer.Option("--shape", help="demo or 1.1b.")] = "1.1b",
    contexts: Annotated[
        list[int] | None, typer.Option("--context", help="Tokens of context; repeatable. Default: 128, 512 and 2048.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Decoded tokens per measurement.")] = 16,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """Lent attention (pads on both operands) next to the enclave's own: time, CPU, bytes, multiplications, error."""
    from cloister.bench.attention import run

    record = run(_shape(shape), contexts or [128, 512, 2048], tokens, smoke, stderr())
    _publish(record, out)


@app.command("candidates")
def candidates(smoke: SmokeOption = False, out: OutOption = Path("bench/results")) -> None:
    """How long candidates take to build and to read for vocabularies of 32 k and 128 k tokens, on synthetic embeddings.

    About half an hour on two cores: classes of 64 are built in whole.
    """
    from cloister.bench.candidates import run

    record = run(smoke, stderr())
    _publish(record, out)


@app.command("detection")
def detection(
    data: Annotated[Path, typer.Option("--data", help="Labelled texts: a JSON file of presidio-research's form.")],
    candidates: Annotated[Path, typer.Option("--candidates", help="A candidate file, for its public lists.")],
    detectors: Annotated[str, typer.Option("--detectors", help="rules, presidio, spacy:MODEL.")] = "rules,presidio",
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """How much personal data the detectors find, by type, and how much of everything else they leave alone."""
    from cloister.bench.detection import run

    record = run(data, candidates, _names(detectors), smoke, stderr())
    _publish(record, out)


@app.command("restoring")
def restoring(
    data: Annotated[Path, typer.Option("--data", help="Labelled texts: a JSON file of presidio-research's form.")],
    candidates: Annotated[Path, typer.Option("--candidates", help="A candidate file; each of its tables is measured.")],
    detectors: Annotated[str, typer.Option("--detectors", help="rules, presidio, spacy:MODEL.")] = "rules,presidio",
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """How many replaced spans an answer gives back, and what a text costs, at every ε of a candidate file."""
    from cloister.bench.restoring import run

    record = run(data, candidates, _names(detectors), smoke, stderr())
    _publish(record, out)


@app.command("sanitize-speed")
def sanitize_speed(
    model: Annotated[Path | None, typer.Option("--model", help="Folder of a model; default: the shipped one.")] = None,
    candidates: Annotated[
        Path | None, typer.Option("--candidates", help="Its candidate file; default: the one in the model's folder.")
    ] = None,
    detectors: Annotated[str, typer.Option("--detectors", help="rules, presidio, spacy:MODEL.")] = "rules,presidio",
    data: Annotated[
        Path | None, typer.Option("--data", help="A text file, measured besides the invented letters.")
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=10, help="Prompts of each sort.")] = 300,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """What sanitising a prompt of 128 tokens costs: detect, charge, draw, replace, embed."""
    from cloister.assets import demo_model
    from cloister.bench.sanitize_speed import run

    record = run(model or demo_model(), candidates, _names(detectors), data, prompts, smoke, stderr())
    _publish(record, out)


@app.command("crossing")
def crossing(
    model: Annotated[Path | None, typer.Option("--model", help="Folder of a model; default: the shipped one.")] = None,
    candidates: Annotated[
        Path | None, typer.Option("--candidates", help="Its candidate file; default: the one in the model's folder.")
    ] = None,
    detectors: Annotated[str, typer.Option("--detectors", help="rules, presidio, spacy:MODEL.")] = "rules",
    requests: Annotated[int, typer.Option("--requests", min=10, help="Requests of each sort.")] = 300,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """What it costs that the sanitiser has a process of its own: the same requests here and there, in turns."""
    from cloister.assets import demo_model
    from cloister.bench.crossing import run

    record = run(Path(model or demo_model()), candidates, _names(detectors), requests, smoke, stderr())
    _publish(record, out)


@app.command("gateway")
def gateway(
    vllm: Annotated[
        Path | None,
        typer.Option("--vllm", help="A vLLM's program; started with the shipped model and a larger random one."),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="Instead: a running vLLM with --enable-prompt-embeds.")] = "",
    model: Annotated[Path | None, typer.Option("--model", help="Folder of the model that --engine serves.")] = None,
    candidates: Annotated[Path | None, typer.Option("--candidates", help="The candidate file of --model.")] = None,
    requests: Annotated[int, typer.Option("--requests", min=4, help="Requests each way, for each length.")] = 60,
    seconds: Annotated[
        float, typer.Option("--seconds", help="After so long fewer will do: for each model, transport and length.")
    ] = 50.0,
    lengths: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Tokens of an answer; repeatable. Default: 64.")
    ] = None,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """What the gateway adds to the latency of the same vLLM called directly, and to the time to the first token. Six minutes.

    [bold]cloister bench gateway --vllm .venv-vllm/bin/vllm[/bold]
    """
    from cloister.bench.engines import Subject
    from cloister.bench.gateway import Effort, measure, record
    from cloister.bench.gateway_models import measure_models

    effort, tokens = (Effort(4, 0.0), [8]) if smoke else (Effort(requests, seconds), lengths or [64])
    if vllm is not None:
        rows = measure_models(vllm, effort, tokens, smoke, stderr())
    elif engine and model is not None and candidates is not None:
        rows = measure(Subject(model.name, engine, model, candidates), effort, tokens, stderr())
    else:
        raise SettingsError(
            "There is no engine to measure.", remedy="Give --vllm, or --engine, --model and --candidates."
        )
    made = record(rows, {"requests": effort.requests, "seconds": effort.seconds, "tokens": tokens, "smoke": smoke})
    _publish(made, out)


@app.command("sanitize")
def sanitize(
    data: Annotated[Path, typer.Option("--data", help="Folder with a folder for each task: sst2, agnews, ...")],
    vectors: Annotated[
        Path, typer.Option("--vectors", help="Public word vectors: an .npz with the arrays words and vectors.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Repeat for several; the first with other scales and caps too. Default: all five."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="test, or validation to choose options on.")] = "test",
    classifier: Annotated[
        Classifier,
        typer.Option("--classifier", help="network: SST-2 alone, with neural networks, and as CMIF sets it up."),
    ] = Classifier.LINEAR,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """Accuracy, exact ε and the best attack of every sanitiser and its published rivals; plots beside the record.

    Half an hour each. A run that was interrupted goes on where it was.
    """
    from cloister.bench.sanitize import run
    from cloister.bench.sanitize_plot import plot
    from cloister.bench.text_task import READERS

    if classifier is Classifier.NETWORK:
        from cloister.bench.sanitize_network import TASK
        from cloister.bench.sanitize_network import run as run_networks

        if task not in (None, [TASK]):
            raise SettingsError("Networks are trained for SST-2 alone.", remedy=f"Leave out --task, or give {TASK}.")
        _publish(run_networks(data, vectors, split, smoke, out, stderr()), out)
        return
    record = run(data, vectors, tuple(dict.fromkeys(task or READERS)), split, smoke, out, stderr())
    _publish(record, out)
    plot(record, out)


@app.command("split")
def split(
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of a decoder; default: the shipped one.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Generated tokens.")] = 48,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of every variant.")] = 5,
    epsilon: Annotated[float, typer.Option("--epsilon", help="ε of one token of the published mechanism.")] = 1.0,
    smoke: SmokeOption = False,
    out: OutOption = Path("bench/results"),
) -> None:
    """The published split against the whole model and an all-in-enclave run, and the mechanism's share of the time."""
    from cloister.assets import demo_model
    from cloister.bench.split import run

    record = run(model or demo_model(), tokens, repeats, epsilon, smoke, stderr())
    _publish(record, out)


def _names(detectors: str) -> list[str]:
    return [name.strip() for name in detectors.split(",")]


def _shape(given: str, *, folders: bool = False) -> str:
    """Returns the shape that was asked for, or raises before anything is measured."""
    if given in ("demo", "1.1b") or (folders and Path(given).is_dir()):
        return given
    known = "demo, 1.1b, or the folder of a model" if folders else "demo or 1.1b"
    raise SettingsError(f"--shape is {given!r}.", remedy=f"Give {known}.")


def _publish(record: "Record", out: Path) -> None:
    """Writes a record into its folder and shows it, also where it cannot be written: nobody measures twice for that."""
    try:
        record.write(out)
    except OSError as error:
        raise SettingsError(
            f"The record cannot be written to {out}: {error.strerror}; it is shown above.", remedy="Give another --out."
        ) from error
    finally:
        record.show(stdout())


@app.command("all")
def everything(smoke: SmokeOption = False, out: OutOption = Path("bench/results")) -> None:
    """Every benchmark, one after the other."""
    products(smoke, out)
    fidelity("demo", None, smoke, out)
    load(8.0, smoke, out)
    seal(smoke, out)
    startup(smoke, out)
    leakage("demo", None, None, smoke, out)
    attention("1.1b", None, 16, smoke, out)
    latency("demo", 48, smoke, out)
    plans("demo", smoke, out)
    if find_spec("torch") and find_spec("transformers"):
        split(None, 48, 5, 1.0, smoke, out)
    if not smoke:
        latency("1.1b", 48, smoke, out)
        plans("1.1b", smoke, out)
