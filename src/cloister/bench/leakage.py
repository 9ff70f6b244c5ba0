"""What the accelerator of each policy learns: prompts read from rows, private weights recovered, bits per token."""

from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cloister.assets import demo_model
from cloister.audit.baselines.schemes import SCHEMES
from cloister.audit.leakage import MOST_TOKENS, Leakage, OperatorLeakage, measure_leakage
from cloister.bench.record import Record

DIFFERENT: Final = ("enclave-only", "blinded", "slalom", *SCHEMES)
"""One policy for each way to treat a row (`auto` and `secureinfer` treat theirs as `blinded` does)."""

SMOKE_TOKENS: Final = 512
SMOKE_POLICIES: Final = ("blinded", "unprotected", "obfuscated")

NOTE: Final = (
    "Every attack was run on an accelerator of the same process. 'tokens read': of the operator that tells most, by the attack "
    "named; 'guessing': the most common token every time. Bits: Fano's bound at the lower end of the 95 % interval, of the "
    "entropy stated. 'weights known': share of a change that sets the model apart from a public base (simulated: 5 % noise)."
)


def run(model: str, text: Path | None, policy: str | None, smoke: bool, console: Console) -> Record:
    """Returns the record of every policy, or of every operator under one `policy`."""
    path = demo_model() if model == "demo" else Path(model)
    content = text.read_text(encoding="utf-8") if text is not None else None
    most = SMOKE_TOKENS if smoke else MOST_TOKENS
    names = (policy,) if policy is not None else SMOKE_POLICIES if smoke else DIFFERENT
    measured = []
    for name in names:
        console.print(f"{name} ...")
        measured.append(measure_leakage(name, path, content, most_tokens=most))
    rows = [_row(leakage) for leakage in measured]
    if policy is not None:
        rows = [{"operator": operator.operator, **_figures(operator)} for operator in measured[0].operators]
    shown = path.resolve().name
    suffix = (f"-{policy}" if policy is not None else "") + ("-smoke" if smoke else "")
    return Record(
        f"leakage-{shown}{suffix}",
        rows,
        _facts(measured),
        {
            "model": shown,
            "text": text.name if text is not None else "shipped held-out stories",
            "policy": policy or "all",
        },
        NOTE,
    )


def _row(leakage: Leakage) -> dict[str, Any]:
    exposed = sum(operator.rows > 0 for operator in leakage.operators)
    return {
        "policy": leakage.policy + (" (INSECURE)" if leakage.policy in SCHEMES else ""),
        "linears lent": f"{exposed} of {len(leakage.operators)}",
        "tells most": leakage.worst.operator if leakage.worst.bits_per_token else "none",
        **_figures(leakage.worst),
        "weights known": "public" if leakage.public_weights else round(leakage.weights_known, 3),
    }


def _figures(operator: OperatorLeakage) -> dict[str, Any]:
    prompt = operator.prompt
    if prompt is None:
        unseen = dict.fromkeys(("tokens read %", "at least %", "guessing %"), "")
        return {"attack": "nothing to attack", **unseen, "bits per token": 0.0}
    return {
        "attack": prompt.attack,
        "tokens read %": round(100 * prompt.tokens.rate, 2),
        "at least %": round(100 * prompt.tokens.lower, 2),
        "guessing %": round(100 * prompt.guessing.rate, 2),
        "bits per token": round(prompt.bits_per_token, 3),
    }


def _facts(measured: list[Leakage]) -> dict[str, Any]:
    seen = [operator.prompt for leakage in measured for operator in leakage.operators if operator.prompt]
    facts: dict[str, Any] = {
        "tokens that the attacker knows": measured[0].known_tokens,
        "tokens attacked": measured[0].attacked_tokens,
    }
    if seen:
        facts |= {"entropy of a token, bits": seen[0].entropy_bits, "different tokens in the text": seen[0].kinds}
    return facts
