"""Tables of what sanitising costs: accuracy, attacks and leads by ε, from the records of `cloister bench sanitize`."""

from typing import Any

from tables import measured_on, read, table

Lines = list[dict[str, object]]


def sanitising_short() -> str:
    """Returns what matters of the record in one table: accuracy and the best attack, for both sizes of classes."""
    record = read("sanitize")
    if record is None:
        return "No record yet: run `cloister bench sanitize`."
    lines: Lines = []
    for task, key, title, scale in (
        ("sst2", "trained sanitised", "accuracy on SST-2, %", 100),
        ("agnews", "trained sanitised", "accuracy on AG News, %", 100),
        ("sst2", "uniform %", "words that the best attacker names, %", 1),
    ):
        clean = 100 * record["facts"][f"clean accuracy, {task}"]
        for mechanism, size in (("channel", 20), ("channel (K = 64)", 64)):
            found = {row["ε"]: row for row in record["rows"] if (row["task"], row["mechanism"]) == (task, mechanism)}
            line: dict[str, object] = {"": title, "classes of": size}
            line["clean text"] = f"{clean:.1f}" if scale == 100 else "100"
            lines.append(line | {f"ε = {epsilon:g}": f"{scale * row[key]:.1f}" for epsilon, row in found.items()})
    return table(lines)


def sanitising_speed() -> str:
    """Returns the table of what a prompt's sanitising takes, stage by stage."""
    record = read("sanitize-speed")
    if record is None:
        return "No record yet: run `cloister bench sanitize-speed`."
    said = "Medians in milliseconds, of the whole the 10th and 95th percentile too."
    return f"{table(record['rows'])}\n\n{said} {measured_on(record)}."


def sanitising() -> str:
    """Returns the tables of what sanitising costs: accuracy and attacks by ε, the leads of `channel`, the other tasks."""
    record = read("sanitize")
    if record is None:
        return "No record yet: run `cloister bench sanitize`."
    facts = record["facts"]
    tasks = list(dict.fromkeys(row["task"] for row in record["rows"]))
    clean = ", ".join(f"{task} {100 * facts[f'clean accuracy, {task}']:.1f} %" for task in tasks)
    parts = [f"{measured_on(record)}. On clean text: {clean}."]
    titles = {
        "accuracy": f"{tasks[0]}: accuracy, %, classifier trained on clean text",
        "trained sanitised": f"{tasks[0]}: accuracy, %, classifier trained on sanitised text",
        "uniform %": "the best attack, %, all words equally frequent",
        "attack %": "the best attack, %, by one who knows the words' frequencies in this text",
    }
    by_task = {task: [row for row in record["rows"] if row["task"] == task] for task in tasks}
    parts += [_by_epsilon(by_task[tasks[0]], key, title) for key, title in titles.items()]
    parts += [
        _by_epsilon(by_task[task], "trained sanitised", f"{task}: accuracy, %, classifier trained on sanitised text")
        for task in tasks[1:]
    ]
    equal, caps, attacked = _leads(record, tasks[0])
    parts += [
        _interval_line(record),
        table([_verdict(line) for line in equal], 5),
        "The same in points:",
        table(equal, 2),
        *([table(caps, 2)] if caps else []),
        "The same at the success of the best attack that the other has, where it lies between ours:",
        table(attacked, 2),
    ]
    return "\n\n".join(parts)


def _leads(record: dict[str, Any], first: str) -> tuple[Lines, Lines, Lines]:
    """Returns the leads of `channel` at equal ε, with another cap, and at equal attack; the last two of the first task."""
    epsilons = [f"ε = {epsilon:g}" for epsilon in record["settings"]["epsilons"]]
    equal: Lines = []
    caps: Lines = []
    attacked: Lines = []
    for key, value in record["facts"].items():
        task, _, name = key.partition(": ")
        if ", equal ε, " in name:
            equal.append(
                {
                    "task": task,
                    "equal ε": name.replace(", equal ε", ""),
                    **dict(zip(epsilons, value.split(", "), strict=True)),
                }
            )
        elif ", other cap, " in name and task == first:
            caps.append({"equal ε, another cap": name.replace(", other cap", ""), "points": value})
        elif ", equal attack" in name and task == first:
            attacked.append({"equal attack": name.replace(", equal attack", ""), "points, at what rate": value})
    return equal, caps, attacked


def sanitising_networks() -> str:
    """Returns the tables of SST-2 with neural networks: what is sensitive, accuracy and attack by ε, leads."""
    record = read("sanitize-network")
    if record is None:
        return "No record yet: run `cloister bench sanitize --classifier network`."
    facts = record["facts"]
    parts = [
        f"{measured_on(record)}. On clean text: {100 * facts['clean accuracy']:.1f} %; a linear classifier alone: "
        f"{100 * facts['clean accuracy, linear']:.1f} %."
    ]
    for sensitive in dict.fromkeys(row["sensitive"] for row in record["rows"]):
        own = [row for row in record["rows"] if row["sensitive"] == sensitive]
        for row in own:
            row["mechanism"] += ", trained on sanitised text" if row["trained"] == "sanitised" else ""
        title = f"{sensitive} ({own[0]['replaced %']:.0f} % of the words replaced): accuracy, %"
        parts.append(_by_epsilon(own, "accuracy", title))
        own = [row for row in own if row["trained"] == "clean"]
        parts.append(_by_epsilon(own, "uniform %", f"{sensitive}: the best attack, %, all words equally frequent"))
        parts.append(_by_epsilon(own, "exact ε", f"{sensitive}: exact ε"))
    leads = []
    for key, value in facts.items():
        sensitive, _, name = key.partition(": ")
        if name:
            by_epsilon = {epsilon: points for points, epsilon in (part.split(" at ") for part in value.split(", "))}
            leads.append({"sensitive": sensitive, "lead, points": name, **by_epsilon})
    leads.sort(key=lambda line: len(line), reverse=True)
    parts += [
        _interval_line(record),
        table([_verdict(line) for line in leads], 5),
        "The same in points:",
        table(leads, 2),
    ]
    return "\n\n".join(parts)


def _interval_line(record: dict[str, Any]) -> str:
    over = record["settings"].get("intervals", "draws alone")
    return f"Who leads by more than the 95 % confidence interval of the lead, which is over {over}, at which ε:"


def _verdict(line: dict[str, object]) -> dict[str, object]:
    """Returns at which ε a line of leads ("+4.4±1.5") is ahead or behind by more than its interval."""
    held: dict[str, list[str]] = {"channel leads": [], "neither": [], "the other leads": []}
    for column, value in line.items():
        if column.startswith("ε = "):
            points, _, half = str(value).partition("±")
            which = 1 if abs(float(points)) <= float(half or "inf") else 0 if float(points) > 0 else 2
            held[list(held)[which]].append(column.removeprefix("ε = "))
    return {key: value for key, value in line.items() if not key.startswith("ε")} | {
        key: ", ".join(values) or "-" for key, values in held.items()
    }


def _by_epsilon(rows: list[dict[str, Any]], key: str, title: str) -> str:
    """Returns one row per mechanism and one column per ε."""
    held: dict[str, dict[str, object]] = {}
    for row in rows:
        line = held.setdefault(row["mechanism"], {title: row["mechanism"]})
        line[f"ε = {row['ε']:g}"] = (
            f"{row[key] * (1 if key.endswith(('%', 'ε')) else 100):.{2 if key == 'exact ε' else 1}f}"
        )
    lines = sorted(held.values(), key=len, reverse=True)  # whole lines first: they have every column
    return table(lines)
