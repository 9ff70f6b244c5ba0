"""Every policy runs end to end, in the real enclave process, and answers; what is insecure is refused or loud."""

import pytest

from cloister import load
from cloister.assets import demo_model
from cloister.errors import PlanError, RequestError
from cloister.model.spec import read_spec
from cloister.plan.policies import POLICIES
from cloister.settings import BlindingSettings, PlanSettings, Settings

PROMPT = "Once upon a time"
SOUND = [name for name, policy in POLICIES.items() if not policy.insecure]


def settings(policy: str, **chosen: object) -> Settings:
    return Settings(
        blinding=BlindingSettings(pantry_bytes=8 * 2**20),
        plan=PlanSettings(policy=policy, **chosen),  # type: ignore[arg-type]
    )


def model_layers() -> int:
    return read_spec(demo_model() / "config.json").layers


@pytest.fixture(scope="module")
def expected() -> str:
    with load(demo_model(), settings("enclave-only")) as model:
        return model.generate(PROMPT, max_new_tokens=10, temperature=0.0).text


@pytest.mark.parametrize("policy", SOUND)
def test_a_sound_policy_answers_as_the_enclave_alone(policy: str, expected: str) -> None:
    with load(demo_model(), settings(policy)) as model:
        assert model.info.policy == policy
        assert not model.info.warning
        reply = model.generate(PROMPT, max_new_tokens=10, temperature=0.0)
        assert reply.text == expected
        assert reply.finished is not None
        lent = reply.finished.meter.products
        assert (lent > 0) == (policy in ("blinded", "secureinfer", "secureinfer-strict", "slalom")) or policy == "auto"


@pytest.mark.parametrize("policy", ["unprotected", "obfuscated"])  # the benchmark of plans runs them all
def test_an_insecure_policy_is_refused_by_default_and_loud_on_consent(policy: str) -> None:
    with pytest.raises(PlanError, match="INSECURE") as refused:
        load(demo_model(), settings(policy))
    assert "--allow-insecure-baseline" in refused.value.remedy
    with load(demo_model(), settings(policy, allow_insecure_baseline=True)) as model:
        assert "INSECURE" in model.info.warning
        assert model.generate(PROMPT, max_new_tokens=6, temperature=0.0).text


def test_an_unknown_policy_or_threat_runs_nothing() -> None:
    for wrong in (settings("blindedd"), settings("blinded", threat="none")):
        with pytest.raises(PlanError, match="Unknown"):
            load(demo_model(), wrong)


def test_a_private_model_is_computed_inside_and_its_logits_stay_there(expected: str) -> None:
    with load(demo_model(), settings("blinded", threat="private-model")) as model:
        assert model.info.accelerators == ()
        reply = model.generate(PROMPT, max_new_tokens=10, temperature=0.0)
        deltas = list(reply.deltas())
        assert "".join(delta.text for delta in deltas) == expected
        assert not any(delta.logprobs for delta in deltas)
        with pytest.raises(RequestError, match="withheld"):
            model.generate(PROMPT, max_new_tokens=2, top_logprobs=2).text  # noqa: B018
    with load(demo_model(), settings("blinded", threat="private-model", logit_noise=0.2)) as model:
        first, again = (list(model.generate(PROMPT, max_new_tokens=3, temperature=0.0).deltas()) for _ in range(2))
        assert first[0].logprobs
        assert [delta.logprobs for delta in first] == [delta.logprobs for delta in again]  # nothing to average
    with load(demo_model(), settings("blinded", logit_noise=0.2)) as model:
        other = list(model.generate(PROMPT, max_new_tokens=3, temperature=0.0).deltas())
        assert other[0].logprobs != first[0].logprobs  # another key


def test_rules_keep_a_product_inside(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rules = tmp_path / "plan.toml"
    rules.write_text('[tensors]\n"model.layers.0.*proj.weight" = "secret"\n"model.embed_tokens.weight" = "enclave"\n')
    with load(demo_model(), settings("blinded", rules=str(rules))) as model:
        finished = model.generate(PROMPT, max_new_tokens=4, temperature=0.0)
        list(finished.deltas())
        assert finished.finished is not None
        passes = 4  # a prefill and three decoded tokens; the prompt is lent if its pads are stocked
        layers = model_layers() - 1
        assert finished.finished.meter.products in (4 * layers * passes, 4 * layers * (passes - 1))
