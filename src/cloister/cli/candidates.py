"""`cloister candidates`: the public classes and certified tables from which replacements are drawn."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from cloister.cli import options as o
from cloister.cli.display import human_bytes, stderr, stdout
from cloister.errors import SettingsError
from cloister.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    import numpy as np

    from cloister.privacy.candidates import Candidates, Provenance
    from cloister.privacy.vocabulary import Entry

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Build and inspect a candidate file: which spans may replace which, and the tables they are drawn from. It is built "
        "once for a model, from the model's own embeddings and public lists, never from anyone's prompts."
    ),
)

SIZES = (2, 512)


@app.command("build")
def build(
    model: o.ModelArgument,
    epsilon: Annotated[
        list[str] | None, typer.Option("--epsilon", help="ε of one draw, such as 2, 0.5 or 1/2; repeat for several.")
    ] = None,
    mechanism: Annotated[
        list[Mechanism] | None, typer.Option("--mechanism", help="How replacements are drawn; repeat for several.")
    ] = None,
    members: Annotated[
        int, typer.Option("--members", help="K, the least size of a class: 32 useful, 64 balanced, 256 strong (slow).")
    ] = 64,
    cap: Annotated[
        float | None,
        typer.Option(
            "--cap",
            help="Success of the best attack on a channel: 0 a guess, 1 as on the exponential mechanism, 2 all that ε "
            "allows. Default: 0.5 up to ε = 2, 1 at 4, 1.5 at 8.",
        ),
    ] = None,
    frequencies: Annotated[
        Path | None,
        typer.Option(
            "--frequencies",
            help="A public list of words and counts, a pair to each line: what channels take to be frequent, and expect "
            "attackers to know. Default: by a token's place in the vocabulary.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes; 0: one per core.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; default: candidates.cloister in the model.")
    ] = None,
    quiet: o.SilentOption = False,
) -> None:
    """Partition the vocabulary into classes and compute their tables. Minutes, once.

    [bold]cloister candidates build ~/models/Llama-3.2-1B-Instruct --epsilon 1 --epsilon 2[/bold]
    """
    from cloister.assets import demo_model
    from cloister.privacy import build as builder
    from cloister.privacy import candidate_file
    from cloister.privacy.vocabulary import frequencies_of, read_frequencies

    table = None if frequencies is None else read_frequencies(frequencies)
    plan = builder.Plan(
        members=_checked(members, SIZES),
        mechanisms=tuple(dict.fromkeys(mechanism or [Mechanism.CHANNEL])),
        epsilons=tuple(dict.fromkeys(_epsilon(text) for text in epsilon or ["2"])),
        workers=workers,
        cap=_cap(cap),
    )
    path = out or model / candidate_file.FILE_NAME
    if out is None and model.resolve() == demo_model().resolve():
        raise SettingsError(
            "The folder of the shipped model is part of the program, so no file is written there.",
            remedy="Give --out FILE.",
        )
    candidate_file.check_place(path)  # before minutes of work
    started = time.monotonic()
    with _bars(quiet) as progress:
        entries, vectors, origin = vocabulary(model, plan.members, progress)
        known = None if table is None else frequencies_of(entries, table)
        made = builder.build(entries, vectors, origin, plan, progress, known)
    digest = candidate_file.write(made, path)
    if not quiet:
        _describe(made, path, digest, time.monotonic() - started)


@app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A candidate file, or the folder of a model that holds one.")],
    word: Annotated[
        list[str] | None, typer.Option("--word", help="Also show the class of this word; repeat for several.")
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Check a candidate file (every digest, every certificate) and say what is in it."""
    from cloister.privacy import candidate_file

    file = path / candidate_file.FILE_NAME if path.is_dir() else path
    held = candidate_file.read(file)
    facts = summary(held)
    found = {text: _members(held, text) for text in word or ()}
    if as_json:
        print(json.dumps(facts | {"words": found}, indent=1, ensure_ascii=False))
        return
    _describe(held, file, "", None)
    for text, members in found.items():
        stdout().print(
            f"[bold]{escape(text)}[/bold]: {escape(', '.join(members)) if members else 'in no class'}", soft_wrap=True
        )


def vocabulary(
    model: Path, members: int, progress: Callable[[str, int, int], None]
) -> tuple[list["Entry"], "np.ndarray", "Provenance"]:
    """Returns everything of a model that can be replaced, its embeddings, and where they come from."""
    import numpy as np

    from cloister.model.directory import open_model
    from cloister.model.identity import EMBEDDING, embedding_sha256, tokenizer_sha256
    from cloister.privacy.candidates import Provenance
    from cloister.privacy.vocabulary import LISTED, inflected_entries, lexicon, listed_entries, token_entries

    words = lexicon()
    opened = open_model(model)
    with opened.checkpoint as checkpoint:
        pieces = opened.tokenizer.pieces()
        table = checkpoint.tensor(EMBEDDING)
        entries = token_entries(pieces[: len(table)], words)
        entries += inflected_entries(entries, words)
        entries += [entry for kind in LISTED for entry in listed_entries(kind)]
        vectors = np.empty((len(entries), table.shape[1]), dtype=np.float32)
        for row, entry in enumerate(entries):
            tokens = [entry.token] if entry.token >= 0 else opened.tokenizer.encode(f" {entry.text}", False)
            vectors[row] = table[tokens].mean(axis=0)
            if row % 1024 == 0 or row + 1 == len(entries):
                progress("embeddings", row + 1, len(entries))
        origin = Provenance(
            model.resolve().name, embedding_sha256(checkpoint), tokenizer_sha256(model), len(table), members
        )
    return entries, vectors, origin


def summary(held: "Candidates") -> dict[str, object]:
    """Returns what a candidate file holds, as JSON."""
    origin = held.provenance
    return {
        "model": origin.model,
        "embedding_sha256": origin.embedding_sha256,
        "tokenizer_sha256": origin.tokenizer_sha256,
        "vocabulary": origin.vocabulary,
        "members": origin.members,
        "kinds": _kinds(held),
        "tables": [
            {
                "mechanism": str(one.mechanism),
                "epsilon": float(one.epsilon),
                "exact_epsilon": max(proof.epsilon for proof in one.certificates),
                "mean_attack": sum(one.attacks) / len(one.attacks),
                "worst_attack": max(one.attacks),
            }
            for one in held.sets
        ],
    }


def _kinds(held: "Candidates") -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for group in held.classes:
        kind = kinds.setdefault(group.kind, {"classes": 0, "spans": 0, "smallest": len(group.members)})
        kind["classes"] += 1
        kind["spans"] += len(group.members)
        kind["smallest"] = min(kind["smallest"], len(group.members))
    return kinds


def _describe(held: "Candidates", path: Path, digest: str, seconds: float | None) -> None:
    console = stdout()
    took = "" if seconds is None else f", built in {seconds:.0f} s"
    console.print(
        f"[bold]{escape(str(path))}[/bold]  {human_bytes(path.stat().st_size)}, from {escape(held.provenance.model)}{took}",
        soft_wrap=True,
    )
    kinds = Table(box=None, header_style="dim")
    for column in ("kind", "classes", "spans", "smallest class"):
        kinds.add_column(column, justify="left" if column == "kind" else "right")
    for name, kind in _kinds(held).items():
        kinds.add_row(name, *(str(count) for count in kind.values()))
    console.print(kinds)
    for one in held.sets:
        exact = max(proof.epsilon for proof in one.certificates)
        attack = sum(one.attacks) / len(one.attacks)
        console.print(
            f"  {one.mechanism} ε = {float(one.epsilon):g}: certified at most {exact:.6f} for every class; "
            f"the best attacker names the span {100 * attack:.1f} % of the time (mean over classes)"
        )
    if digest:
        console.print(f"  [dim]SHA-256 {digest}[/dim]", soft_wrap=True)


def _members(held: "Candidates", text: str) -> list[str]:
    from cloister.privacy.mechanism import Kind

    for kind in Kind:
        place = held.find(text, kind)
        if place is not None:
            return list(held.classes[place[0]].members)
    return []


def _epsilon(text: str) -> Fraction:
    from cloister.privacy.certificate import MAX_EPSILON

    try:
        value = Fraction(text).limit_denominator(10**5)
    except (ValueError, ZeroDivisionError) as error:
        raise SettingsError(f"ε is {text!r}.", remedy="Give a number such as 2, 0.5 or 1/2.") from error
    if not 0 < value <= MAX_EPSILON:
        raise SettingsError(f"ε is {text}.", remedy=f"Allowed: above 0, at most {MAX_EPSILON}.")
    return value


def _checked(members: int, bounds: tuple[int, int]) -> int:
    if not bounds[0] <= members <= bounds[1]:
        raise SettingsError(f"--members is {members}.", remedy=f"Allowed: {bounds[0]} to {bounds[1]}.")
    return members


def _cap(cap: float | None) -> float | None:
    if cap is not None and not 0 < cap <= 2:
        raise SettingsError(f"--cap is {cap}.", remedy="Allowed: above 0, at most 2.")
    return cap


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what is told of progress: a bar for each stage on a terminal, a line for each stage otherwise."""
    console = stderr()
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not quiet and not console.is_terminal:
                    console.print(f"{stage}: {total}")
            bars.update(tasks[stage], completed=done)

        yield tell
