"""Every interleaving of an order, a stop and two programs that await it, in a small model of `ring_kernels.await_rows`.

The interpreter runs programs one after the other, so only a model shows what happens when they run at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import pytest

POSTED, STOP = "posted", "stop"

TURNS = 2
"""Looks of a program before it is considered still waiting."""


@dataclass(frozen=True)
class Waiting:
    """A program: where it is, what it has read since its last fence, and what it concluded."""

    looks: int = 0
    read: tuple[tuple[str, bool], ...] = ()
    awake: bool = False
    done: tuple[bool, bool] | None = None
    """(posted, stop) as it decides by them."""


def steps(program: Waiting, memory: dict[str, bool], reread: bool) -> Iterator[Waiting]:
    """The next states: it reads either word first, for between two fences reads have no order."""
    if program.done is not None or (program.looks == TURNS and not program.awake):
        return
    seen = dict(program.read)
    for word in (POSTED, STOP):
        if word in seen:
            continue
        now = {**seen, word: memory[word]}
        if len(now) < 2:
            yield Waiting(program.looks, tuple(now.items()), program.awake)
        elif program.awake:
            yield Waiting(program.looks, (), True, (now[POSTED], now[STOP]))
        elif not any(now.values()):
            yield Waiting(program.looks + 1)
        elif reread:
            yield Waiting(program.looks + 1, (), awake=True)
        else:
            yield Waiting(program.looks + 1, (), True, (now[POSTED], now[STOP]))


def outcomes(reread: bool) -> set[tuple[tuple[bool, bool], tuple[bool, bool]]]:
    """What both programs concluded, for every order of all events in which both got through."""
    found = set()
    for events in permutations((POSTED, STOP)):
        todo = [(0, Waiting(), Waiting())]
        known = set(todo)
        while todo:
            happened, first, other = todo.pop()
            memory = {word: word in events[:happened] for word in events}
            after = [(happened, state, other) for state in steps(first, memory, reread)]
            after += [(happened, first, state) for state in steps(other, memory, reread)]
            after += [(happened + 1, first, other)] if happened < len(events) else []
            for state in after:
                if state not in known:
                    known.add(state)
                    todo.append(state)
            if first.done is not None and other.done is not None:
                found.add((first.done, other.done))
    return found


def disagreements(reread: bool) -> list[object]:
    """Outcomes in which the first program lets the product run and the other has not copied its rows."""
    return [both for both in outcomes(reread) if not both[0][1] and not both[1][0]]


def test_if_a_product_runs_every_program_has_copied_its_rows() -> None:
    made = outcomes(reread=True)
    assert any(not first[1] for first, _ in made), "a product must be possible"
    assert any(first[1] for first, _ in made), "a stop must be possible"
    assert disagreements(reread=True) == []


def test_the_model_finds_the_race_without_the_second_look() -> None:
    assert disagreements(reread=False)


@pytest.mark.parametrize("events", [(POSTED,), (STOP,)])
def test_one_event_is_enough_to_wake(events: tuple[str, ...]) -> None:
    memory = {word: word in events for word in (POSTED, STOP)}
    states = {Waiting()}
    for _ in range(4):
        states |= {after for state in states for after in steps(state, memory, True)}
    assert {state.done for state in states if state.done} == {(POSTED in events, STOP in events)}
