"""`cloister inspect`: what runs where, what crosses, and what the accelerator learns, without loading a weight."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from cloister.cli import options as o
from cloister.cli.display import human_bytes, human_count, stdout
from cloister.settings import Settings, Weights

if TYPE_CHECKING:
    from cloister.model.spec import ModelSpec

LEARNS = (
    "the architecture and the public weights (it is given them)",
    "how many tokens each pass has: the length of the prompt (or its bucket, with shape_hiding), then one per token",
    "when each pass happens: how long the answer is and how fast it comes",
)
"""What an accelerator learns in the blinded mode; the threat model page explains each."""

DOES_NOT_LEARN = (
    "the prompt, the activations, the KV cache, the logits, the answer: each blinded value is uniform, 0 bits per element",
    "the scales of activations, the pads, the secrets of the checks",
)


@dataclass(frozen=True)
class Product:
    """One kind of linear layer, as it is lent."""

    name: str
    count: int
    d_in: int
    d_out: int
    placement: str
    weight_bytes: int
    crossing_bytes: int
    """Bytes to and from the accelerator for one token, all layers of this kind."""


@dataclass(frozen=True)
class Inspection:
    """What `cloister inspect` reports."""

    model: str
    family: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    products: tuple[Product, ...]
    in_enclave: tuple[str, ...]
    crossing_bytes_per_token: int
    pad_bytes_per_token: int
    pantry_tokens: int
    kv_cache_bytes_per_token: int
    learns: tuple[str, ...]
    does_not_learn: tuple[str, ...]


def examine(name: str, spec: "ModelSpec", settings: Settings) -> Inspection:
    """Returns the report for a model of `spec` under `settings`."""
    planes = 2 if settings.blinding.weights is Weights.INT8X2 else 1
    head = spec.head_dim
    shapes = (
        ("QKV projections (fused)", spec.layers, spec.hidden_size, (spec.heads + 2 * spec.kv_heads) * head),
        ("output projection", spec.layers, spec.heads * head, spec.hidden_size),
        ("gate and up projections (fused)", spec.layers, spec.hidden_size, 2 * spec.ffn_size),
        ("down projection", spec.layers, spec.ffn_size, spec.hidden_size),
        ("LM head", 1, spec.hidden_size, spec.vocab_size),
    )
    products = tuple(
        Product(
            kind, count, d_in, d_out,
            placement="blinded, on the accelerator",
            weight_bytes=count * planes * d_in * d_out,
            crossing_bytes=count * 4 * (d_in + planes * d_out),
        )
        for kind, count, d_in, d_out in shapes
    )  # fmt: skip
    crossing = sum(product.crossing_bytes for product in products)
    return Inspection(
        model=name,
        family=spec.family.value,
        parameters=spec.parameters,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=head,
        max_context=spec.max_positions,
        products=products,
        in_enclave=("embedding", "RMSNorm", "rotary embedding", "KV cache", "attention", "SwiGLU", "sampling"),
        crossing_bytes_per_token=crossing,
        pad_bytes_per_token=crossing,  # r and u are as long as what they hide
        pantry_tokens=settings.blinding.pantry_bytes // crossing,
        kv_cache_bytes_per_token=8 * spec.layers * spec.kv_heads * head,
        learns=LEARNS,
        does_not_learn=DOES_NOT_LEARN,
    )


def inspect(
    model: o.ModelArgument,
    file: o.SettingsFile = None,
    weights: o.WeightsOption = None,
    pantry: o.PantryOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Show what the default policy runs where, what crosses per token, and what the accelerator learns.

    [bold]cloister plan[/bold] compares policies and predicts their speed.

    Reads the configuration and the headers only: a 70-billion-parameter model takes a second.
    """
    from cloister.model.directory import open_model  # here: the other commands start faster without NumPy

    settings = o.RuntimeOptions(file, weights, pantry_mib=pantry).settings()
    path = Path(model)
    directory = open_model(path)
    report = examine(path.resolve().name, directory.spec, settings)
    directory.checkpoint.close()
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _show(report)


def _show(report: Inspection) -> None:
    console = stdout()
    console.print(
        f"[bold]{report.model}[/bold]: {report.family}, {human_count(report.parameters)} parameters, {report.layers} layers, "
        f"{report.heads} heads ({report.kv_heads} for keys and values) of {report.head_dim}, context {report.max_context}"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("product", "count", "shape", "runs", "int8 weights", "crosses per token"):
        table.add_column(heading, justify="left" if heading in ("product", "runs") else "right")
    for product in report.products:
        table.add_row(
            product.name, str(product.count), f"{product.d_in} x {product.d_out}",
            Text(product.placement, style="cyan" if "blinded" in product.placement else "green"),
            human_bytes(product.weight_bytes), human_bytes(product.crossing_bytes),
        )  # fmt: skip
    for operator in report.in_enclave:
        table.add_row(operator, "", "", Text("enclave", style="green"), "", "")
    console.print(table)
    console.print(
        f"Per token: {human_bytes(report.crossing_bytes_per_token)} cross, {human_bytes(report.pad_bytes_per_token)} of pads, "
        f"{human_bytes(report.kv_cache_bytes_per_token)} of KV cache. The pantry holds pads for {report.pantry_tokens} tokens."
    )
    console.print("[bold]The accelerator learns[/bold]")
    for line in report.learns:
        console.print(f"  · {line}")
    console.print("[bold]It does not learn[/bold]")
    for line in report.does_not_learn:
        console.print(f"  · {line}")
