"""Text to tokens and back, and chats to prompts: `tokenizer.json` and the model's own chat template.

Covers: the `tokenizers` library for the former, Jinja2's immutable sandbox for the latter, as transformers does.
Guarantees: a template can neither reach attributes of Python objects nor change what it is given.
Does not cover: streaming (see `enclave.detokenise`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HuggingFaceTokenizer

from cloister.errors import ModelError, RequestError, TokenizerError
from cloister.model.files import read_bytes, read_object
from cloister.model.generation_config import token_ids

MAX_TEMPLATE_CHARACTERS: Final = 2**20
"""Longest chat template that is compiled."""


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(
        self, fast: HuggingFaceTokenizer, config: dict[str, Any], template: str | None, eos_ids: set[int]
    ) -> None:
        self._fast = fast
        self._config = config
        self._template = template
        self.eos_ids = frozenset(eos_ids)
        """Tokens that end an answer."""

    @staticmethod
    def open(directory: Path) -> "Tokenizer":
        """Returns the tokenizer of a model directory.

        Raises:
            TokenizerError: `tokenizer.json` is absent or damaged.
        """
        path = directory / "tokenizer.json"
        if not path.exists():
            raise TokenizerError(
                f"{directory} has no tokenizer.json.",
                remedy="Fetch it, or convert tokenizer.model: AutoTokenizer.from_pretrained(dir).save_pretrained(dir).",
            )
        try:
            fast = HuggingFaceTokenizer.from_buffer(read_bytes(path))
        except ModelError:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise TokenizerError(f"{path} is not a usable tokenizer: {error}.", remedy="Fetch it again.") from error
        fast.no_truncation()
        fast.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = read_object(config_path) if config_path.exists() else {}
        return Tokenizer(fast, config, _template(directory, config), _eos_ids(directory, fast, config))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a chat becomes a prompt."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer knows, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of `text`, with the beginning-of-sequence token where the model wants one."""
        try:
            ids = list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:
            raise RequestError("The text cannot be tokenised.", remedy="It must be valid Unicode.") from error
        bos = self._fast.token_to_id(self._special("bos_token") or "")
        if add_special_tokens and self._config.get("add_bos_token") and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; incomplete multi-byte characters show as U+FFFD."""
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt of a chat, by the model's own template.

        Raises:
            TokenizerError: the model has no chat template.
            RequestError: the template refuses the messages (for instance, roles that do not alternate).
        """
        if self._template is None:
            raise TokenizerError(
                "This model has no chat template.", remedy="Use `generate` with a plain prompt, or a chat-tuned model."
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: text for name in names if (text := self._special(name)) is not None}
        try:
            template = environment.from_string(self._template)
            return template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **special
            )
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"The chat template is damaged: {error}.", remedy="Fetch the model again.") from error
        except (jinja2.TemplateError, TypeError) as error:
            raise RequestError(f"The chat template refuses the messages: {error}.") from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the tokens of a chat, ready for the answer; the template writes the special tokens itself."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """Returns the chat template: its own file, or an entry of the config (one text, or named ones)."""
    path = directory / "chat_template.jinja"
    value: Any = config.get("chat_template")
    if path.exists():
        value = read_bytes(path).decode("utf-8", "strict")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEMPLATE_CHARACTERS):
        raise TokenizerError(f"The chat template in {directory} is not a text of usable length.")
    return value


def _eos_ids(directory: Path, fast: HuggingFaceTokenizer, config: dict[str, Any]) -> set[int]:
    """Returns the end tokens that any of the model's files names."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.exists():
            ids |= set(token_ids(path, read_object(path).get("eos_token_id")))
    text = config.get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    token = fast.token_to_id(text) if isinstance(text, str) else None
    return ids | ({token} if token is not None else set())
