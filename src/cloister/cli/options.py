"""Options that several commands share, and how they become settings."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cloister.errors import AdapterError, ModelError
from cloister.settings import (
    Backend,
    OnFailure,
    Prefill,
    Settings,
    Weights,
    WhenEmpty,
    from_toml,
)

SAMPLING: Final = "How tokens are chosen (default: as the model's generation_config.json says)"
PLACEMENT: Final = "What runs where"
RUNNING: Final = "How it runs"
ADAPTERS: Final = "Private adapters"
"""Headings of groups of options in --help."""

DEMO: Final = "demo"
"""What stands for the model that is shipped, where no folder of the working directory has this name."""

MODEL_HELP: Final = (
    "Folder of a Hugging Face model (config.json, safetensors, tokenizer.json); demo: the one that is shipped."
)

_HUB_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(given: Path | None) -> Path | None:
    """Returns the folder that was given, or that of the shipped model for `demo`.

    Raises:
        ModelError: there is none, and what was given looks like the name of a model on a hub.
    """
    if given is None or given.exists():
        return given
    if str(given) == DEMO:
        from cloister.assets import demo_model

        return demo_model()
    if _HUB_NAME.fullmatch(str(given)):
        raise ModelError(
            f"There is no folder {given}, and nothing is downloaded here.",
            remedy=f"Fetch the model first, for example: hf download {given} --local-dir {given.name}",
        )
    return given


ModelArgument = Annotated[Path, typer.Argument(help=MODEL_HELP, callback=model_folder)]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        help="TOML file with the tables blinding, accelerator, cache, plan and seal. Options win over it.",
        rich_help_panel=RUNNING,
    ),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        "--weights", help="int8: one plane. int8x2: a second one, fidelity close to bfloat16.", rich_help_panel=RUNNING
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy", help="What runs where; cloister plan --list describes each policy.", rich_help_panel=PLACEMENT
    ),
]
ThreatOption = Annotated[
    str | None,
    typer.Option(
        "--threat",
        help="Who may not learn what: private-prompts, private-model, private-weights.",
        rich_help_panel=PLACEMENT,
    ),
]
RulesOption = Annotated[
    Path | None,
    typer.Option(
        "--rules",
        help="plan.toml: tensors that are secret, public, in the enclave or blinded.",
        rich_help_panel=PLACEMENT,
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--allow-insecure-baseline",
        help="Allow policies that expose secrets, to audit them.",
        rich_help_panel=PLACEMENT,
    ),
]
AddressOption = Annotated[
    list[str] | None,
    typer.Option(
        "--accelerator", help="host:port of an accelerator on another host; repeat for spares.", rich_help_panel=RUNNING
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", help="Worker processes on this host; later ones are spares.", rich_help_panel=RUNNING),
]
BackendOption = Annotated[
    Backend | None, typer.Option("--backend", help="What multiplies on a worker of this host.", rich_help_panel=RUNNING)
]
PantryOption = Annotated[
    int | None, typer.Option("--pantry", help="MiB of memory for pads made ahead of time.", rich_help_panel=RUNNING)
]
WhenEmptyOption = Annotated[
    WhenEmpty | None, typer.Option("--when-empty", help="What to do when no pad is left.", rich_help_panel=RUNNING)
]
PrefillOption = Annotated[
    Prefill | None, typer.Option("--prefill", help="Where the prompt's products run.", rich_help_panel=RUNNING)
]
OnFailureOption = Annotated[
    OnFailure | None,
    typer.Option("--on-failure", help="Where the work of a failed accelerator goes.", rich_help_panel=RUNNING),
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", help="Seconds to wait for one product.", rich_help_panel=RUNNING)
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Most tokens of a session, prompt and answer. Default: what the model was trained for, at most 8192.",
        rich_help_panel=RUNNING,
    ),
]

TokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", help="Longest answer in tokens. Default: what the model says, else 512."),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", "-t", help="0 always takes the likeliest token.", rich_help_panel=SAMPLING),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", help="Keep this many likeliest tokens (0: all).", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="Keep the likeliest tokens that hold this share.", rich_help_panel=SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option("--min-p", help="Drop tokens below this share of the likeliest.", rich_help_panel=SAMPLING),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Make the choices repeatable.", rich_help_panel=SAMPLING)
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.", rich_help_panel=SAMPLING)
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=FOLDER of a PEFT LoRA adapter, kept and computed in the enclave; repeatable.",
        rich_help_panel=ADAPTERS,
    ),
]
UseOption = Annotated[
    str | None,
    typer.Option(
        "--use",
        help="Name of the adapter that answers; base: none. Without it, the first one given.",
        rich_help_panel=ADAPTERS,
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer and nothing else.")]
SilentOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The options of a command that say what runs where; None leaves a choice to the file, then to the default."""

    policy: str | None = None
    threat: str | None = None
    rules: Path | None = None
    allow_insecure_baseline: bool = False

    def given(self) -> dict[str, Any]:
        """Returns the settings that the options change."""
        return _given(
            {
                "policy": self.policy,
                "threat": self.threat,
                "rules": str(self.rules.resolve()) if self.rules else None,
                "allow_insecure_baseline": True if self.allow_insecure_baseline else None,
            }
        )


@dataclasses.dataclass(frozen=True)
class RuntimeOptions:
    """The options of a command that say how the model runs; None leaves a choice to the file, then to the default."""

    file: Path | None = None
    weights: Weights | None = None
    plan: "PlanOptions | None" = None
    addresses: list[str] | None = None
    workers: int | None = None
    backend: Backend | None = None
    pantry_mib: int | None = None
    when_empty: WhenEmpty | None = None
    prefill: Prefill | None = None
    on_failure: OnFailure | None = None
    timeout_seconds: float | None = None
    context: int | None = None

    def settings(self) -> Settings:
        """Returns the settings: the file's, changed by the options that were given.

        Raises:
            SettingsError: the file cannot be read, or a value is out of range.
        """
        base = from_toml(self.file) if self.file else Settings()
        blinding: dict[str, Any] = {
            "weights": self.weights,
            "pantry_bytes": None if self.pantry_mib is None else self.pantry_mib * 2**20,
            "when_empty": self.when_empty,
            "prefill": self.prefill,
        }
        accelerator: dict[str, Any] = {
            "addresses": tuple(self.addresses) if self.addresses else None,
            "workers": self.workers,
            "backend": self.backend,
            "timeout_seconds": self.timeout_seconds,
            "on_failure": self.on_failure,
        }
        return Settings(
            blinding=dataclasses.replace(base.blinding, **_given(blinding)),
            accelerator=dataclasses.replace(base.accelerator, **_given(accelerator)),
            cache=dataclasses.replace(base.cache, **_given({"max_context": self.context})),
            plan=dataclasses.replace(base.plan, **(self.plan.given() if self.plan else {})),
        )


def adapters(given: list[str] | None) -> dict[str, Path]:
    """Returns the folders of the adapters that were given, by name.

    Raises:
        AdapterError: one is not of the form NAME=FOLDER, or a name is given twice.
    """
    named: dict[str, Path] = {}
    for entry in given or []:
        name, sign, folder = entry.partition("=")
        if not (name and sign and folder):
            raise AdapterError(
                f"--adapter {entry!r} is not NAME=FOLDER.", remedy="For example: --adapter tax=./tax-lora"
            )
        if name in named:
            raise AdapterError(f"There are two adapters called {name!r}.", remedy="Give each a name of its own.")
        named[name] = Path(folder)
    return named


def adapter_in_use(use: str | None, named: dict[str, Path]) -> str:
    """Returns the name of the adapter that answers, empty for the base model: `use`, or else the first that was given.

    Raises:
        AdapterError: no such adapter was given.
    """
    if use is None:
        return next(iter(named), "")
    if use in ("", "base"):
        return ""
    if use not in named:
        raise AdapterError(f"No adapter is called {use!r}.", remedy=f"Given: {', '.join(named) or 'none'}.")
    return use


def sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """Returns the sampling arguments that were given."""
    values: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    return _given(values)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
