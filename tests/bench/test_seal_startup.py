"""The benchmarks of loading and of starting, in their short form: what they report, not how fast it is."""

import io

from rich.console import Console

from cloister.bench import seal, startup
from cloister.isolation import bubblewrap
from cloister.isolation.confinement import Confinement


def test_loading_is_shown_beside_its_ceilings() -> None:
    record = seal.run(smoke=True, console=Console(file=io.StringIO()))
    names = [row["weights"] for row in record.rows]
    assert names[:2] == ["private", "public"]
    assert names[-1] == "(all three in turn)"
    slowest = min(row["load GB/s, processor time"] for row in record.rows[2:5])
    assert 0 < record.rows[-1]["load GB/s, processor time"] < slowest  # one after the other is slower than each
    assert {"load average before", "load average after"} <= set(record.facts)


def test_an_empty_process_is_confined_as_asked() -> None:
    assert startup.empty_process(1, []) > 0
    assert startup.empty_process(1, [Confinement().encode()]) > 0
    program = bubblewrap.find()
    if program is not None:
        assert startup.empty_process(1, [Confinement(inside=True).encode()], program) > 0


def test_the_first_token_is_timed_without_bubblewrap() -> None:
    assert startup.seconds_to_first_token(wrap=False) > 0
