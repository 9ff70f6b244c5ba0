"""LoRA adapters as PEFT writes them: merged into our float32 model they give PEFT's own logits; refusals name the cause."""

import pytest

pytest.importorskip("peft", reason="the oracle is PEFT: make setup installs it")

from pathlib import Path

import numpy as np

from cloister.model.adapters import open_adapter
from cloister.model.directory import open_checked
from cloister.model.llama import Llama
from cloister.model.merged import MergedWeights
from cloister.model.spec import read_spec
from peft_models import FAMILIES, VARIANTS, VOCABULARY, logits_of, write_adapter, write_base

LOGIT_TOLERANCE = 2e-5
"""Of the largest logit: float32 sums of about a hundred terms through a few layers, in another order."""

TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 24).tolist()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family.replace(" ", "-"))
        write_base(family, made[family])
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_those_of_peft(family: str, variant: str, bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = logits_of(write_adapter(bases[family], tmp_path, **VARIANTS[variant]), TOKENS)
    spec = read_spec(bases[family] / "config.json")
    with open_checked(bases[family], spec) as base:
        merged = MergedWeights(spec, base, open_adapter("a", tmp_path, spec, base))
        ours = Llama(merged.spec, merged).forward(TOKENS)
        plain = Llama(spec, base).forward(TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=LOGIT_TOLERANCE * np.abs(theirs).max(), rtol=0)
    assert np.abs(plain - theirs).max() > 100 * LOGIT_TOLERANCE * np.abs(theirs).max(), "the adapter must matter"
