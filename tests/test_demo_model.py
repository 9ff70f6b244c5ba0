"""The shipped model: small, complete, coherent, and made by the recipe in the repository."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import cloister
from cloister.assets import demo_model
from cloister.model.directory import open_model

RECIPE = Path(__file__).resolve().parent.parent / "examples" / "demo_model"


@pytest.fixture
def stories() -> Iterator[ModuleType]:
    sys.path.insert(0, str(RECIPE))
    import stories as module

    yield module
    sys.path.remove(str(RECIPE))


def test_the_assets_are_complete_and_small() -> None:
    files = {path.name for path in demo_model().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    } <= files
    assert {"README.md", "heldout.txt"} <= files
    assert sum(path.stat().st_size for path in demo_model().iterdir()) < 8 * 2**20
    assert json.loads((demo_model() / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_every_text_survives_the_tokenizer() -> None:
    tokenizer = open_model(demo_model()).tokenizer
    for text in ("Once upon a time", "naïve 東京 🦊\n\ttabs", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_generator_is_deterministic_and_honours_requests(stories: ModuleType) -> None:
    assert stories.story(5) == stories.story(5)
    assert len({stories.story(seed) for seed in range(300)}) == 300
    for seed in range(200):
        request, answer = stories.conversation(seed)
        nouns = [kind.noun for kind in stories.words.KINDS if f" {kind.noun}" in request]
        assert all(noun in answer for noun in nouns)


def test_the_held_out_stories_come_from_seeds_that_are_not_trained_on(stories: ModuleType) -> None:
    held_out = (demo_model() / "heldout.txt").read_text(encoding="utf-8")
    assert held_out.startswith(stories.story(900_000_000))
    assert stories.story(10_001) not in held_out


def test_the_chat_template_renders_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A story?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Another."},
    ]
    ours = open_model(demo_model()).tokenizer.render_chat(messages)
    theirs = transformers.AutoTokenizer.from_pretrained(demo_model()).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs


def test_stories_are_made_of_the_generators_words_and_keep_their_hero(stories: ModuleType) -> None:
    vocabulary = {word.strip('.,!?"\n') for seed in range(3000) for word in stories.story(seed).split()}
    with cloister.load(demo_model()) as llm:
        for seed, (noun, name) in enumerate((("fox", "Max"), ("cat", "Lily"), ("owl", "Oscar"))):
            request = f"Tell me a story about {name} the {noun}."
            reply = llm.chat([{"role": "user", "content": request}], seed=seed, max_new_tokens=300)
            words = [word.strip('.,!?"\n') for word in reply.text.split()]
            assert len(words) > 50
            assert sum(word in vocabulary for word in words) / len(words) > 0.97
            assert reply.text.count(name) >= 3
            assert reply.finished is not None
            assert reply.finished.reason == "stop"
