"""Fixtures that every test may use: where the optional real models and data are, and small deterministic generators."""

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("cloister", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("cloister")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU in these tests

SHARED_ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, fresh for each test."""
    return np.random.default_rng(20_240_607)


@pytest.fixture(scope="session")
def shared_assets() -> Path:
    """The folder of real models and data beside the project, or a skip that says it is not there."""
    if not SHARED_ASSETS.is_dir():
        pytest.skip("the real models and data (shared/assets beside the project) are not on this machine")
    return SHARED_ASSETS


@pytest.fixture(scope="session")
def tinystories_656k(shared_assets: Path) -> Path:
    """A real trained Llama of 656,000 parameters."""
    return shared_assets / "models" / "tinystories-656k-hf"
