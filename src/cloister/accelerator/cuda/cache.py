"""Where Triton keeps compiled kernels: the one folder that a confined worker with a GPU writes, temporary files included."""

from cloister.isolation.code_cache import code_folder


def compiler_variables() -> dict[str, str]:
    """Returns the environment variables that keep the compiler's files in one folder, which is made where absent.

    It is the workers' alone, below `TRITON_CACHE_DIR` if that is set: what they write there, nobody else runs. Errors as for
    `isolation.code_cache.code_folder`.
    """
    folder = str(code_folder("worker", "TRITON_CACHE_DIR", "triton"))
    return {"TRITON_CACHE_DIR": folder, "TMPDIR": folder}
