"""Adapters in a real session: chosen per request, never mixed, refused with a remedy."""

import pytest

pytest.importorskip("peft", reason="the adapters are written by PEFT: make setup installs it")

import shutil
from collections.abc import Iterator
from pathlib import Path

import cloister
from cloister.assets import demo_model
from cloister.attest.measure import Part, measure, this_program
from cloister.errors import AdapterError, CheckpointError, RequestError
from cloister.local.client import LLM
from cloister.local.confined import ConfinedServer
from cloister.seal.policy import parse_policy
from cloister.settings import Settings
from cloister.wire.session import Rehearsal
from peft_models import PLAIN, write_adapter, write_base

CHAT = [{"role": "user", "content": "Tell me a story about a fox and a kite."}]
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("red", "blue")}
    write_adapter(demo_model(), made["red"], seed=1, **PLAIN)
    write_adapter(demo_model(), made["blue"], seed=2, **{**PLAIN, "target_modules": "all-linear", "use_dora": True})
    return made


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(demo_model(), rehearsal=Rehearsal(observe=True), adapters=folders) as model:
        yield model


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, str]:
    """What each adapter, and the base, answers when nothing else is loaded."""
    answers = {}
    for name, adapters in {"": {}, **{name: {name: path} for name, path in folders.items()}}.items():
        with LLM(demo_model(), adapters=adapters) as model:
            answers[name] = model.chat(CHAT, adapter=name, **GREEDY).text
    assert len(set(answers.values())) == 3
    return answers


def test_requests_choose_their_adapter_and_switching_leaves_no_trace(llm: LLM, alone: dict[str, str]) -> None:
    for name in ("red", "blue", "", "blue", "red", ""):
        reply = llm.chat(CHAT, adapter=name, **GREEDY)
        assert reply.text == alone[name]
        assert reply.finished is not None
        assert reply.finished.cached_tokens == 0, "keys and values of another adapter must not be used"
    again = llm.chat(CHAT, **GREEDY)
    assert again.text == alone[""]
    assert again.finished is not None
    assert again.finished.cached_tokens > 0, "the same adapter keeps its cache"
    assert llm.sightings().uniform


def test_receipts_name_a_measurement_that_covers_the_adapters(llm: LLM, folders: dict[str, Path]) -> None:
    reply = llm.chat(CHAT, adapter="red", **GREEDY)
    assert reply.text
    assert reply.receipt is not None
    subject = this_program(Settings(), model=demo_model(), adapters=folders, isolated=True)
    assert reply.receipt.statement.measurement == measure(subject).digest
    assert {item.name for item in measure(subject).part(Part.ADAPTER)} >= {
        f"{name}/adapter_model.safetensors" for name in folders
    }


def test_adapters_are_served_to_clients_elsewhere(
    folders: dict[str, Path], alone: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with ConfinedServer(demo_model(), listen="127.0.0.1:0", adapters=folders) as server:
        policy, roots = parse_policy(server.policy)
        with cloister.connect(server.address, policy=policy, roots=roots) as llm:
            assert {adapter.name for adapter in llm.info.adapters} == set(folders)
            for name in ("red", ""):
                assert llm.chat(CHAT, adapter=name, **GREEDY).text == alone[name]


def test_what_is_loaded_is_told(llm: LLM) -> None:
    red, blue = llm.info.adapters
    assert (red.name, blue.name) == ("red", "blue")
    assert red.products < blue.products
    assert red.largest_rank == 4
    assert red.memory_bytes > 4 * red.parameters * 0.9
    assert red.has_chat_template == llm.info.has_chat_template


def test_an_unknown_adapter_is_refused_and_changes_nothing(llm: LLM, alone: dict[str, str]) -> None:
    assert llm.chat(CHAT, adapter="red", **GREEDY).text == alone["red"]
    with pytest.raises(RequestError, match="green") as refused:
        _ = llm.chat(CHAT, adapter="green", **GREEDY).text
    assert "red, blue" in refused.value.remedy
    reply = llm.chat(CHAT, adapter="red", **GREEDY)
    assert reply.text == alone["red"]
    assert reply.finished is not None
    assert reply.finished.cached_tokens > 0


def test_an_adapter_with_its_own_chat_template_and_defaults_uses_them(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["red"], tmp_path / "own")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / file, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1]['content'] }} Once")
    (tmp_path / "own" / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 7}')
    with LLM(demo_model(), adapters={"own": tmp_path / "own"}) as model:
        own = model.chat(CHAT, adapter="own", ignore_eos=True)
        assert own.text == model.generate(f"{CHAT[0]['content']} Once", adapter="own", ignore_eos=True).text
        assert own.finished is not None
        assert own.finished.completion_tokens == 7
        base = model.chat(CHAT, **GREEDY)
        assert base.text
        assert base.finished is not None
        assert base.finished.completion_tokens == 24


@pytest.mark.parametrize("name", ["base", "", "a b", "x" * 65, "../x"])
def test_names_are_checked(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="cannot be called"):
        LLM(demo_model(), adapters={name: folders["red"]})


def test_an_adapter_of_another_base_or_a_damaged_one_stops_the_opening(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    write_base("llama", tmp_path / "other")
    write_adapter(tmp_path / "other", tmp_path / "foreign", **PLAIN)
    with pytest.raises(AdapterError, match="needs"):
        LLM(demo_model(), adapters={"foreign": tmp_path / "foreign"})
    shutil.copytree(folders["red"], tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        LLM(demo_model(), adapters={"cut": tmp_path / "cut"})
