"""The engine: a prompt goes in, checked tokens come out, one sequence at a time.

Covers: tokenising, prefill in pieces, decoding, sampling, streaming text, stop conditions, reuse of the KV cache between
the turns of a chat, the choice of an adapter per request (keys and values of one are never used by another).
Guarantees: every product behind a token was computed here or checked before the next layer used it, so no token, text or
log-probability that left depends on an unverified answer. A cancelled or failed request keeps the engine usable.
Does not cover: which process this is (`local.enclave_process`) or who asks (`enclave.session`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float32

from cloister.blinding.mill import Mill
from cloister.blinding.pantry import Pantry
from cloister.enclave.detokenise import StreamDecoder
from cloister.enclave.forward import Forward, LinearGate
from cloister.enclave.masked_attention import MaskedAttention, MaskedCounters
from cloister.enclave.outsource import GateCounters
from cloister.enclave.prepare import EnclaveModel
from cloister.enclave.release import Release
from cloister.enclave.sampling import Sampled, Sampler, SamplingSettings
from cloister.enclave.stopping import StopDetector
from cloister.errors import GenerationCancelled, RequestError
from cloister.model.generation_config import GenerationDefaults
from cloister.model.tokenizer import Tokenizer
from cloister.wire.session import Delta, Finished, Generate, Meter, Sampling

Number = TypeVar("Number", int, float)

DEFAULT_NEW_TOKENS: Final = 512
"""Longest answer when neither the request nor the model says."""

PREFILL_TOKENS: Final = 256
"""Tokens of the prompt per pass: bounds the memory of a pass, and the time until a cancel is seen.

A bucket of `shape_hiding` may be longer."""


@runtime_checkable
class MeteredGate(LinearGate, Protocol):
    """A gate that counts what it does: `enclave.outsource.Gate`, or a baseline to compare it with."""

    @property
    def counters(self) -> GateCounters:
        """What it did since it was opened."""
        ...

    @property
    def accelerators(self) -> tuple[str, ...]:
        """Names of the accelerators that are in use."""
        ...


@dataclass(frozen=True)
class Voice:
    """What answers a request: the base model or an adapter, with the tokenizer and the defaults that it was trained with."""

    model: EnclaveModel
    gate: LinearGate
    tokenizer: Tokenizer
    defaults: GenerationDefaults


class Engine:
    """Generates text with one model, and with adapters of it."""

    def __init__(
        self,
        forward: Forward,
        gate: MeteredGate,
        pantry: Pantry,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        *,
        mill: Mill | None = None,
        adapters: Mapping[str, Voice] | None = None,
        release: Release | None = None,
    ) -> None:
        self.forward = forward
        self._gate = gate
        self._pantry = pantry
        self._voices = {"": Voice(forward.model, gate, tokenizer, defaults), **(adapters or {})}
        self._voice = ""
        self._mill = mill
        self.release = release or Release()
        self.cached: list[int] = []  # tokens whose keys and values are in the cache

    @property
    def adapter(self) -> str:
        """The adapter in use; empty: the base model."""
        return self._voice

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model or adapter in use."""
        return self._voices[self._voice].tokenizer

    def generate(
        self, request: Generate, check_cancelled: Callable[[], None], finish: Callable[[Finished], None]
    ) -> Iterator[Delta]:
        """Yields pieces of the answer; calls `finish` once at its end, however it ends.

        `check_cancelled` is called before each pass and raises `GenerationCancelled` to stop.

        Raises:
            RequestError: the request is invalid, or longer than the context.
            AcceleratorError: the accelerators failed and the settings say to stop.
        """
        self.release.check(request.sampling.top_logprobs, biased=bool(request.sampling.logit_bias))
        voice = self._find(request.adapter)
        tokens = self._encode(request, voice.tokenizer)
        settings = self._sampling(request.sampling, len(tokens), voice.defaults)
        self._use(request.adapter)
        run = _Run(self, tokens, settings, check_cancelled)
        if self._mill is None:
            yield from run.deltas(finish)
        else:
            with self._mill.paused():
                yield from run.deltas(finish)

    def meter(self) -> Meter:
        """Returns the running totals of the gate and the pantry."""
        counters = self._gate.counters
        attention = self.forward.attention
        lent = attention.counters if isinstance(attention, MaskedAttention) else MaskedCounters()
        return Meter(
            products=counters.products + lent.products,
            enclave_products=counters.enclave_products,
            rows=counters.rows,
            bytes_sent=counters.bytes_sent + lent.bytes_sent,
            bytes_received=counters.bytes_received + lent.bytes_received,
            pantry_tokens=self._pantry.level_tokens,
            pantry_capacity_tokens=self._pantry.capacity_tokens,
            pads_made_late=counters.pads_made_late,
            blind_seconds=counters.blind_seconds + lent.blind_seconds,
            lent_seconds=counters.lent_seconds + lent.lent_seconds,
            recover_seconds=counters.recover_seconds + lent.recover_seconds,
            enclave_seconds=counters.enclave_seconds + lent.enclave_seconds,
            cpu_seconds=time.process_time(),
            accelerators=self._gate.accelerators,
        )

    def _find(self, adapter: str) -> Voice:
        if adapter not in self._voices:
            names = ", ".join(name for name in self._voices if name) or "none"
            raise RequestError(f"There is no adapter {adapter[:100]!r}.", remedy=f"Loaded: {names}.")
        return self._voices[adapter]

    def _use(self, adapter: str) -> None:
        """Makes later passes those of `adapter`; what another computed leaves the cache."""
        if adapter != self._voice:
            self.cached.clear()
            voice = self._voices[adapter]
            self.forward.use(voice.model, voice.gate)
            self._voice = adapter

    def _encode(self, request: Generate, tokenizer: Tokenizer) -> list[int]:
        if (request.prompt is None) == (request.chat is None):
            raise RequestError("A request needs a prompt or a chat, not both.")
        if request.prompt is not None:
            tokens = tokenizer.encode(request.prompt)
        else:
            turns = [{"role": turn.role, "content": turn.content} for turn in request.chat or ()]
            tokens = tokenizer.encode_chat(turns)
        if not tokens:
            raise RequestError("The prompt is empty.", remedy="Give at least one word.")
        if max(tokens) >= self.forward.vocab_size:
            raise RequestError(
                f"The tokenizer made token {max(tokens)}, and the model knows {self.forward.vocab_size}.",
                remedy="Tokenizer and weights belong to different models: fetch both again.",
            )
        limit = self.forward.max_context
        if len(tokens) >= limit:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens and the context holds {limit}.",
                remedy="Shorten the prompt: the model was trained for no more tokens."
                if limit >= self.forward.trained_context
                else f"Shorten the prompt, or raise cache.max_context (--context), at most to {self.forward.trained_context}.",
            )
        return tokens

    def _sampling(self, asked: Sampling, prompt_tokens: int, defaults: GenerationDefaults) -> SamplingSettings:
        """Returns the request's choices, completed by the model's defaults and bounded by the context."""
        room = self.forward.max_context - prompt_tokens
        wanted = asked.max_new_tokens or defaults.max_new_tokens or DEFAULT_NEW_TOKENS
        base = SamplingSettings()
        return SamplingSettings(
            max_new_tokens=min(wanted, room),
            temperature=_first(asked.temperature, defaults.temperature, base.temperature),
            top_k=_first(asked.top_k, defaults.top_k, base.top_k),
            top_p=_first(asked.top_p, defaults.top_p, base.top_p),
            min_p=_first(asked.min_p, defaults.min_p, base.min_p),
            repetition_penalty=_first(asked.repetition_penalty, defaults.repetition_penalty, base.repetition_penalty),
            frequency_penalty=_first(asked.frequency_penalty, None, base.frequency_penalty),
            presence_penalty=_first(asked.presence_penalty, None, base.presence_penalty),
            seed=asked.seed,
            stop=asked.stop,
            stop_token_ids=asked.stop_token_ids,
            logit_bias=asked.logit_bias,
            ignore_eos=asked.ignore_eos,
            top_logprobs=asked.top_logprobs,
        )

    def reuse(self, tokens: list[int]) -> int:
        """Keeps what the cache shares with `tokens`; returns how many tokens that is (at least one is run again)."""
        shared = 0
        for old, new in zip(self.cached, tokens[:-1], strict=False):
            if old != new:
                break
            shared += 1
        self.forward.truncate(shared)
        del self.cached[shared:]
        return shared


class _Run:
    """One generation: its state, and the loop."""

    def __init__(
        self, engine: Engine, tokens: list[int], settings: SamplingSettings, check_cancelled: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._prompt = tokens
        self._settings = settings
        self._check_cancelled = check_cancelled
        self._decoder = StreamDecoder(engine.tokenizer.decode)
        self._stops = StopDetector(settings.stop)
        self._ends = set(settings.stop_token_ids)
        if not settings.ignore_eos:
            self._ends |= set(engine.tokenizer.eos_ids)
        self._produced = 0
        self._reason = "length"

    def deltas(self, finish: Callable[[Finished], None]) -> Iterator[Delta]:
        engine = self._engine
        sampler = Sampler(self._settings, engine.forward.vocab_size, self._prompt)
        reused = engine.reuse(self._prompt)
        started = time.perf_counter()
        prefilled = started
        stopped = False  # by a stop text, which is not part of the answer
        try:
            logits = self._prefill(self._prompt[reused:])
            prefilled = time.perf_counter()
            while True:
                sampled = sampler.sample(logits)
                self._produced += 1
                if sampled.token in self._ends:
                    self._reason = "stop"
                    break
                delta, stopped = self._delta(sampled)
                yield delta
                if stopped:
                    self._reason = "stop"
                    break
                if self._produced >= self._settings.max_new_tokens:
                    break
                self._check_cancelled()
                logits = self._pass([sampled.token])
        except GenerationCancelled:
            self._reason = "cancelled"
        if not stopped and (rest := self._rest()):
            yield Delta(rest)
        finish(self._finished(reused, prefilled - started, time.perf_counter() - prefilled))

    def _prefill(self, tokens: list[int]) -> Float32[np.ndarray, " vocab"]:
        step = self._engine.forward.piece_tokens(PREFILL_TOKENS)
        for start in range(0, len(tokens), step):
            self._check_cancelled()
            logits = self._pass(tokens[start : start + step], len(self._prompt))
        return logits

    def _pass(self, tokens: list[int], sequence_length: int = 0) -> Float32[np.ndarray, " vocab"]:
        engine = self._engine
        logits = engine.forward.run(tokens, sequence_length)
        engine.cached.extend(tokens)
        return engine.release.apply(logits, engine.cached, engine.adapter)

    def _delta(self, sampled: Sampled) -> tuple[Delta, bool]:
        text, stopped = self._stops.push(self._decoder.push(sampled.token))
        top = (sampled.top,) if sampled.top else ()
        logprobs = (sampled.logprob,) if self._engine.release.logprobs else ()
        return Delta(text, (sampled.token,), logprobs, top), stopped

    def _rest(self) -> str:
        """Returns the text that was held back, up to a stop text that may be in it."""
        text, stopped = self._stops.push(self._decoder.flush())
        return text if stopped else text + self._stops.flush()

    def _finished(self, reused: int, prefill_seconds: float, decode_seconds: float) -> Finished:
        return Finished(
            reason=self._reason,
            prompt_tokens=len(self._prompt),
            cached_tokens=reused,
            completion_tokens=self._produced,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            meter=self._engine.meter(),
        )


def _first(asked: Number | None, recommended: Number | None, default: Number) -> Number:
    if asked is not None:
        return asked
    return default if recommended is None else recommended
