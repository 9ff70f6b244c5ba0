"""`cloister demo`: the shipped model tells a story; beside it, what the accelerator saw; then the accelerator cheats."""

import json
from typing import Annotated, Any

import msgspec
import typer
from rich.panel import Panel
from rich.text import Text

from cloister.assets import demo_model
from cloister.cli import options as o
from cloister.cli.display import Display, human_bytes, incident_text, stderr, stdout, summary_text
from cloister.cli.session import cancellable, loaded, stream
from cloister.settings import AcceleratorSettings, Settings
from cloister.wire.session import Finished, Rehearsal, Sightings

PROMPT = "Tell me a story about a fox and a kite."
CHEAT_AT = 400
"""The product at which the accelerator cheats: somewhere in the middle of the story."""
BARS = "▁▂▃▄▅▆▇█"


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask of the shipped model.")] = PROMPT,
    seed: o.SeedOption = 3,
    max_tokens: o.TokensOption = 300,
    as_json: o.JsonOption = False,
) -> None:
    """See it work: a story, what the untrusted accelerator saw of it, and what happens when the accelerator cheats."""
    settings = Settings(accelerator=AcceleratorSettings(workers=2))
    sampling: dict[str, Any] = {"seed": seed, "max_new_tokens": max_tokens}
    console = stdout()
    display = Display(quiet=as_json)
    chat = [{"role": "user", "content": prompt}]
    with loaded(demo_model(), settings, display, Rehearsal(observe=True)) as llm:
        if not as_json:
            console.print(Text(f"enclave: {llm.info.tee}\n", style="yellow"))
            console.print(Text(f"> {prompt}\n", style="bold"))
        with cancellable(llm):
            honest = llm.chat(chat, **sampling)
            if not as_json:
                stream(honest, display, quiet=False)
            text = honest.text
        seen = llm.sightings()
    cheated_display = Display(quiet=True)
    with loaded(demo_model(), settings, cheated_display, Rehearsal(cheat_at_product=CHEAT_AT)) as llm:
        cheated = llm.chat(chat, **sampling)
        same = cheated.text == text and cheated.token_ids == honest.token_ids
    finished = honest.finished
    if finished is None:
        raise typer.Exit(130)
    if as_json:
        incidents = [msgspec.to_builtins(event) for event in cheated_display.incidents]
        sightings = msgspec.to_builtins(seen)
        print(json.dumps({"text": text, "sightings": sightings, "incidents": incidents, "text_unchanged": same}))
    else:
        stderr().print(summary_text(finished))
        console.print(Panel(_sightings(seen, finished), title="What the accelerator saw", expand=False))
        body = Text(f"Again, with an accelerator that adds 1 to one number of its answer to product {CHEAT_AT}:\n\n")
        for event in cheated_display.incidents:
            body.append(incident_text(event)).append("\n")
        body.append(
            "\nThe text is the same, token for token." if same else "\nThe text CHANGED: this must never happen."
        )
        console.print(Panel(body, title="What happens when it cheats", expand=False))
        console.print("Next: [bold]cloister chat MODEL[/bold] with the folder of any Llama, Mistral or Qwen model.")
    if not (same and cheated_display.incidents and seen.uniform):
        raise typer.Exit(1)


def _sightings(seen: Sightings, finished: Finished) -> Text:
    meter = finished.meter
    text = Text("The first numbers of its last three inputs:\n")
    for row in seen.sample:
        text.append("  " + " ".join(f"{value:>11}" for value in row[:6]) + " ...\n", style="cyan")
    text.append("\nHow often each low digit (0 to 255, in 64 groups) occurred:\n  ")
    text.append(histogram(seen.histogram) + "\n", style="cyan")
    verdict = "uniform" if seen.uniform else "NOT UNIFORM"
    text.append(f"\n{seen.elements:,} numbers: {verdict}").stylize(
        "bold" if seen.uniform else "bold red", len(text) - 8
    )
    text.append(f" (chi-square p = {seen.chi_square_p:.2f}, Kolmogorov-Smirnov p = {seen.kolmogorov_smirnov_p:.2f})\n")
    text.append(
        f"\n{meter.products} products were lent and every one was checked; "
        f"{human_bytes(meter.bytes_sent)} went out, {human_bytes(meter.bytes_received)} came back.\n"
    )
    text.append("It also learned the number of tokens of each pass, and when.")
    return text


def histogram(counts: tuple[int, ...]) -> str:
    """Returns a line of bars, groups of four digits each, scaled from 0 to twice the mean."""
    groups = [sum(counts[i : i + 4]) for i in range(0, len(counts), 4)]
    mean = max(1.0, sum(groups) / len(groups))
    return "".join(BARS[min(7, int(count / mean * 4))] for count in groups)
