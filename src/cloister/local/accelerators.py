"""Opens the accelerators that the settings name."""

from cloister.accelerator.api import Accelerator
from cloister.accelerator.cuda.link import GpuLink
from cloister.accelerator.remote import RemoteAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.local.workers import StartWorker
from cloister.settings import AcceleratorSettings, Backend


def open_accelerators(
    settings: AcceleratorSettings, start: StartWorker = SharedMemoryAccelerator.start
) -> list[Accelerator]:
    """Returns the configured accelerators: remote ones if there are addresses, else workers of this host, made by `start`."""
    if settings.addresses:
        return [RemoteAccelerator(address) for address in settings.addresses]
    if settings.backend is Backend.CUDA:
        return [GpuLink(start(f"gpu-{index}", settings.backend, 0)) for index in range(settings.workers)]
    return [start(f"worker-{index}", settings.backend, settings.threads) for index in range(settings.workers)]
