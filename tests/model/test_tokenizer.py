"""Tokenizers: real ones against the libraries they were made for, and every way in which their files can be unusable."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import ModelError, RequestError, TokenizerError
from cloister.model.tokenizer import Tokenizer

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "hello", "world", "<|turn|>", "<|end|>"]
IDS = {word: index for index, word in enumerate(WORDS)}
ADDED = ["<s>", "</s>", "<|turn|>", "<|end|>"]
CONFIG: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}


def words_tokenizer(bos_by_file: bool = False) -> tokenizers.Tokenizer:
    """Returns a tokenizer of eleven words, with special tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token=WORDS[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in ADDED])
    if bos_by_file:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def directory_of(tmp_path: Path, fast: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    fast = fast or words_tokenizer()
    fast.save(str(tmp_path / "tokenizer.json"))
    for name, content in {"tokenizer_config": CONFIG, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def opened(tmp_path: Path, fast: tokenizers.Tokenizer | None = None, **config: Any) -> Tokenizer:
    return Tokenizer.open(directory_of(tmp_path, fast, tokenizer_config={**CONFIG, **config}))


@pytest.mark.parametrize(
    ("bos_by_file", "add_bos", "add_eos", "expected"),
    [
        (False, None, None, [4]),
        (True, None, None, [1, 4]),
        (False, True, None, [1, 4]),
        (True, True, None, [1, 4]),
        (True, False, None, [4]),
        (False, True, True, [1, 4, 2]),
        (False, False, True, [4, 2]),
    ],
)
def test_special_tokens_are_added_as_the_files_say(
    bos_by_file: bool, add_bos: bool | None, add_eos: bool | None, expected: list[int], tmp_path: Path
) -> None:
    config = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    tokenizer = opened(
        tmp_path, words_tokenizer(bos_by_file), **{key: value for key, value in config.items() if value is not None}
    )
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [4]


@pytest.mark.parametrize("bos_by_file", [True, False])
def test_a_prompt_that_spells_out_its_beginning_gets_no_second_one(bos_by_file: bool, tmp_path: Path) -> None:
    config = {} if bos_by_file else {"add_bos_token": True}
    assert opened(tmp_path, words_tokenizer(bos_by_file), **config).encode("<s> a") == [1, 4]


def test_a_bos_that_does_not_exist_is_not_added(tmp_path: Path) -> None:
    assert opened(tmp_path, bos_token=None, add_bos_token=True).encode("a") == [4]


def test_special_tokens_have_their_ids(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, pad_token=WORDS[3])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.vocab_size == len(WORDS)
    assert opened(tmp_path).pad_id is None


def test_the_older_map_of_special_tokens_is_read_where_the_config_is_silent(tmp_path: Path) -> None:
    older = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}
    directory = directory_of(tmp_path, special_tokens_map=older, tokenizer_config={"eos_token": "</s>"})
    tokenizer = Tokenizer.open(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_a_tokenizer_needs_no_file_but_its_own(tmp_path: Path) -> None:
    words_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.encode("hello world") == [7, 8]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, frozenset())


def test_every_file_may_name_tokens_that_end_an_answer(tmp_path: Path) -> None:
    directory = directory_of(tmp_path, generation_config={"eos_token_id": [10, 3]}, config={"eos_token_id": 9})
    assert Tokenizer.open(directory).eos_ids == {2, 3, 9, 10}


@pytest.mark.parametrize("ids", ["2", [2, True], -1, 2.0, [2**40], {"id": 2}])
def test_end_tokens_that_are_none_are_refused(ids: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="token id"):
        Tokenizer.open(directory_of(tmp_path, generation_config={"eos_token_id": ids}))


def test_a_prompt_is_never_cut_or_padded(tmp_path: Path) -> None:
    fast = words_tokenizer()
    fast.enable_truncation(3)
    fast.enable_padding(pad_id=3, pad_token=WORDS[3], length=20)
    assert opened(tmp_path, fast).encode("a b c a b c") == [4, 5, 6, 4, 5, 6]


@pytest.mark.parametrize("normalized", [True, False])
def test_special_tokens_are_left_out_of_text_unless_asked_for(normalized: bool, tmp_path: Path) -> None:
    fast = words_tokenizer()
    fast.normalizer = tokenizers.normalizers.Prepend("_")
    fast.add_special_tokens([tokenizers.AddedToken("<|end|>", normalized=normalized)])
    tokenizer = opened(tmp_path, fast)
    assert tokenizer.decode([1, 7, 8, 10]) == "hello world"
    assert tokenizer.decode([7, 10], skip_special_tokens=False).endswith("<|end|>")


def test_ids_without_a_token_decode_to_nothing(tmp_path: Path) -> None:
    assert opened(tmp_path).decode([4, 999, 5]) == "a b"
    assert opened(tmp_path).decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [2**40], [4, -7]])
def test_what_is_no_token_id_is_refused(ids: list[int], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not token ids"):
        opened(tmp_path).decode(ids)


def test_text_that_is_no_unicode_is_refused_without_being_quoted(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        opened(tmp_path).encode("secret \ud800")
    assert "secret" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------- templates

TEMPLATE = "{{ bos_token }}{% for m in messages %} <|turn|> {{ m.content }} <|end|>{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "form",
    [
        TEMPLATE,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
        {"default": TEMPLATE},
    ],
    ids=["text", "named", "by name"],
)
def test_special_tokens_of_a_template_are_recognised_and_begin_the_prompt_once(form: Any, tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, words_tokenizer(True), chat_template=form, add_bos_token=True)
    assert tokenizer.has_chat_template
    assert tokenizer.encode_chat(HELLO) == [1, 9, 7, 10]


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    directory_of(tmp_path, tokenizer_config={**CONFIG, "chat_template": "other"})
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert Tokenizer.open(tmp_path).render_chat(HELLO) == "<s> <|turn|> hello <|end|>"


@pytest.mark.parametrize("form", [None, [{"name": "tool_use", "template": TEMPLATE}], [], [{"name": []}], [3]])
def test_without_a_chat_template_a_chat_is_refused_with_the_remedy(form: Any, tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, chat_template=form)
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template") as refused:
        tokenizer.encode_chat(HELLO)
    assert "plain prompt" in refused.value.remedy


# ------------------------------------------------------------------------------------------------------ unusable files


def test_without_tokenizer_json_the_remedy_is_to_convert(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json") as refused:
        Tokenizer.open(tmp_path)
    assert "save_pretrained" in refused.value.remedy
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"has a tokenizer\.model") as refused:
        Tokenizer.open(tmp_path)
    assert "sentencepiece" in refused.value.remedy


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"version": "1.0", "model": {"type": "X"}}', b"[" * 10**5]
)
def test_a_damaged_tokenizer_is_a_tokenizer_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.open(tmp_path)


def test_a_tokenizer_whose_native_code_fails_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    directory_of(tmp_path, words_tokenizer(True))
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<gone>"
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="not a usable tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 1}, {"eos_token": {"id": 2}}, {"eos_token": {"content": 2}}, {"add_bos_token": "yes"},
        {"add_eos_token": 1}, {"chat_template": 5}, {"chat_template": {"default": 5}}, {"chat_template": "{% if %}"},
        {"added_tokens_decoder": {"5": {"content": "<|end|>"}}},
        {"added_tokens_decoder": {"11": {"content": "<|new|>"}}},
        {"added_tokens_decoder": {"4": "a"}},
    ],
)  # fmt: skip
def test_a_config_that_is_damaged_or_contradicts_the_tokenizer_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError) as refused:
        opened(tmp_path, **config)
    assert refused.value.remedy


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_files_beside_it_that_are_no_json_are_refused(name: str, tmp_path: Path) -> None:
    directory_of(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(TokenizerError, match=f"{name} is damaged"):
        Tokenizer.open(tmp_path)


def test_a_template_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    directory_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        Tokenizer.open(tmp_path)


# -------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module", params=["models/tinystories-656k-hf", "tokenizers/mistral-v0.1-chatml"])
def real(request: pytest.FixtureRequest, shared_assets: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    directory = shared_assets / request.param
    return Tokenizer.open(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@settings(max_examples=100)
@given(text=st.text(max_size=60))
def test_a_real_tokenizer_encodes_as_the_library_does_and_decodes_back(
    text: str, real: tuple[Tokenizer, tokenizers.Tokenizer]
) -> None:
    ours, library = real
    assert ours.encode(text) == library.encode(text).ids
    assert ours.encode(text, add_special_tokens=False) == library.encode(text, add_special_tokens=False).ids
    if 0 not in ours.encode(text):  # nothing unknown
        assert ours.decode(ours.encode(text)) == text


def test_a_real_model_without_a_chat_template_says_so(tinystories_656k: Path) -> None:
    tokenizer = Tokenizer.open(tinystories_656k)
    assert not tokenizer.has_chat_template
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


def test_a_real_sentencepiece_model_alone_is_refused(shared_assets: Path, tmp_path: Path) -> None:
    shutil.copy(shared_assets / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model but no tokenizer\.json"):
        Tokenizer.open(tmp_path)
