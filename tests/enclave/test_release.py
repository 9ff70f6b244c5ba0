"""What leaves of the logits: the same noise for the same question, another for another, none to subtract."""

import numpy as np
import pytest

from cloister.enclave.release import Release
from cloister.errors import RequestError

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
