"""`cloister accelerator`: lend this host's processor to enclaves elsewhere."""

from contextlib import closing
from enum import StrEnum
from typing import Annotated

import typer

from cloister.cli.display import stderr
from cloister.cli.ending import until_ended
from cloister.errors import SettingsError
from cloister.settings import Backend


class DeviceKind(StrEnum):
    """What an accelerator multiplies on."""

    CPU = "cpu"
    CUDA = "cuda"


def accelerator(
    listen: Annotated[
        str, typer.Option("--listen", help="host:port to serve at; port 0 takes a free one.")
    ] = "127.0.0.1:7000",
    device: Annotated[
        DeviceKind, typer.Option("--device", help="cuda: the first NVIDIA GPU (pip install 'cloister\\[cuda]').")
    ] = DeviceKind.CPU,
    backend: Annotated[Backend, typer.Option("--backend", help="What multiplies on the CPU.")] = Backend.AUTO,
    threads: Annotated[int, typer.Option("--threads", help="0: one per core.")] = 0,
    max_weight_gib: Annotated[
        float, typer.Option("--max-weights", help="GiB of weights that one client may send.")
    ] = 64.0,
    max_operand_gib: Annotated[
        float, typer.Option("--max-operands", help="GiB of blinded keys and values that one client may have kept.")
    ] = 4.0,
) -> None:
    """Serve as an untrusted accelerator for enclaves on other hosts.

    It sees public weights and blinded integers, and has no access control of its own: bind it to a private network.
    The other side runs [bold]cloister chat MODEL --accelerator HOST:PORT[/bold].
    """
    from cloister.accelerator.cpu import open_multiplier  # here: the other commands start faster without Numba
    from cloister.accelerator.tcp_server import AcceleratorServer

    chosen = backend_of(device, backend)
    limits = int(max_weight_gib * 2**30), int(max_operand_gib * 2**30)
    with until_ended(), closing(AcceleratorServer(listen, lambda: open_multiplier(chosen, threads), *limits)) as server:
        stderr().print(f"accelerator at {server.address} ({server.backend}); Ctrl-C ends it")
        server.serve()


def backend_of(device: DeviceKind, backend: Backend) -> Backend:
    """Returns the backend that the two options ask for together.

    Raises:
        SettingsError: they contradict each other.
    """
    if device is DeviceKind.CPU:
        return backend
    if backend not in (Backend.AUTO, Backend.CUDA):
        raise SettingsError(
            f"--device cuda and --backend {backend} contradict each other.", remedy="Leave one of them out."
        )
    return Backend.CUDA
