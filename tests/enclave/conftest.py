"""The shipped model as the enclave computes with it, and the tokens of a prompt."""

import pytest

from cloister.assets import demo_model
from cloister.blinding.pads import PadSource
from cloister.enclave.prepare import EnclaveModel, prepare
from cloister.model.directory import open_model
from cloister.settings import BlindingSettings

PROMPT = "Once upon a time, there was a kind fox named Mia."


@pytest.fixture(scope="module")
def model() -> EnclaveModel:
    directory = open_model(demo_model())
    return prepare(directory.checkpoint, directory.spec, BlindingSettings(), PadSource())


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return open_model(demo_model()).tokenizer.encode(PROMPT)
