"""How a chat becomes a prompt: the model's own Jinja template, rendered as transformers renders it, in a sandbox.

Covers: a template that reaches for Python's internals or changes what it is given (Jinja's immutable sandbox), one that is
given objects with methods (messages are rebuilt from plain JSON values), one that writes without end (the prompt is
bounded), and one whose error quotes the chat (only the template's own words are repeated).
Does not cover: a template that computes without end, or that words the prompt badly. Use models whose publisher you trust.
Nor does it escape special tokens that a message spells out: as in transformers, text such as `<|im_end|>` is that token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cloister.errors import RequestError, TokenizerError

MAX_TEMPLATE_CHARACTERS: Final = 2**20
"""Longest chat template that is compiled."""

MAX_PROMPT_CHARACTERS: Final = 2**25
"""Longest prompt that is rendered: many times the longest context."""


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        """Compiles `source`; templates may read `special_tokens` (`bos_token` and so on) and, by `now`, the date.

        Raises:
            TokenizerError: the template is too long or is not one.
        """
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TokenizerError(
                f"The chat template is longer than {MAX_TEMPLATE_CHARACTERS} characters.",
                remedy="It is not a template of a usable model.",
            )
        self._source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise TokenizerError(
                f"The chat template does not compile ({error}).", remedy="Fetch the model's tokenizer files again."
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt of a chat; messages are plain JSON values, and entries that are None are left out.

        Raises:
            RequestError: the template refuses the messages (for instance, roles that do not alternate).
        """
        if not messages:
            raise RequestError("The chat has no message.", remedy="Give at least one.")
        plain = [{key: _plain(value) for key, value in m.items() if value is not None} for m in messages]
        pieces: list[str] = []
        written = 0
        try:
            for piece in self._template.generate(
                **self._special_tokens,
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                written += len(piece)
                if written > MAX_PROMPT_CHARACTERS:
                    raise RequestError(f"The chat is longer than {MAX_PROMPT_CHARACTERS} characters.")
                pieces.append(piece)
        except RequestError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            # Not chained: what the template was working on is the chat, and errors must not carry it into a log.
            raise RequestError(f"The model's chat template refuses the chat{self._reason(error)}.") from None
        return "".join(pieces)

    def _reason(self, error: Exception) -> str:
        """Returns the error's text where the template's author wrote it literally; the chat may be quoted in any other."""
        if isinstance(error, _RefusedByTemplate):
            said = str(error)
            return f": {said.rstrip('.')}" if said and said in self._source else ""
        return f" ({type(error).__name__})"


class _RefusedByTemplate(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """Accepts `{% generation %}`, which marks the assistant's words for training and prints its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    for unused in ("lipsum", "cycler", "joiner"):
        del environment.globals[unused]
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise _RefusedByTemplate(str(message))


def _plain(value: Any, depth: int = 0) -> Any:
    """Returns a copy built of JSON types only."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth < 32 and isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if depth < 32 and isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    raise RequestError(
        f"A chat message holds a {type(value).__name__}.",
        remedy="Give text, numbers, lists and objects with text keys, at most 32 deep.",
    )
