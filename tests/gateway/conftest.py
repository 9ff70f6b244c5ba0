"""Fixtures: an engine of stub, a gateway before it as a real server on a real port, and the `openai` client."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("dp_accounting", reason="dp-accounting (the extra `gateway`) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (the extra `gateway`) is not installed")
pytest.importorskip("httpx2", reason="httpx2 (the extra `gateway`) is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

import uvicorn  # noqa: E402

from cloister.assets import demo_model as demo_folder  # noqa: E402
from cloister.gateway.embedding import PromptMaker  # noqa: E402
from cloister.gateway.engine import Engine, Transport  # noqa: E402
from cloister.gateway.http import EngineClient  # noqa: E402
from cloister.gateway.sanitising import PromptGuard, protection  # noqa: E402
from cloister.gateway.service import Gateway, GatewaySettings  # noqa: E402
from cloister.gateway.text_engine import TextEngine  # noqa: E402
from cloister.gateway.vllm_engine import VllmEngine  # noqa: E402
from cloister.local.broker_link import owner_folder  # noqa: E402
from cloister.local.sanitising import SanitisingEnclave  # noqa: E402
from cloister.local.sanitising_restart import RestartingGuard  # noqa: E402
from cloister.model.directory import ModelDirectory, open_model  # noqa: E402
from cloister.model.embedding import EmbeddingLayer  # noqa: E402
from cloister.privacy.detector import Dictionary, Mode, standard  # noqa: E402
from cloister.privacy.ledger import Ledger  # noqa: E402
from cloister.privacy.mechanism import Kind  # noqa: E402
from cloister.seal.selection import Part  # noqa: E402
from cloister.seal.signing import SigningKey  # noqa: E402
from cloister.seal.store import Store  # noqa: E402
from cloister.seal.writer import Sealed, seal_model  # noqa: E402
from cloister.server.app import application  # noqa: E402
from tests.demo_candidates import write_candidates  # noqa: E402
from tests.gateway.enclaves import NOW, Asked  # noqa: E402
from tests.gateway.stub_engine import StubEngine  # noqa: E402
from tests.privacy.samplers import GAZETTEER, ListSampler  # noqa: E402


@dataclass
class Running:
    """A gateway that runs."""

    url: str
    client: "openai.OpenAI"
    service: Gateway
    engine: StubEngine | None = None


@pytest.fixture(scope="session")
def demo_model() -> ModelDirectory:
    return open_model(demo_folder())


@pytest.fixture(scope="session")
def client_part() -> EmbeddingLayer:
    return EmbeddingLayer.open(Path(demo_folder()))


@pytest.fixture
def engine(demo_model: ModelDirectory) -> Iterator[StubEngine]:
    stub = StubEngine(demo_model)
    yield stub
    stub.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Gateway], Running]]:
    """Serves gateways from an event loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    servers: list[tuple[uvicorn.Server, asyncio.Future[None], Gateway, openai.OpenAI]] = []

    def start(service: Gateway, **options: object) -> Running:
        asyncio.run_coroutine_threadsafe(service.start(), loop).result(60)
        listener = socket.create_server(("127.0.0.1", 0))
        app = application(service, **options)  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        running = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), loop)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        servers.append((server, running, service, client))
        return Running(url, client, service)

    yield start
    for server, running, service, client in servers:
        client.close()
        server.should_exit = True
        running.result(30)
        asyncio.run_coroutine_threadsafe(service.close(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def start(
    engine: StubEngine, serve: Callable[..., Running], client_part: EmbeddingLayer, tmp_path: Path
) -> Callable[..., Running]:
    """Starts a gateway before the stub, its sanitiser in the same process (`test_confined` has it in an enclave)."""

    def begin(
        transport: Transport = Transport.TEXT,
        *,
        budget: float = 1000.0,
        mode: Mode = Mode.DETECTED,
        timeout: float = 30.0,
        words: bool = False,
        **options: object,
    ) -> Running:
        client = EngineClient(engine.address, "engine-key", timeout)
        maker = PromptMaker(client_part, transport, 512)
        text = transport is Transport.TEXT
        made: Engine = TextEngine(client) if text else VllmEngine(client, maker.reference(), transport)
        dictionary = Dictionary({"bluebird": Kind.ORGANISATION})
        detection = standard(mode=mode, lists=GAZETTEER, dictionary=dictionary)
        parts = protection(detection, ListSampler(), Ledger.open(tmp_path / "ledger.db"))
        settings = GatewaySettings(restore_words=words)
        running = serve(Gateway(made, settings, PromptGuard(parts, maker, budget)), **options)
        running.engine = engine
        engine.forget()
        return running

    return begin


@pytest.fixture(scope="session")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("candidates") / "demo.candidates"
    write_candidates(path)
    return path


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return owner_folder()


@pytest.fixture
def asked(owner: Path, candidates: Path, tmp_path: Path) -> Asked:
    return Asked(candidates, tmp_path)


@pytest.fixture
def confined(asked: Asked) -> Iterator[SanitisingEnclave]:
    with SanitisingEnclave(asked.opening()) as enclave:
        yield enclave


@pytest.fixture
def sealed(owner: Path, candidates: Path, tmp_path: Path) -> Sealed:
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(demo_folder()).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "candidates.cloister").write_bytes(candidates.read_bytes())
    made = seal_model(model, tmp_path / "client", SigningKey.generate(), name="demo", version=1, part=Part.EMBEDDINGS)
    with Store.open(owner, create=True) as store:
        store.deposit(made.root, "demo", 1, made.key, NOW)
    return made


@pytest.fixture
def begin(serve: Callable[..., Running], engine: StubEngine) -> Callable[..., Running]:
    """Starts a gateway before the stub with the guard and the reference of an enclave."""

    def start(
        enclave: SanitisingEnclave | RestartingGuard,
        transport: Transport = Transport.EMBEDS,
        settings: GatewaySettings | None = None,
    ) -> Running:
        client = EngineClient(engine.address, "engine-key", 30)
        text = transport is Transport.TEXT
        made: Engine = TextEngine(client) if text else VllmEngine(client, enclave.reference, transport)
        guard = enclave.guard if isinstance(enclave, SanitisingEnclave) else enclave
        running = serve(Gateway(made, settings or GatewaySettings(), guard))
        running.engine = engine
        engine.forget()
        return running

    return start
