"""Sampling against transformers' processors and naive twins."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cloister.enclave.sampling import Sampler, SamplingSettings
from cloister.errors import NonFiniteError, RequestError

VOCAB = 50


def make_logits(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=VOCAB) * 3).astype(np.float32)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
)
def test_the_distribution_equals_transformers(choices: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    prompt = [3, 7, 7, 11]
    processors = []
    if "repetition_penalty" in choices:
        processors.append(process.RepetitionPenaltyLogitsProcessor(choices["repetition_penalty"]))
    if "temperature" in choices:
        processors.append(process.TemperatureLogitsWarper(choices["temperature"]))
    if "top_k" in choices:
        processors.append(process.TopKLogitsWarper(int(choices["top_k"])))
    if "top_p" in choices:
        processors.append(process.TopPLogitsWarper(choices["top_p"]))
    if "min_p" in choices:
        processors.append(process.MinPLogitsWarper(choices["min_p"]))
    for seed in range(20):
        logits = make_logits(seed)
        scores = torch.tensor(logits)[None]
        for processor in processors:
            scores = processor(torch.tensor([prompt]), scores)
        expected = torch.softmax(scores.double(), -1)[0].numpy()
        sampler = Sampler(SamplingSettings(**choices), VOCAB, prompt)  # type: ignore[arg-type]
        kept, probabilities = sampler._distribution(sampler._penalised(logits))
        actual = np.zeros(VOCAB)
        actual[kept] = probabilities
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def naive_distribution(scores: np.ndarray, choices: SamplingSettings) -> np.ndarray:
    """The twin: sorts everything, one filter after the other; for scores without ties."""
    probabilities = np.exp((scores.astype(np.float64) - scores.max()) / choices.temperature)
    probabilities /= probabilities.sum()
    order = sorted(range(scores.size), key=lambda token: -probabilities[token])
    if choices.top_k:
        order = order[: choices.top_k]
    share = probabilities[order] / probabilities[order].sum()
    count = 1
    while count < len(order) and share[:count].sum() < choices.top_p:
        count += 1
    order, share = order[:count], share[:count]
    order = [token for token, chance in zip(order, share, strict=True) if chance >= choices.min_p * share[0]]
    result = np.zeros(scores.size)
    result[order] = probabilities[order] / probabilities[order].sum()
    return result


@settings(max_examples=200)
@given(
    st.integers(1, 3000),
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 3),
    st.integers(0, 60),
    st.floats(1e-9, 1),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_the_distribution_equals_the_naive_twin(
    vocab: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    # Distinct scores: a shuffled ladder, bent so that there is a head and a tail.
    scores = np.random.default_rng(seed).permutation(np.sqrt(np.arange(vocab)) / 3).astype(np.float32)
    choices = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, probabilities = Sampler(choices, vocab, [])._distribution(scores)
    assert len(set(kept.tolist())) == kept.size
    actual = np.zeros(vocab)
    actual[kept] = probabilities
    expected = naive_distribution(scores, choices)
    # A share that falls on top_p exactly may round either way; then one token of the edge is in or out.
    if np.count_nonzero(actual) == np.count_nonzero(expected):
        np.testing.assert_allclose(actual, expected, atol=1e-12)
    else:
        assert abs(np.count_nonzero(actual) - np.count_nonzero(expected)) == 1


def test_tokens_that_tie_with_the_last_of_top_k_are_kept_as_in_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    kept, probabilities = Sampler(SamplingSettings(top_k=2), 6, [])._distribution(logits)
    theirs = torch.softmax(process.TopKLogitsWarper(2)(None, torch.tensor(logits)[None]), -1)[0]
    assert sorted(kept.tolist()) == [1, 2, 3, 4]
    np.testing.assert_allclose(probabilities, theirs[torch.tensor(kept)], atol=1e-6)


def test_top_p_of_equal_tokens_keeps_that_share_of_them() -> None:
    kept, probabilities = Sampler(SamplingSettings(top_p=0.5), 8, [])._distribution(np.zeros(8, np.float32))
    assert kept.size == 4
    assert probabilities == pytest.approx(0.25)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = make_logits(2)
    assert Sampler(SamplingSettings(temperature=temperature), VOCAB, []).sample(logits).token == logits.argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_choose_no_token(temperature: float, bad: float) -> None:
    logits = make_logits(3)
    logits[7] = bad
    sampler = Sampler(SamplingSettings(temperature=temperature, frequency_penalty=1.0), VOCAB, [])
    for broken in (logits, np.full(VOCAB, bad, np.float32), np.full(VOCAB, -np.inf, np.float32)):
        with pytest.raises(NonFiniteError):
            sampler.sample(broken)
    np.testing.assert_array_equal(sampler._penalised(make_logits(3)), make_logits(3), "something was remembered")


def test_penalties_that_overflow_choose_no_token() -> None:
    logits = np.full(VOCAB, 1e38, np.float32)
    with pytest.raises(NonFiniteError, match="repetition penalty"):
        Sampler(SamplingSettings(repetition_penalty=1e-3), VOCAB, [4]).sample(logits)


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[10, 20]] = 1.0, 2.0
    sampler = Sampler(SamplingSettings(seed=3), VOCAB, [])
    assert {sampler.sample(logits).token for _ in range(200)} == {10, 20}


def test_the_end_of_the_random_range_draws_a_token_with_a_probability() -> None:
    class Nearly(np.random.Philox):
        """A generator whose next number is the largest below one."""

        def random(self) -> float:
            return float(np.nextafter(1.0, 0.0))

    sampler = Sampler(SamplingSettings(seed=1), VOCAB, [])
    sampler._random = Nearly()  # type: ignore[assignment]
    for seed in range(50):
        probabilities = np.random.default_rng(seed).dirichlet(np.ones(40))
        assert sampler._draw(np.concatenate([probabilities, np.zeros(5)])) == 39


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    settings_ = SamplingSettings(temperature=0, frequency_penalty=0.5, presence_penalty=2.0)
    sampler = Sampler(settings_, VOCAB, [1, 1, 1])
    logits = np.zeros(VOCAB, np.float32)
    logits[4] = 10
    assert [sampler.sample(logits).token for _ in range(3)] == [4, 4, 4]
    penalised = sampler._penalised(logits)
    assert penalised[4] == pytest.approx(10 - 3 * 0.5 - 2.0)
    assert penalised[1] == 0


def test_bias_and_log_probabilities() -> None:
    logits = make_logits(1)
    sampler = Sampler(SamplingSettings(temperature=0, logit_bias={9: 100.0}, top_logprobs=3), VOCAB, [])
    sampled = sampler.sample(logits)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert sampled.token == 9
    assert sampled.logprob == pytest.approx(exact[9])
    assert list(sampled.top) == list(np.argsort(-logits)[:3])
    assert list(sampled.top.values()) == pytest.approx(sorted(exact)[::-1][:3])


def test_draws_follow_the_distribution_and_a_seed_repeats_them() -> None:
    logits = make_logits(5)
    choices = SamplingSettings(seed=1, top_k=6)
    sampler = Sampler(choices, VOCAB, [])
    draws = [sampler.sample(logits).token for _ in range(4000)]
    kept, probabilities = sampler._distribution(logits)
    counts = np.array([draws.count(int(token)) for token in kept])
    assert counts.sum() == len(draws)
    assert stats.chisquare(counts, probabilities * len(draws)).pvalue > 1e-4
    again = Sampler(choices, VOCAB, [])
    assert [again.sample(logits).token for _ in range(50)] == draws[:50]
    negative = Sampler(SamplingSettings(seed=-1, top_k=6), VOCAB, [])
    assert [negative.sample(logits).token for _ in range(50)] != draws[:50]
    fresh = Sampler(SamplingSettings(top_k=6), VOCAB, [])
    assert [fresh.sample(logits).token for _ in range(200)] != draws[:200]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0),
        ("repetition_penalty", 0.0), ("frequency_penalty", 1e9), ("max_new_tokens", 0), ("top_logprobs", 21),
        ("max_new_tokens", True), ("seed", 2**64), ("stop_token_ids", (-1,)), ("logit_bias", {-1: 1.0}), ("stop", ("",)),
        ("stop", ("a",) * 65), ("logit_bias", {1: float("inf")}),
    ],
)  # fmt: skip
def test_arguments_outside_their_range_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name.split("_")[0]):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]


def test_arguments_of_the_wrong_type_are_named() -> None:
    # In an interpreter of its own: the shape checks of the tests would refuse them first.
    wrong = {
        "temperature": ("hot", None), "top_p": ("1",), "top_k": (2.5, "3"), "max_new_tokens": (1.5, None), "seed": ("x", 1.5),
        "top_logprobs": (2.5,), "stop_token_ids": (("a",),), "logit_bias": ({"a": 1.0}, {1: "x"}), "stop": ((1,),),
    }  # fmt: skip
    program = f"""
from cloister.enclave.sampling import SamplingSettings
from cloister.errors import RequestError
for name, values in {wrong!r}.items():
    for value in values:
        try:
            SamplingSettings(**{{name: value}})
            print(name, value, "was accepted")
        except RequestError as error:
            if name.split("_")[0] not in str(error) or not error.remedy:
                print(name, value, error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="Token 50"):
        Sampler(SamplingSettings(logit_bias={50: 1.0}), VOCAB, [])
