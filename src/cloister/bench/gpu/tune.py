"""Measures tile sizes on the GPU at hand and writes a family file with the best for each shape. A tool for who maintains them.

Every candidate is compared with the CPU, bit for bit, before it is timed. Candidates are tried in processes of their own
(`measurer`): one that does not compile, crashes or hangs costs its time limit and no more. The file is written anew after every
shape, so a run that is cut short leaves what it has. It holds one entry per shape and number of rows, then those that were there.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from cloister.accelerator.cuda.configurations import (
    DecodeConfiguration,
    Family,
    PrefillConfiguration,
    family_of,
    parse_family,
)
from cloister.bench.gpu.budget import Budget
from cloister.bench.gpu.shapes import MODELS, products
from cloister.bench.gpu.tiles import Tiles, decode_tiles, prefill_tiles, splits_of
from cloister.bench.record import Record
from cloister.errors import SettingsError

DECODE_ROWS: Final = (4, 16)
PREFILL_ROWS: Final = 1024

MEASURER: Final = (sys.executable, "-m", "cloister.bench.gpu.measurer")

_START_SECONDS: Final = 90.0
_CHECK_SECONDS: Final = 60.0
"""Longest wait for a candidate to be compiled (for four kinds of launch) and compared."""
_TIME_SECONDS: Final = 20.0
_JOIN_SECONDS: Final = 5.0
_CHECK_SHARE: Final = 0.4
"""Most of the time that compiling and comparing may take."""
_MOST_CHECKERS: Final = 12
_SHOWN: Final = 5
"""Candidates of a shape that the record names, best first."""


class Child:
    """A measurer in a process of its own, started when it is first asked and again after it was lost."""

    def __init__(self, command: Sequence[str] = MEASURER) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader: threading.Thread | None = None
        self.facts: dict[str, Any] = {}
        """What the measurer said of the device."""

    def start(self) -> str:
        """Starts the measurer if it does not run; returns why it cannot, or nothing."""
        if self._process is not None and self._process.poll() is None:
            return ""
        self.close()
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process, self._lines = process, queue.Queue()
        self._reader = threading.Thread(target=_read, args=(process, self._lines), daemon=True)
        self._reader.start()
        answer = self._next(_START_SECONDS)
        self.facts = answer if "error" not in answer else {}
        return str(answer.get("error", ""))

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Returns the answer; after `seconds`, or if the process is lost, an error, and the process is ended."""
        if why := self.start():
            return {"error": why}
        try:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
        except OSError:
            self.close()
            return {"error": "the process ended"}
        return self._next(seconds)

    def close(self) -> None:
        """Ends the process; harmless without one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if self._reader is not None:
            self._reader.join(_JOIN_SECONDS)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
            answer = json.loads(line) if line else {"error": "the process ended"}
        except queue.Empty:
            answer, line = {"error": f"no answer within {seconds:g} s"}, ""
        except ValueError:
            answer, line = {"error": "the process wrote something else"}, ""
        if not line:
            self.close()
        return dict(answer)


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    """Hands the lines of a process on; an empty one is its end."""
    if process.stdout is not None:
        for line in process.stdout:
            lines.put(line)
    lines.put("")


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be tuned."""

    shapes: Sequence[tuple[int, int]]
    """(d_out, d_in), the most important first."""
    decode: Sequence[DecodeConfiguration]
    prefill: Sequence[PrefillConfiguration]
    prefill_rows: int = PREFILL_ROWS


def work(smoke: bool) -> Work:
    """Returns the shapes of Llama-2-7B, Llama-3-8B and 70B with every candidate; `smoke`: a shape and a few."""
    names = ["smoke"] if smoke else ["llama-2-7b", "llama-3-8b", "llama-70b"]
    shapes = list(dict.fromkeys((d_out, d_in) for name in names for d_out, d_in, _ in products(MODELS[name]).values()))
    decode = [one for rows in DECODE_ROWS for one in decode_tiles(rows)]
    if smoke:
        few = [one for rows in DECODE_ROWS for one in decode_tiles(rows)[:1]]
        return Work([min(shapes)], few, prefill_tiles()[:1], 20)
    return Work(shapes, decode, prefill_tiles())


def tune(
    path: Path, seconds: float, smoke: bool, console: Console, out: Path, command: Sequence[str] = MEASURER
) -> Family:
    """Writes the family file at `path` and the record `gpu-tuning` in `out`; returns what the file holds.

    Raises:
        SettingsError: there is no GPU, or no candidate was measured in the time.
    """
    budget, timing = Budget(seconds), Child(command)
    try:
        if why := timing.start():
            raise SettingsError(f"The measuring process did not start: {why}.", remedy="Look at its words above.")
        tuning = _Tuning(path, work(smoke), timing.facts, smoke, out)
        tuning.check(command, Budget(seconds * _CHECK_SHARE), console)
        with Progress(console=console) as progress:
            task = progress.add_task("timing", total=len(tuning.work.shapes))
            for index, shape in enumerate(tuning.work.shapes):
                tuning.time(timing, shape, Budget(budget.left_seconds / (len(tuning.work.shapes) - index)))
                progress.advance(task)
    finally:
        timing.close()
    tuning.record().show(console)
    return tuning.family()


class _Tuning:
    """What was found so far."""

    def __init__(self, path: Path, work: Work, facts: dict[str, Any], smoke: bool, out: Path) -> None:
        self.work = work
        self._path, self._out, self._smoke, self._facts = path, out, smoke, facts
        self._capability = (int(facts["capability"][0]), int(facts["capability"][1]))
        self._before = family_of(self._capability)
        self._multiprocessors = int(facts["multiprocessors"])
        self._good: list[Tiles] = []
        self._failures: dict[str, str] = {}
        self._rows: list[dict[str, Any]] = []
        self._decode: list[DecodeConfiguration] = []
        self._prefill: list[PrefillConfiguration] = []

    def check(self, command: Sequence[str], budget: Budget, console: Console) -> None:
        """Compiles every candidate and compares it with the CPU, in as many processes as there are cores, within the budget."""
        waiting: queue.SimpleQueue[Tiles | None] = queue.SimpleQueue()
        candidates: list[Tiles] = [*self._split(self.work.decode), *self.work.prefill]
        for one in candidates:
            waiting.put(one)
        checkers = 1 if self._smoke else min(_MOST_CHECKERS, len(os.sched_getaffinity(0)), len(candidates))
        for _ in range(checkers):
            waiting.put(None)
        console.print(f"{len(candidates)} candidates are compiled and checked by {checkers} processes ...")

        def run() -> list[tuple[Tiles, str]]:
            child, found = Child(command), []
            try:
                while (one := waiting.get()) is not None:
                    if not budget.has(0):
                        found.append((one, "not tried: out of time"))
                        continue
                    answer = child.ask(_request(one), min(_CHECK_SECONDS, max(5.0, budget.left_seconds)))
                    found.append((one, str(answer.get("error", ""))))
            finally:
                child.close()
            return found

        with ThreadPoolExecutor(checkers) as pool:
            checked = [one for part in [pool.submit(run) for _ in range(checkers)] for one in part.result()]
        for one, error in checked:
            if error:
                self._failures[_text(one)] = error
            else:
                self._good.append(one)
        console.print(f"{len(self._good)} of them are right.")

    def time(self, child: Child, shape: tuple[int, int], budget: Budget) -> None:
        """Times the candidates of a shape, then writes the file and the record."""
        d_out, d_in = shape
        for at, rows in enumerate((*DECODE_ROWS, self.work.prefill_rows)):
            part = Budget(budget.left_seconds / (len(DECODE_ROWS) + 1 - at))
            timed: list[tuple[float, Tiles]] = []
            for one in self._for(d_out, d_in, rows):
                if timed and not part.has(0):
                    break
                answer = child.ask(_request(one, shape, rows), _TIME_SECONDS)
                if "us" in answer:
                    timed.append((float(answer["us"]), one))
                else:
                    self._failures[f"{d_out} x {d_in}, {rows} rows, {_text(one)}"] = str(
                        answer.get("error", "no answer")
                    )
            timed.sort(key=lambda pair: pair[0])
            for us, one in timed[:_SHOWN]:
                self._rows.append({"d_out": d_out, "d_in": d_in, "rows": rows, "us": us, "tiles": _text(one)})
            if timed:
                best = dataclasses.replace(timed[0][1], d_out=d_out, d_in=d_in)
                self._decode += [best] if isinstance(best, DecodeConfiguration) else []
                self._prefill += [best] if isinstance(best, PrefillConfiguration) else []
        if self._decode or self._prefill:
            family = self.family()
            text = as_toml(family)
            parse_family(self._path.stem, text)  # what is written must be read again
            part_file = self._path.with_name(f"{self._path.name}.part")
            part_file.write_text(text, encoding="utf-8")
            part_file.replace(self._path)
        self.record().write(self._out)

    def family(self) -> Family:
        """Returns what was found for each shape, before the entries that were there for others.

        Raises:
            SettingsError: nothing was found.
        """
        if not self._decode and not self._prefill:
            raise SettingsError("No candidate was measured in the time.", remedy="Give more with --minutes.")
        others = self._before.provenance.rpartition("not listed: ")[2]
        today = datetime.datetime.now(datetime.UTC).date()
        tuned = {(one.d_out, one.d_in) for one in self._decode} | {(one.d_out, one.d_in) for one in self._prefill}
        return Family(
            name=self._path.stem,
            capabilities=(self._capability,),
            provenance=f"Measured on {self._facts['name']} with torch {self._facts['torch']}, "
            f"{today}, by scripts/bench_gpu.py --tune; shapes that are not listed: {others}",
            decode=(*self._decode, *(one for one in self._before.decode if (one.d_out, one.d_in) not in tuned)),
            prefill=(*self._prefill, *(one for one in self._before.prefill if (one.d_out, one.d_in) not in tuned)),
            ahead_bytes=self._before.ahead_bytes,
        )

    def record(self) -> Record:
        """Returns the best candidates of each shape, and what every failure said."""
        facts = {**self._facts, "right": len(self._good), "failures": self._failures or "none"}
        name = "gpu-tuning-smoke" if self._smoke else "gpu-tuning"
        return Record(
            name, list(self._rows), facts, {"file": self._path.name}, command="python scripts/bench_gpu.py --tune FILE"
        )

    def _split(self, decode: Iterable[DecodeConfiguration]) -> list[DecodeConfiguration]:
        """Returns the configurations with every split that some shape wants."""
        made = [
            dataclasses.replace(one, split_k=split)
            for one in decode
            for d_out, d_in in self.work.shapes
            for split in splits_of(one, d_out, d_in, self._multiprocessors)
        ]
        return list(dict.fromkeys(made))

    def _for(self, d_out: int, d_in: int, rows: int) -> list[Tiles]:
        if rows not in DECODE_ROWS:
            return [one for one in self._good if isinstance(one, PrefillConfiguration)]
        return [
            one
            for one in self._good
            if isinstance(one, DecodeConfiguration)
            and one.max_rows == rows
            and one.split_k in splits_of(one, d_out, d_in, self._multiprocessors)
        ]


def as_toml(family: Family) -> str:
    """Returns the family as the text of its file."""
    lines = [f"capabilities = {[list(pair) for pair in family.capabilities]}", f'provenance = "{family.provenance}"']
    lines += [f"ahead_bytes = {family.ahead_bytes}"] if family.ahead_bytes else []
    for table, entries in (("decode", family.decode), ("prefill", family.prefill)):
        for entry in entries:
            lines += ["", f"[[{table}]]", *(f"{field} = {json.dumps(value)}" for field, value in _set_fields(entry))]
    return "\n".join(lines) + "\n"


def _request(one: Tiles, shape: tuple[int, int] = (0, 0), rows: int = 0) -> dict[str, Any]:
    """Returns the question about a candidate: its time for a shape, or without one whether it is right."""
    return {
        "decode": isinstance(one, DecodeConfiguration), "tiles": dataclasses.asdict(one), "time": bool(rows),
        "d_out": shape[0], "d_in": shape[1], "rows": rows,
    }  # fmt: skip


def _text(one: Tiles) -> str:
    return ", ".join(f"{field}={value}" for field, value in _set_fields(one))


def _set_fields(entry: Tiles) -> list[tuple[str, int | str]]:
    """Returns the fields that differ from their defaults."""
    return [
        (field.name, getattr(entry, field.name))
        for field in dataclasses.fields(entry)
        if field.default is dataclasses.MISSING or getattr(entry, field.name) != field.default
    ]
