"""Chat templates: what transformers renders, and nothing that a sandbox should stop."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import RequestError, TokenizerError
from cloister.model import chat_template
from cloister.model.chat_template import ChatTemplate
from cloister.model.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": "  4 <b>"},
    {"role": "user", "content": "Danke schön 🙂"},
]
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = """
{#- Blocks on their own lines, a namespace, loop controls, the date, JSON and the training mark. -#}
{%- set ns = namespace(last=-1) %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% endgeneration %}
    {% continue %}
    {%- endif %}
    {%- set ns.last = loop.index0 %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
<|{{ message.role }}|>{{ message | tojson }}{{ message.content | tojson(indent=2) }}{{ dict(a=1).a }}
{% endfor %}
{%- if tools is not none %}TOOLS{% endif %}
{%- if documents is not none %}DOCUMENTS{% endif %}
{{ ns.last }} {{ bos_token }} {{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}>{% endif %}

"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [LLAMA2, BLOCKS], ids=["llama 2", "blocks"])
@pytest.mark.parametrize("prompting", [True, False])
def test_templates_render_as_in_transformers(source: str, prompting: bool) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils", reason="the oracle is transformers")
    expected = utilities.render_jinja_template(
        conversations=[CHAT], chat_template=source, add_generation_prompt=prompting, **SPECIAL
    )[0][0]
    assert ChatTemplate(source, SPECIAL).render(CHAT, prompting) == expected


@settings(max_examples=50)
@given(
    chat=st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}
        ),
        min_size=1,
        max_size=5,
    ),
    prompting=st.booleans(),
)
def test_a_real_tokenizer_prompts_as_in_transformers(
    chat: list[dict[str, str]], prompting: bool, mistral: tuple[Tokenizer, Any]
) -> None:
    ours, theirs = mistral
    assert ours.render_chat(chat, prompting) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=prompting
    )
    assert ours.encode_chat(chat, prompting) == list(
        theirs.apply_chat_template(chat, add_generation_prompt=prompting)["input_ids"]
    )


@pytest.fixture(scope="module")
def mistral(shared_assets: Path) -> tuple[Tokenizer, Any]:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    directory = shared_assets / "tokenizers" / "mistral-v0.1-chatml"
    # The file as it is: the class for Llama tokenizers would build another pre-tokenizer in place of the file's.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return Tokenizer.open(directory), theirs


def test_entries_that_are_none_are_left_out() -> None:
    template = ChatTemplate("{% for m in messages %}{{ 'name' in m }}{{ m.content }}{% endfor %}", {})
    assert template.render([{"role": "user", "content": "x", "name": None}]) == "Falsex"


def test_the_date_is_the_clock_that_was_given() -> None:
    day = datetime.datetime(2024, 7, 26)
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, lambda: day).render(CHAT) == "26 Jul 2024"


def test_what_a_template_says_in_refusal_is_passed_on() -> None:
    turns = [{"role": "assistant", "content": "secret"}]
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate(LLAMA2, SPECIAL).render(turns)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception(messages[0].content) }}",
        "{{ raise_exception('No: ' + messages[0].content) }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages[0].content + 1 }}",
        "{{ {}[messages[0].content].x }}",
        "{{ messages[0].content | int / 0 }}",
        "{{ messages[9].content.x }}",
    ],
)
def test_a_refusal_never_quotes_the_chat(source: str) -> None:
    with pytest.raises(RequestError) as refused:
        ChatTemplate(source, {}).render([{"role": "user", "content": "the launch code is 0000"}])
    error: BaseException | None = refused.value
    assert error is not None
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert "launch" not in str(error)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__ }}",
        "{{ joiner.__init__ }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update(content='other') }}",
        "{{ messages[0].clear() }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages | attr('__class__') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_the_sandbox_stops_what_reaches_out_of_it(source: str) -> None:
    chat = [{"role": "user", "content": "hello"}]
    try:
        rendered = ChatTemplate(source, {}).render(chat)
    except RequestError:
        rendered = ""
    assert rendered == "", "an attribute that the sandbox hides prints as nothing"
    assert chat == [{"role": "user", "content": "hello"}]


def test_a_prompt_without_end_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARACTERS", 1000)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{{ j }}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="longer than 1000"):
        ChatTemplate(endless, {}).render(CHAT)


class _Tempting(str):
    __slots__ = ()


@pytest.mark.parametrize("content", [Path(), b"x", {1: "x"}, {1, 2}, object(), [object()], _Tempting("x")])
def test_messages_are_json_values_only(content: Any) -> None:
    with pytest.raises(RequestError, match="A chat message holds"):
        ChatTemplate("{{ messages }}", {}).render([{"role": "user", "content": content}])


def test_messages_nested_without_end_are_refused() -> None:
    content: list[Any] = []
    content.append(content)
    with pytest.raises(RequestError, match="A chat message holds"):
        ChatTemplate("{{ messages }}", {}).render([{"role": "user", "content": content}])


def test_an_empty_chat_is_refused() -> None:
    with pytest.raises(RequestError, match="no message"):
        ChatTemplate("x", {}).render([])


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% for m in messages %}", "{% unknown %}", "{{ x | nofilter }}"])
def test_a_template_that_does_not_compile_is_a_tokenizer_error(source: str) -> None:
    with pytest.raises(TokenizerError, match="does not compile"):
        ChatTemplate(source, {})


def test_a_template_without_end_is_refused() -> None:
    with pytest.raises(TokenizerError, match="longer than"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1), {})


def test_nesting_that_no_parser_survives_is_refused() -> None:
    with pytest.raises(TokenizerError, match="does not compile"):
        ChatTemplate("{{ " + "(" * 5000 + ")" * 5000 + " }}", {})
