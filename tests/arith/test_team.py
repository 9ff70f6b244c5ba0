"""A team covers every range once, passes errors on, survives interruptions, and is done when it says so."""

import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.arith.doorbell import Doorbell
from cloister.arith.team import Team


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(0, 300), st.integers(1, 9), st.sampled_from([0, 20]))
def test_every_index_is_covered_once(threads: int, total: int, step: int, looks: int) -> None:
    counts, starts = np.zeros(total, np.int64), []

    def loop(start: int, stop: int) -> None:
        counts[start:stop] += 1
        starts.append(start)

    with Team(threads, looks=looks) as team:
        for _ in range(3):
            team.run(loop, total, step)
    assert (counts == 3).all()
    assert all(start % step == 0 for start in starts)


def test_a_team_of_one_works_on_the_calling_thread() -> None:
    seen = set()
    with Team(1) as team:
        assert team.threads == 1
        team.run(lambda start, stop: seen.add(threading.current_thread()), 100)
    assert seen == {threading.current_thread()}


def test_a_team_passes_errors_on_and_goes_on_working() -> None:
    with Team(3) as team:

        def fail(start: int, stop: int) -> None:
            if stop > 50:
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            team.run(fail, 100)
        done = np.zeros(100, np.int64)

        def mark(start: int, stop: int) -> None:
            done[start:stop] += 1

        team.run(mark, 100, 7)
        assert (done == 1).all()
    team.run(mark, 100)  # closed: on the calling thread
    assert (done == 2).all()


def test_an_error_is_reported_once() -> None:
    def fail(start: int, stop: int) -> None:
        time.sleep(0.02)  # so that both threads come to fail
        raise ValueError("no")

    with Team(2) as team:
        with pytest.raises(ValueError, match="no"):
            team.run(fail, 2)
        team.run(lambda start, stop: None, 100)


def test_an_interrupted_caller_gets_its_interruption_after_the_helpers_are_done() -> None:
    helping, finished = threading.Event(), []

    def loop(start: int, stop: int) -> None:
        if threading.current_thread() is threading.main_thread():
            helping.wait()
        else:
            helping.set()
            time.sleep(0.4)
            finished.append(start)

    main = threading.main_thread().ident
    assert main is not None
    with Team(2) as team:
        helping.clear()
        timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            team.run(loop, 2)
        assert finished
        timer.join()
        for _ in range(3):  # and the next loops are complete when they return
            before = len(finished)
            helping.clear()
            team.run(loop, 2)
            assert len(finished) > before


def test_loops_from_many_threads_take_turns() -> None:
    results = np.zeros((4, 1000), np.int64)
    with Team(3) as team:

        def call(row: int) -> None:
            def add(start: int, stop: int) -> None:
                results[row, start:stop] += 1

            for _ in range(20):
                team.run(add, 1000)

        callers = [threading.Thread(target=call, args=(row,)) for row in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert (results == 20).all()


@pytest.mark.parametrize("looks", [0, 50])
def test_a_ring_before_the_wait_is_not_lost(looks: int) -> None:
    bell = Doorbell(looks)
    bell.ring()
    bell.ring()
    bell.wait()
    bell.wait()
    waiter = threading.Thread(target=bell.wait)
    waiter.start()
    assert waiter.is_alive()
    bell.ring()
    waiter.join(timeout=10)
    assert not waiter.is_alive()


def test_closing_ends_the_threads_and_twice_is_harmless() -> None:
    before = set(threading.enumerate())
    team = Team(3)
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    team.close()
    team.close()
    for helper in helpers:
        helper.join(timeout=10)
        assert not helper.is_alive()
