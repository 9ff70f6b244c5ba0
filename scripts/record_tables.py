"""Tables of benchmark records: all of them, and those that pages show by themselves."""

import json

from tables import RESULTS, machine, measured_on, number, read, table


def records() -> str:
    """Returns the table of every benchmark record."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        parts.append(
            f"## {record['name']}\n\n{measured_on(record)}: `bench/results/{path.name}`\n\n"
            + table(record["rows"])
            + "\n\n"
            + "\n".join(f"- {key}: **{number(value)}**" for key, value in record["facts"].items())
            + f"\n\n{record['note']}"
        )
    return "\n\n".join(parts) or "No record yet: run `make bench`."


def baselines() -> str:
    """Returns one row per insecure baseline: where it is from, what runs inside, what is seen, what was recovered."""
    from cloister.audit.baselines.schemes import SCHEMES

    record = read("leakage-demo") or {"rows": []}
    measured = {row["policy"].removesuffix(" (INSECURE)"): row for row in record["rows"]}
    rows = [
        {
            "scheme": f"`{scheme.name}`",
            "from": scheme.policy.source,
            "linears in the enclave": scheme.inside,
            "what the accelerator sees": scheme.policy.sees,
            "the attack it falls to": scheme.policy.broken_by,
            **_recovered(measured.get(scheme.name, {})),
        }
        for scheme in SCHEMES.values()
    ]
    sound = [
        {"policy": f"`{name}`", **_recovered(measured.get(name, {}))} for name in ("blinded", "slalom", "enclave-only")
    ]
    guessing = next((number(row["guessing %"]) for row in record["rows"] if row["guessing %"] != ""), "?")
    facts = "".join(f"- {key}: **{number(value)}**\n" for key, value in record.get("facts", {}).items())
    return (
        f"{table(rows, 5)}\n\nThe same attacks on policies that expose no row (the most common token every time is right "
        f"for {guessing} %):\n\n{table(sound)}\n\n"
        f"`{record.get('command', 'not measured yet')}`, `bench/results/leakage-demo.json`:\n\n{facts}"
    )


def _recovered(row: dict[str, object]) -> dict[str, object]:
    if not row:
        return {}
    read = f"{number(row['tokens read %'])} %" if row["tokens read %"] != "" else "no row to attack"
    return {
        "prompt tokens read": read,
        "bits per token, at least": row["bits per token"],
        "private weights known": row["weights known"],
    }


def results() -> str:
    """Returns the one table for the README: decode of the 1.1-billion shape and the bars."""
    record = read("latency-1.1b")
    if record is None:
        return "No record yet: run `make bench`."
    wanted = ("variant", "tokens/s", "p50 ms", "p95 ms", "trusted CPU ms/token", "worker CPU ms/token")
    rows = [{key: row[key] for key in wanted if key in row} for row in record["rows"]]
    return (
        f"Decode at batch 1, a Llama shape of 1.1 billion parameters with random weights, on {machine(record)} "
        f"(`{record['command']}`, [record](bench/results/latency-1.1b.json)):\n\n{table(rows)}\n\n"
        "[All results](docs/results.md), among them fidelity: perplexity changes by less than 0.1 % with int8 weights."
    )


def attention() -> str:
    """Returns the table of what lent attention costs, and where its time goes."""
    record = read("attention-1.1b")
    if record is None:
        return "No record yet: run `make bench`."
    contexts = [f"context {count}: " for count in record["settings"]["contexts"]]
    names = list(dict.fromkeys(key.split(": ", 1)[1] for key in record["facts"]))
    facts = [
        {"": name, **{of.rstrip(": "): record["facts"][of + name] for of in contexts if of + name in record["facts"]}}
        for name in names
    ]
    return f"{table(record['rows'])}\n\n{table(facts)}\n\n{measured_on(record)}. {record['note']}"


def restoring() -> str:
    """Returns the table of what restoring gives back."""
    record = read("restoring")
    if record is None:
        return "No record yet: run `cloister bench restoring`."
    return f"{table(record['rows'])}\n\n`{record['command']}`, commit `{record['machine']['commit']}`."


def gateway() -> str:
    """Returns the table of what the gateway adds to an engine's answers."""
    record = read("gateway")
    if record is None:
        return "No record yet: run `cloister bench gateway`."
    wanted = ("model", "transport", "requests", "direct", "through", "added", "at least", "at most", "added %")
    first = ("first token, direct", "first token, through")
    rows = [{key: row[key] for key in (*wanted, *first)} for row in record["rows"]]
    return f"{table(rows, 2)}\n\n{measured_on(record)}; medians in milliseconds."
