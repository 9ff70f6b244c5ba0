"""Does a GPU's worker work inside its walls? The one that `cloister chat --backend cuda` starts, not the benchmark's own."""

from typing import Any, Final

import numpy as np

from cloister.accelerator.cuda.link import GpuLink
from cloister.arith.modulus import HALF
from cloister.arith.product import modular_product
from cloister.bench.gpu.timing import device_facts
from cloister.bench.record import Record
from cloister.errors import AcceleratorError
from cloister.settings import Backend
from cloister.wire.codec import received_rows
from cloister.wire.messages import PublicWeight

SHAPE: Final = (384, 256)
SECONDS: Final = 60.0


def run(smoke: bool) -> Record:
    """Returns the record of a product over the ring and one over the socket, by a confined worker; smoke: of the CPU."""
    link = GpuLink.start("gpu", Backend.NUMBA if smoke else Backend.CUDA)
    rows: list[dict[str, Any]] = []
    try:
        rng = np.random.default_rng()
        weight = PublicWeight.of(rng.integers(-127, 128, SHAPE, dtype=np.int8))
        link.register(weight)
        for count, way in ((17, "socket"), *(() if smoke else ((1, "ring"),))):
            x = rng.integers(-HALF, HALF + 1, (count, SHAPE[1]), dtype=np.int32)
            answer = link.multiply(weight.weight_id, received_rows(x.reshape(-1), count, SHAPE[1]), SECONDS)
            expected = np.empty((count, SHAPE[0]), np.int32)
            modular_product(weight.matrix, x, expected)
            same = np.array_equal(answer, expected)
            rows.append({"product": f"{count} rows, {way}", "result": "right" if same else "WRONG"})
    except AcceleratorError as error:
        rows.append({"product": "the next", "result": f"failed: {error.message}"[:400]})
    finally:
        link.close()
    name = "gpu-confined-smoke" if smoke else "gpu-confined"
    return Record(name, rows, {"worker": link.name, **device_facts(smoke)}, {"shape": list(SHAPE)})
