"""Text to tokens and back, and chats to prompts: `tokenizer.json` and the model's own chat template.

Covers: the `tokenizers` library for the former, `model.chat_template` for the latter, as transformers does.
Guarantees: a prompt is never cut silently (truncation saved in the file is switched off), and begins with at most one
beginning-of-sequence token.
Does not cover: streaming (see `enclave.detokenise`); tokenizers without a `tokenizer.json`; and, like the `tokenizers`
library, it follows that file alone, where some releases of transformers rebuild parts of it by the name of the class.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from tokenizers import Tokenizer as HuggingFaceTokenizer

from cloister.errors import CloisterError, RequestError, TokenizerError
from cloister.model.chat_template import MAX_TEMPLATE_CHARACTERS, ChatTemplate
from cloister.model.files import File, Folder, read_bytes, read_object
from cloister.model.generation_config import token_ids

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(
        self,
        fast: HuggingFaceTokenizer,
        special_tokens: Mapping[str, str],
        template: ChatTemplate | None,
        eos_ids: Iterable[int],
        *,
        add_bos: bool | None = None,
        add_eos: bool = False,
    ) -> None:
        """Wraps `fast`; `add_bos` None leaves special tokens to its own post-processor."""
        self._fast = fast
        self._template = template
        self._add_bos = add_bos
        self._add_eos = add_eos
        self.bos_id = self._id(special_tokens.get("bos_token"))
        """The beginning-of-sequence token, if the model has one."""
        self.eos_id = self._id(special_tokens.get("eos_token"))
        """The tokenizer's end-of-sequence token, if it has one."""
        self.pad_id = self._id(special_tokens.get("pad_token"))
        """The padding token, if there is one."""
        added = fast.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        own = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids = frozenset({*eos_ids, *own})
        """Tokens that end an answer: every one that any of the model's files names."""

    @staticmethod
    def open(directory: Folder, ends: Iterable[int] = ()) -> "Tokenizer":
        """Returns the tokenizer of a model directory; `ends`: further tokens that end an answer.

        Raises:
            TokenizerError: `tokenizer.json` is absent, or a file is damaged or contradicts another.
        """
        fast = _read_fast(directory)
        path = directory / "tokenizer_config.json"
        config = read_object(path, TokenizerError) if path.exists() else {}
        _check_added_tokens(path, config, fast)
        special = _special_tokens(directory, config)
        source = _template_source(directory, config)
        add_bos = _flag(path, config, "add_bos_token")
        if add_bos and special.get("bos_token") is None:
            add_bos = None
        return Tokenizer(
            fast,
            special,
            None if source is None else ChatTemplate(source, special),
            {*_eos_ids(directory), *ends},
            add_bos=add_bos,
            add_eos=bool(_flag(path, config, "add_eos_token")),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a chat becomes a prompt."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer knows, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def pieces(self) -> list[str]:
        """Returns every token as the tokenizer writes it, by id; "" for a number without a token and for control tokens."""
        held = self._fast.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(held.values(), default=-1) + 1)
        for piece, token in held.items():
            if token not in self._special_ids:
                pieces[token] = piece
        return pieces

    @property
    def vocabulary(self) -> dict[str, int]:
        """The number of every token, added ones included."""
        return dict(self._fast.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of `text`; with `add_special_tokens`, also those that the model wants around any text.

        Special tokens that `text` spells out are recognised.

        Raises:
            RequestError: `text` cannot be tokenised.
        """
        by_file = add_special_tokens and self._add_bos is None
        with _library(RequestError("The text cannot be tokenised.", remedy="It must be valid Unicode.")):
            ids = list(self._fast.encode(text, add_special_tokens=by_file).ids)
        if add_special_tokens and not by_file:
            ids = self._begun(ids)
            if self._add_eos and self.eos_id is not None:
                ids.append(self.eos_id)
        elif add_special_tokens and self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            del ids[0]  # one from the file's post-processor, one that the text spells out
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; incomplete multi-byte characters show as U+FFFD, ids without a token as nothing.

        Raises:
            RequestError: an id is negative or no 32-bit number.
        """
        # The library itself fails to skip special tokens that are marked as normalised.
        kept = [token for token in ids if token not in self._special_ids] if skip_special_tokens else list(ids)
        with _library(RequestError("These numbers are not token ids.")):
            return str(self._fast.decode(kept, skip_special_tokens=False))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt of a chat, by the model's own template.

        Raises:
            TokenizerError: the model has no chat template.
            RequestError: the template refuses the messages (for instance, roles that do not alternate).
        """
        if self._template is None:
            raise TokenizerError(
                "This model has no chat template.",
                remedy="Give a plain prompt (`cloister generate`), or use a chat-tuned model.",
            )
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the tokens of a chat, ready for the answer; the template writes the special tokens itself.

        Raises:
            As `render_chat` and `encode`.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def _begun(self, ids: list[int]) -> list[int]:
        wanted = self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if wanted and self.bos_id is not None else ids

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._fast.token_to_id(token)


def _read_fast(directory: Folder) -> HuggingFaceTokenizer:
    path = directory / "tokenizer.json"
    if not path.exists():
        convert = "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        if (directory / "tokenizer.model").exists():
            raise TokenizerError(
                f"{directory} has a tokenizer.model but no tokenizer.json.",
                remedy=f"Convert it with transformers and sentencepiece: {convert}.",
            )
        raise TokenizerError(f"{directory} has no tokenizer.json.", remedy=f"Fetch it, or make it: {convert}.")
    content = read_bytes(path, kind=TokenizerError)
    with _library(TokenizerError(f"{path} is not a usable tokenizer.", remedy="Fetch it again.")):
        fast = HuggingFaceTokenizer.from_buffer(content)
        fast.no_truncation()
        fast.no_padding()
        # A post-processor that names tokens which are not there loads, and fails at the first text.
        fast.decode(fast.encode("a", add_special_tokens=True).ids)
    return fast


@contextmanager
def _library(failure: CloisterError) -> Iterator[None]:
    """Raises `failure` for whatever the tokenizer library raises: bare exceptions, and panics of its native code.

    Not chained: the library's errors can hold the text.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic is no Exception
        raise failure from None


def _check_added_tokens(path: File, config: Mapping[str, Any], fast: HuggingFaceTokenizer) -> None:
    """Raises unless the tokens that the config adds are in `tokenizer.json`, where they must be to be recognised."""
    added = config.get("added_tokens_decoder") or {}
    for key, entry in added.items() if isinstance(added, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or str(fast.token_to_id(token)) != key:
            raise TokenizerError(
                f"{path} adds a token with the id {key[:20]}, which tokenizer.json does not know by that id.",
                remedy="Save the tokenizer again with transformers: tokenizer.save_pretrained(directory).",
            )


def _special_tokens(directory: Folder, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of the special tokens: from the config, or from the older map beside it."""
    path = directory / "special_tokens_map.json"
    older = read_object(path, TokenizerError) if path.exists() else {}
    tokens: dict[str, str] = {}
    for name in _SPECIAL:
        value = config.get(name, older.get(name))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
        elif text is not None or value is not None:
            raise TokenizerError(f"{directory}: {name} is not a token.", remedy="Fetch the tokenizer files again.")
    return tokens


def _template_source(directory: Folder, config: Mapping[str, Any]) -> str | None:
    """Returns the chat template: its own file, or an entry of the config (one text, or several by name)."""
    path = directory / "chat_template.jinja"
    value: Any = config.get("chat_template")
    if path.exists():
        try:
            return read_bytes(path, 4 * MAX_TEMPLATE_CHARACTERS, TokenizerError).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8.", remedy="Fetch it again.") from error
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    elif isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{directory}: chat_template is not a text.", remedy="Fetch tokenizer_config.json again.")
    return value


def _flag(path: File, config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{path}: {key} is {value!r:.100}, not true or false.", remedy="Fetch it again.")
    return value


def _eos_ids(directory: Folder) -> set[int]:
    """Returns the end tokens that the files of the model itself name."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.exists():
            ids |= set(token_ids(path, read_object(path).get("eos_token_id")))
    return ids
