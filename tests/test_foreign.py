"""No parser of foreign bytes crashes or hangs on any bytes; every refusal is a short error of ours."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import foreign
from attest.test_fuzz import SLOW_MS, mutated
from foreign.parser import Foreign, Target

RELAXED = settings(
    deadline=SLOW_MS, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
LONGEST_MESSAGE = 2000


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Foreign]:
    return foreign.all_targets(tmp_path_factory.mktemp("foreign"))


def attempt(target: Target, data: bytes) -> None:
    try:
        target(data)
    except foreign.EXPECTED as error:
        assert len(str(error)) < LONGEST_MESSAGE


@pytest.mark.parametrize("name", foreign.NAMES)
def test_good_inputs_are_read(targets: dict[str, Foreign], name: str) -> None:
    """Otherwise a mutation of them shows little."""
    for seed in targets[name].seeds:
        if name != "policy file":  # one of its inputs is the documentation's, which is abridged
            targets[name].target(seed)


@pytest.mark.parametrize("name", foreign.NAMES)
def test_no_bytes_crash_a_parser(targets: dict[str, Foreign], name: str) -> None:
    @RELAXED
    @given(data=st.binary(max_size=2000))
    @example(data=b"")
    @example(data=b"[" * 100_000)
    @example(data=b'{"a":' * 50_000)
    @example(data=b"a = " + b"[" * 50_000)
    @example(data=b"a = " + b"9" * 5_000)
    @example(data=b"\0" * 70_000)
    @example(data=b"\xff" * 100)
    def throw(data: bytes) -> None:
        attempt(targets[name].target, data)

    throw()


@pytest.mark.parametrize("name", foreign.NAMES)
def test_no_damaged_input_crashes_a_parser(targets: dict[str, Foreign], name: str) -> None:
    @RELAXED
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        good = data.draw(st.sampled_from(targets[name].seeds))
        attempt(targets[name].target, mutated(data, good))

    damage()
