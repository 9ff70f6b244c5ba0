"""Shared memory: what the kernel refuses to the other side, and what is said when there is none left."""

import ctypes
import mmap
import os
import resource
import subprocess
import sys

import numpy as np
import psutil
import pytest

from cloister.errors import WireError
from cloister.wire.sealed_memory import Arena, SealedMatrix, map_sealed_matrix

PUNCH_HOLE_KEEP_SIZE = 3


def sealed(shape: tuple[int, int] = (64, 64), value: int = 5) -> SealedMatrix:
    memory = SealedMatrix.create(shape)
    memory.array[:] = value
    memory.seal()
    return memory


def test_a_sealed_weight_cannot_be_mapped_for_writing_not_even_reopened() -> None:
    memory = sealed()
    reopened = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDWR)
    for fd in (memory.fileno(), reopened):
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    os.close(reopened)
    assert (memory.array == 5).all()


def test_a_mapping_of_a_sealed_weight_cannot_be_made_writable() -> None:
    memory = sealed()
    array = map_sealed_matrix(memory.fileno(), (64, 64))
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(array.ctypes.data)
    assert libc.mprotect(address, ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() == 13  # EACCES


def test_no_hole_can_be_punched_into_a_sealed_weight() -> None:
    memory = sealed()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    assert libc.fallocate(memory.fileno(), PUNCH_HOLE_KEEP_SIZE, 0, 4096) == -1
    assert (memory.array == 5).all()


def test_both_sides_see_the_same_weight_without_a_copy() -> None:
    memory = SealedMatrix.create((64, 64))
    memory.array[:] = 7
    memory.seal()
    theirs = map_sealed_matrix(memory.fileno(), (64, 64))
    assert (theirs == 7).all()
    assert not theirs.flags.writeable
    # The maker's own mapping predates the seal: writing through it shows on the other side at once.
    memory.array.flags.writeable = True
    memory.array[3, 3] = 1
    assert theirs[3, 3] == 1


@pytest.mark.parametrize("shape", [(8, 65), (8, 63), (64, 8 * 64), (0, 64)])
def test_a_weight_of_another_size_than_announced_is_refused(shape: tuple[int, int]) -> None:
    memory = sealed((8, 64))
    with pytest.raises(WireError, match="sealed memory"):
        map_sealed_matrix(memory.fileno(), shape)


def test_a_descriptor_that_is_no_sealed_memory_is_refused() -> None:
    read, write = os.pipe()
    with pytest.raises(WireError, match="sealed"):
        map_sealed_matrix(read, (1, 0))
    with pytest.raises(WireError, match="sealed"):
        Arena.received(read)
    os.close(read)
    os.close(write)
    resizable = os.memfd_create("resizable", os.MFD_ALLOW_SEALING)
    os.ftruncate(resizable, 4096)
    with pytest.raises(WireError, match="sealed"):
        Arena.received(resizable)
    os.close(resizable)


def test_an_arena_is_seen_by_both_and_outlives_its_descriptors() -> None:
    ours = Arena.create(10_000)
    theirs = Arena.received(ours.fd)
    ours.close()
    ours.close()
    theirs.words[-1] = 42
    assert ours.words[-1] == 42
    assert ours.size == theirs.size == 12_288
    assert ours.words.dtype == np.int32


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (-1, 4)])
def test_empty_memory_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(WireError, match="bytes"):
        SealedMatrix.create(shape)


def test_memory_beyond_the_address_space_is_an_error_with_a_remedy_and_leaks_nothing() -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(WireError, match="cannot be had.*memory"):
        SealedMatrix.create((2**31, 2**31))
    assert psutil.Process().num_fds() == before


COUNT_MATRICES = """
import resource, sys
from cloister.errors import WireError
from cloister.wire.sealed_memory import SealedMatrix
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
made = []
try:
    while len(made) < 100:
        made.append(SealedMatrix.create((1, 64)))
except WireError as error:
    print(error)
print(len(made))
"""


def count_matrices(hard: int) -> str:
    command = [sys.executable, "-I", "-c", COUNT_MATRICES, str(hard)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_more_weights_than_the_soft_limit_of_descriptors_are_possible() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 512
    assert count_matrices(hard=512) == "100\n"


def test_the_hard_limit_of_descriptors_is_an_error_that_names_it() -> None:
    said = count_matrices(hard=64)
    assert "Too many open files" in said
    assert "ulimit -n" in said
    assert 20 < int(said.splitlines()[-1]) < 32
