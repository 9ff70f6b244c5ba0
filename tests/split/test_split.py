"""The published split with real processes' sockets: equal to the unsplit model, without the table, and with clear failures."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister.errors import (
    BudgetError,
    CheckpointError,
    EngineProtocolError,
    EngineUnreachableError,
    RequestError,
    SettingsError,
    UnsupportedModelError,
)
from cloister.model.embedding import EmbeddingLayer
from cloister.privacy.accounting import Charge, pure
from cloister.privacy.ledger import Entry, Ledger
from cloister.privacy.mechanism import Cost
from cloister.split.client import EmbeddingPart, Spent, SplitClient
from cloister.split.frames import Element, Frame, Kind, receive, send, text_frame
from cloister.split.sanitise import AsPublished, rare_tokens, unsanitised
from cloister.wire.tcp import parse_address

torch = pytest.importorskip("torch", reason="a split server needs torch: make setup installs the CPU build")
transformers = pytest.importorskip("transformers", reason="a split server needs transformers")
tokenizers = pytest.importorskip("tokenizers")

from cloister.split.model import ServerModel  # noqa: E402
from cloister.split.server import SplitServer  # noqa: E402

VOCABULARY = "<s> </s> the a fox kite tree bird sang flew over under old small red blue and to of in was by"
WORDS = VOCABULARY.split(" ")
TEXT = "the small red fox flew over the old tree"
SCORE_TOLERANCE = 1e-5


def save_tokenizer(folder: Path, special: list[str]) -> None:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=WORDS[2]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.add_special_tokens(special)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


def llama(folder: Path, **changes: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        **{"tie_word_embeddings": False, **changes},
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, WORDS[:2])
    return model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, llama(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, WORDS[:2])
    return folder, model


def embedding(folder: Path) -> EmbeddingPart:
    return EmbeddingPart(EmbeddingLayer.open(folder), unsanitised)


class Served:
    """A split server on a free port."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = ServerModel.open(folder, **options)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.server = SplitServer(self.model, listener)
        threading.Thread(target=self.server.serve, daemon=True).start()


@pytest.fixture
def served(decoder: tuple[Path, Any]) -> Iterator[Served]:
    made = Served(decoder[0])
    yield made
    made.server.close()


def test_greedy_output_equals_the_unsplit_model(served: Served, decoder: tuple[Path, Any]) -> None:
    folder, whole = decoder
    part = embedding(folder)
    tokens = part.tokenizer.encode(TEXT)
    expected = whole.generate(torch.tensor([tokens]), max_new_tokens=20, do_sample=False)[0, len(tokens) :].tolist()
    spent = Spent()
    with SplitClient(part, served.address) as client:
        for _ in range(2):  # a second session on the same connection knows nothing of the first
            made = list(client.generate(tokens, 20, spent))
            assert made == [token for token in expected if token != 1][: len(made)]
            assert len(made) == 20 or expected[len(made)] == 1
    assert spent.hand_offs >= len(spent.tokens)  # one for each forward pass
    assert spent.bytes_sent < (2 * len(tokens) + spent.hand_offs) * 32 * 4


def test_sampling_repeats_with_its_seed(served: Served, decoder: tuple[Path, Any]) -> None:
    part = embedding(decoder[0])
    with SplitClient(part, served.address) as client:
        first, again = (list(client.generate([2, 3], 12, temperature=1.0, top_k=9, top_p=0.9, seed=3)) for _ in "ab")
        assert first == again
        with pytest.raises(RequestError, match="Sampling"):
            list(client.generate([2], 2, colour=1))


def test_a_classifier_gives_the_unsplit_scores(classifier: tuple[Path, Any]) -> None:
    folder, whole = classifier
    made = Served(folder)
    part = embedding(folder)
    tokens = part.tokenizer.encode(TEXT)
    expected = whole(input_ids=torch.tensor([tokens])).logits.softmax(-1)[0].tolist()
    with SplitClient(part, made.address) as client:
        scores = client.classify(tokens)
    assert list(scores) == ["bad", "good"]
    assert list(scores.values()) == pytest.approx(expected, abs=SCORE_TOLERANCE)
    made.server.close()


def test_the_server_has_no_table(served: Served, decoder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, whole = decoder
    table = whole.model.embed_tokens.weight
    held = [*served.model.module.parameters(), *served.model.module.buffers()]
    assert not any(p.shape == table.shape and torch.equal(p, table) for p in held)
    assert (
        sum(p.numel() for p in served.model.module.parameters())
        == sum(p.numel() for p in whole.parameters()) - table.numel()
    )
    with pytest.raises(UnsupportedModelError, match="no embedding table"):
        served.model.module(torch.tensor([[1]]))
    # It does not even need it: a folder without the table serves as well.
    safetensors = pytest.importorskip("safetensors.torch")
    stripped = {k: v for k, v in whole.state_dict().items() if k != "model.embed_tokens.weight"}
    safetensors.save_file(stripped, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = ServerModel.open(tmp_path)
    assert torch.equal(again.module.lm_head.weight, whole.lm_head.weight)


def test_a_tied_head_is_refused_unless_told(tmp_path: Path) -> None:
    whole = llama(tmp_path, tie_word_embeddings=True)
    with pytest.raises(UnsupportedModelError, match="has the table"):
        ServerModel.open(tmp_path)
    made = Served(tmp_path, allow_tied=True)
    part = embedding(tmp_path)
    tokens = part.tokenizer.encode(TEXT)
    expected = whole.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False)[0, len(tokens) :].tolist()
    with SplitClient(part, made.address) as client:
        made_tokens = list(client.generate(tokens, 8))
    assert made_tokens == [token for token in expected if token != 1][: len(made_tokens)]
    made.server.close()


def test_the_published_sanitiser_replaces_rare_tokens_and_pays(decoder: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
    layer = EmbeddingLayer.open(decoder[0])
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.open_session("s", 30.0, pure(1.0), "published")

    def pay(cost: Cost, count: int) -> None:
        ledger.charge("s", [Entry("token", Charge(cost, count, sampled=False))])

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the fox and the tree\n" * 3 + "a bird sang\n")
    rare = rare_tokens(layer.tokenizer, corpus.read_bytes(), 0.5)
    assert WORDS.index("kite") in rare
    assert WORDS.index("the") not in rare
    sanitise = AsPublished(layer, 1.0, rare, pay)
    tokens = [0, WORDS.index("the"), WORDS.index("kite"), WORDS.index("kite")]
    seen = set()
    for _ in range(12):
        sent = sanitise(tokens)
        assert sent[:2] == tokens[:2]  # control tokens and frequent words stay
        seen.add(tuple(sent[2:]))
    assert len(seen) > 6
    assert ledger.report("s").spent.basic == pytest.approx(24.0)
    with pytest.raises(BudgetError):
        sanitise([WORDS.index("kite")] * 7)
    ledger.close()


def raw(address: str, data: bytes) -> bytes:
    with socket.create_connection(parse_address(address), 10) as connection:
        assert receive(connection) is not None
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:  # hung up already
            return b""


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<4sBBHQII", b"CLSP", 1, 3, 3, 1, 2**31, 2**31),
        struct.pack("<4sBBHQII", b"CLSP", 9, 3, 3, 1, 1, 1),
        struct.pack("<4sBBHQII", b"CLSP", 1, 99, 3, 1, 1, 1),
        struct.pack("<4sBBHQII", b"CLSP", 1, 3, 3, 1, 4, 32) + b"short",
    ],
)
def test_hostile_bytes_end_a_connection_and_nothing_else(
    served: Served, decoder: tuple[Path, Any], data: bytes
) -> None:
    assert raw(served.address, data) == b""
    with SplitClient(embedding(decoder[0]), served.address) as client:
        assert list(client.generate([2, 3], 2))


def test_the_server_refuses_what_does_not_fit(served: Served, decoder: tuple[Path, Any]) -> None:
    part = embedding(decoder[0])
    with SplitClient(part, served.address) as client:
        with pytest.raises(RequestError, match="context ends at 64"):
            list(client.generate([2] * 65, 2))
        send(client._connection, Frame(Kind.STEP, 77, Element.F32, np.zeros((1, 32), np.float32)))
        with pytest.raises(RequestError, match="no such session"):
            client._expect(Kind.TOKENS, 77)
        for wrong in (np.zeros((1, 31), np.float32), np.full((1, 32), np.nan, np.float32)):
            session = client._open({})
            send(client._connection, Frame(Kind.STEP, session, Element.F32, wrong))
            with pytest.raises(RequestError):
                client._expect(Kind.TOKENS, session)
        assert list(client.generate([2, 3], 2))  # the connection goes on


def answering(frames: list[Frame]) -> str:
    """Returns the address of a server that sends `frames`, one at the start and one for each STEP, then hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            waiting = list(frames)
            if waiting:
                send(connection, waiting.pop(0))
            while waiting and (frame := receive(connection)) is not None:
                if frame.kind is Kind.STEP:
                    send(connection, waiting.pop(0))

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_lies_or_leaves(decoder: tuple[Path, Any], served: Served) -> None:
    part = embedding(decoder[0])
    hello = text_frame(Kind.HELLO, 0, served.model.describe())
    other = text_frame(Kind.HELLO, 0, {**served.model.describe(), "hidden_size": 64})
    with pytest.raises(EngineProtocolError, match="hidden_size"):
        SplitClient(part, answering([other]))
    with pytest.raises(EngineUnreachableError, match="closed"):
        SplitClient(part, answering([]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineUnreachableError, match="No split server"):
        SplitClient(part, nobody)
    with pytest.raises(SettingsError, match="not an address"):
        SplitClient(part, "somewhere")
    beyond = Frame(Kind.TOKENS, 1, Element.I32, np.array([[10**6]], np.int32))
    wrong_session = Frame(Kind.TOKENS, 5, Element.I32, np.array([[3]], np.int32))
    for frame in (beyond, wrong_session):
        with SplitClient(part, answering([hello, frame])) as client, pytest.raises(EngineProtocolError):
            list(client.generate([2], 3))
    good = Frame(Kind.TOKENS, 1, Element.I32, np.array([[3]], np.int32))
    with SplitClient(part, answering([hello, good])) as client, pytest.raises(EngineUnreachableError):
        list(client.generate([2], 3))


def test_models_that_cannot_be_split(decoder: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ServerModel.open(tmp_path)
    (tmp_path / "config.json").write_bytes((decoder[0] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no safetensors"):
        ServerModel.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((decoder[0] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        ServerModel.open(tmp_path)
