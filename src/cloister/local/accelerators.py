"""Opens the accelerators that the settings name."""

from cloister.accelerator.api import Accelerator
from cloister.accelerator.cuda.link import GpuLink
from cloister.accelerator.remote import RemoteAccelerator
from cloister.accelerator.shared import SharedMemoryAccelerator
from cloister.settings import AcceleratorSettings, Backend


def open_accelerators(settings: AcceleratorSettings) -> list[Accelerator]:
    """Returns the configured accelerators: remote ones if there are addresses, else workers of this host."""
    if settings.addresses:
        return [RemoteAccelerator(address) for address in settings.addresses]
    if settings.backend is Backend.CUDA:
        return [GpuLink.start(f"gpu-{index}") for index in range(settings.workers)]
    return [
        SharedMemoryAccelerator.start(f"worker-{index}", settings.backend, settings.threads)
        for index in range(settings.workers)
    ]
