"""Sampling against transformers' processors and naive twins."""

import numpy as np
import pytest
from scipy import stats

from cloister.enclave.sampling import Sampler, SamplingSettings
from cloister.errors import RequestError

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
    fresh = Sampler(SamplingSettings(top_k=6), VOCAB, [])
    assert [fresh.sample(logits).token for _ in range(200)] != draws[:200]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0),
        ("repetition_penalty", 0.0), ("frequency_penalty", 1e9), ("max_new_tokens", 0), ("top_logprobs", 21),
        ("stop", ("",)), ("stop", ("a",) * 65), ("logit_bias", {1: float("inf")}),
    ],
)  # fmt: skip
def test_arguments_outside_their_range_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name.split("_")[0]):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="Token 50"):
        Sampler(SamplingSettings(logit_bias={50: 1.0}), VOCAB, [])
