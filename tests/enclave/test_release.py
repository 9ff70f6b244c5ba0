"""What leaves of the logits: the same noise for the same question, another for another, none to subtract."""

import numpy as np
import pytest

from cloister.enclave.engine import Engine
from cloister.enclave.release import Release
from cloister.enclave.sampling import Sampler, SamplingSettings
from cloister.errors import RequestError
from cloister.wire.session import Generate, Sampling

LOGITS = np.linspace(-4, 4, 2000, dtype=np.float32)


def noise(release: Release, context: list[int], adapter: str = "") -> np.ndarray:
    return release.apply(LOGITS, context, adapter) - LOGITS


def test_noise_has_its_size_and_comes_again() -> None:
    release = Release(0.5)
    first = noise(release, [1, 2, 3])
    assert first.std() == pytest.approx(0.5, rel=0.1)
    np.testing.assert_array_equal(first, noise(release, [1, 2, 3]))
    assert Release().apply(LOGITS, [1]) is LOGITS


def test_noise_of_another_context_adapter_or_process_is_independent() -> None:
    release = Release(0.5)
    base = noise(release, [1, 2, 3])
    others = (noise(release, [1, 2, 4]), noise(release, [1, 2, 3], "private"), noise(Release(0.5), [1, 2, 3]))
    for other in others:  # what a public base tells of its own noise cancels none of an adapter's
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.15


def test_withheld_logprobs_are_refused_before_anything_runs() -> None:
    with pytest.raises(RequestError, match="withheld"):
        Release(logprobs=False).check(1)
    Release(logprobs=False).check(0)


def test_biases_tell_logits_by_the_choice_of_tokens_and_are_refused_where_those_are_withheld() -> None:
    low, high = 0.0, 16.0
    for _ in range(
        30
    ):  # what a client does that sees no log-probability: is token 7, with this bias, above the likeliest one?
        bias = (low + high) / 2
        chosen = Sampler(SamplingSettings(temperature=0, logit_bias={7: bias}), LOGITS.size, [0]).sample(LOGITS).token
        low, high = (low, bias) if chosen == 7 else (bias, high)
    assert high == pytest.approx(float(LOGITS[-1] - LOGITS[7]), abs=1e-6)
    with pytest.raises(RequestError, match="logit_bias"):
        Release(logprobs=False).check(0, biased=True)
    Release(0.5).check(0, biased=True)
    engine = Engine.__new__(Engine)  # it asks before it looks at anything else
    engine.release = Release(logprobs=False)
    asked = Generate(Sampling(logit_bias={7: 1.0}), prompt="x")
    with pytest.raises(RequestError, match="logit_bias"):
        next(engine.generate(asked, lambda: None, lambda _: None))
