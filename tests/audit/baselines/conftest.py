"""The shipped model, prepared once, and what every baseline is compared with."""

from collections.abc import Callable

import numpy as np
import pytest

from cloister.arith.team import Team
from cloister.assets import demo_model
from cloister.audit.baselines.w8a8 import PlainGate
from cloister.blinding.pads import PadSource
from cloister.enclave.forward import Forward, LinearGate
from cloister.enclave.kvcache import PagedKVCache
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.model.directory import open_model
from cloister.settings import BlindingSettings

PROMPT = "Once upon a time, there was a kind fox named Mia. She lost her red ball in the windy garden."


@pytest.fixture(scope="package")
def model() -> EnclaveModel:
    directory = open_model(demo_model())
    return prepare(directory.checkpoint, directory.spec, BlindingSettings(), PadSource())


@pytest.fixture(scope="package")
def tokens() -> list[int]:
    return open_model(demo_model()).tokenizer.encode(PROMPT)


@pytest.fixture(scope="package")
def team() -> Team:
    return Team(1)


@pytest.fixture(scope="package")
def logits_of(model: EnclaveModel, tokens: list[int]) -> Callable[[LinearGate], np.ndarray]:
    """Returns a function from a gate to the logits of every token of the prompt."""

    def run(gate: LinearGate) -> np.ndarray:
        spec = model.spec
        return Forward(model, gate, PagedKVCache(spec.layers, spec.kv_heads, spec.head_dim, 16, 256)).run_all(tokens)

    return run


@pytest.fixture(scope="package")
def plain_logits(model: EnclaveModel, team: Team, logits_of: Callable[[LinearGate], np.ndarray]) -> np.ndarray:
    return logits_of(PlainGate(model.linears, team))
