"""Parsers of model directories, candidate files, ledgers, settings."""

import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from cloister.assets import demo_model
from cloister.model.adapter_config import read_adapter_config
from cloister.model.chat_template import ChatTemplate
from cloister.model.files import HeldFile, HeldFolder
from cloister.model.generation_config import read_generation_defaults
from cloister.model.safetensors_file import STORED, read_header, read_metadata
from cloister.model.spec import read_spec
from cloister.model.tokenizer import Tokenizer
from cloister.plan.rules import read_rules
from cloister.privacy import candidate_file
from cloister.privacy.certificate import TOTAL
from cloister.privacy.ledger import Ledger
from cloister.settings import from_toml
from foreign.parser import Foreign, Target, kept


def files(folder: Path) -> dict[str, Foreign]:
    """Parsers of model directories, candidate files, ledgers, settings."""
    demo = demo_model()
    config, tokenizer = ((demo / name).read_bytes() for name in ("config.json", "tokenizer.json"))
    small = json.loads(tokenizer)
    vocabulary = small["model"].get("vocab")
    if isinstance(vocabulary, dict):
        small["model"]["vocab"] = dict(list(vocabulary.items())[:300])
        small["model"]["merges"] = []

    def tensors(data: bytes) -> None:
        with closing(mmap.mmap(-1, max(1, len(data)))) as mapped:
            mapped[: len(data)] = data
            for tensor in read_header(Path("f"), mapped).values():
                if tensor.dtype in STORED:
                    tensor.view()
            read_metadata(Path("f"), mapped)

    def held(read: Callable[[HeldFile], object]) -> Target:
        return lambda data: read(HeldFile(Path("f"), data))

    def tokens(data: bytes) -> object:
        settings = (demo / "tokenizer_config.json").read_bytes()
        made = Tokenizer.open(
            HeldFolder(Path("m"), {"tokenizer.json": data, "tokenizer_config.json": settings, "config.json": config})
        )
        return made.decode(made.encode("Once upon a time")[:4])

    def candidates(data: bytes) -> object:
        header, _, stream = data.partition(b"\0\0")
        packed = zlib.compress(header, 1)
        sizes = len(header).to_bytes(4, "little") + len(packed).to_bytes(4, "little")
        whole = candidate_file.MAGIC + bytes([candidate_file.VERSION]) + sizes + packed + stream
        return candidate_file._decode(whole + hashlib.sha256(whole).digest())

    def ledger(path: Path) -> None:
        with closing(Ledger.open(path)) as opened:
            for name in opened.sessions():
                opened.report(name)
                opened.prompts(name)

    place = folder / "ledger.db"
    Ledger.open(place).close()
    empty_ledger = place.read_bytes()
    adapter = b'{"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":["q_proj"],"base_model_name_or_path":"x"}'
    stream = candidate_file._pack((np.full((2, 2), TOTAL // 2, np.int64),))
    header = {
        "model": "m", "embedding_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "vocabulary": 4, "members": 2,
        "classes": [{"kind": "word", "type": "t", "members": ["a", "b"], "tokens": [0, 1]}],
        "sets": [{
            "mechanism": "channel", "epsilon": "1/2", "attacks": [0.5], "curve_first": 0.0, "curve_gap": 0.1, "curve": [0.5, 0.1],
            "stream_bytes": len(stream),
        }],
    }  # fmt: skip
    safetensors = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}
    ).encode()
    template = (
        b"{% for m in messages %}{{ m['role'] }}{% if loop.first %}{{ raise_exception('x') }}{% endif %}{% endfor %}"
    )
    return {
        "safetensors": Foreign(tensors, (struct.pack("<Q", len(safetensors)) + safetensors + bytes(8),)),
        "model config": Foreign(held(read_spec), (config,)),
        "generation config": Foreign(
            held(read_generation_defaults), (b'{"eos_token_id":[1,2],"temperature":0.7,"top_p":0.9}',)
        ),
        "adapter config": Foreign(held(read_adapter_config), (adapter,)),
        "tokenizer": Foreign(tokens, (json.dumps(small).encode(),)),
        "chat template": Foreign(lambda data: ChatTemplate(data.decode("utf-8", "replace"), {}), (template,)),
        "candidate file": Foreign(candidates, (json.dumps(header).encode() + b"\0\0" + stream,)),
        "ledger": Foreign(kept(folder, ledger), (empty_ledger,)),
        "settings": Foreign(kept(folder, from_toml), (b'[blinding]\nchecks = 2\n[plan]\npolicy = "amulet"\n',)),
        "plan rules": Foreign(
            kept(folder, read_rules), (b'[tensors]\n"model.layers.0.*" = "secret"\n"lm_head.*" = ["public"]\n',)
        ),
    }
