"""Trains the small Llama that the package ships: its tokenizer, its weights, its held-out text.

Usage: python examples/demo_model/train.py --out DIR [--steps 2400] [--threads 2]

Everything is made here, from the stories of `stories.py`: about 40 minutes on 2 cores. The result is a Hugging Face
directory in bfloat16; it appears at DIR only when it is complete.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import stories
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + ' ' %}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + ns.system + message['content'] }}{% set ns.system = '' %}"
    "{% else %}{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT_SEED = 900_000_000
HELD_OUT_STORIES = 90
CONTEXT = 512


def document(seed: int) -> str:
    """Returns the training text of a seed: a plain story, or (every second) a request and its story."""
    if seed % 2:
        return f"{BOS}{stories.story(seed)}{EOS}"
    request, answer = stories.conversation(seed)
    return f"{BOS}{USER}{request}{ASSISTANT}{answer}{EOS}"


def train_tokenizer(seeds: range) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of 2,048 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((stories.story(seed) for seed in seeds), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def make_model(seed: int) -> LlamaForCausalLM:
    """Returns an untrained model of about 2 million parameters."""
    torch.random.default_generator.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, rope_theta=10000.0, rms_norm_eps=1e-5,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def packed(tokenizer: Tokenizer, count: int, first_seed: int) -> np.ndarray:
    """Returns the tokens of `count` documents, one after the other."""
    texts = [document(first_seed + i) for i in range(count)]
    return np.concatenate([encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns a linear warm-up over 100 steps, then a cosine to a tenth of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    progress = (step - 100) / max(1, steps - 100)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, tokens: np.ndarray, steps: int, batch: int, length: int, seed: int) -> float:
    """Trains in place; returns the mean loss of the last 50 steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.05)
    random = np.random.default_rng(seed)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3)
        starts = random.integers(0, len(tokens) - length - 1, batch)
        ids = torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49 or step == steps - 1:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {np.mean(losses[-50:]):.4f}  {left / 60:.1f} min left", flush=True)
    return float(np.mean(losses[-50:]))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a Hugging Face directory beside `out` and renames it into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        work = Path(scratch) / "model"
        model.generation_config.update(
            bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=400
        )
        model.to(torch.bfloat16).save_pretrained(work)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
        fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(work)
        template = work / "chat_template.jinja"
        if template.exists():
            config = json.loads((work / "tokenizer_config.json").read_text())
            config["chat_template"] = template.read_text()
            (work / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
            template.unlink()
        held_out = "\n\n\n".join(stories.story(HELD_OUT_SEED + i) for i in range(HELD_OUT_STORIES))
        (work / "heldout.txt").write_text(held_out + "\n", encoding="utf-8")
        for name in ("README.md", "LICENSE"):
            if (out / name).exists():
                shutil.copy(out / name, work / name)
        for path in work.iterdir():
            path.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the result, replaced when training is done"
    )
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps of 16 x 256 tokens")
    parser.add_argument("--stories", type=int, default=40_000, help="documents to train on")
    parser.add_argument("--seed", type=int, default=7, help="of the weights and the order of the text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer(range(1, 4001))
    tokens = packed(tokenizer, options.stories, 10_000)
    print(f"{len(tokens):,} tokens of training text", flush=True)
    model = make_model(options.seed)
    print(f"{model.num_parameters():,} parameters", flush=True)
    loss = train(model, tokens, options.steps, 16, 256, options.seed)
    save(model, tokenizer, options.out)
    print(f"saved {options.out}, loss {loss:.4f} nats per token")


if __name__ == "__main__":
    main()
