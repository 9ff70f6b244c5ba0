"""A one-operator ONNX model, `MatMulInteger(digits, weight)`, written as protobuf by hand: the onnx package is not needed.

The few fields that are used keep their numbers for ever: that is what protobuf promises. Source: onnx/onnx.proto3.
"""

import contextlib
from typing import Final

import numpy as np
from jaxtyping import Int8, Int32, UInt8

from cloister.errors import WireError

MAX_MODEL_BYTES: Final = 2**31 - 2**16
"""Largest weight in one model: a protobuf message ends at 2 GiB."""

_UINT8, _INT8, _INT32 = 2, 3, 6  # TensorProto.DataType


class OnnxProduct:
    """A weight held by an onnxruntime session."""

    def __init__(self, matrix: Int8[np.ndarray, "d_out d_in"]) -> None:
        """Copies the weight into a session whose threads are those of the process (see `share_threads`)."""
        import onnxruntime

        if matrix.nbytes > MAX_MODEL_BYTES:
            raise WireError(f"onnxruntime takes no weight of {matrix.nbytes} bytes.", remedy="Use the numba backend.")
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        self._session = onnxruntime.InferenceSession(
            _model(np.ascontiguousarray(matrix.T)), options, providers=["CPUExecutionProvider"]
        )

    def multiply(self, digits: UInt8[np.ndarray, "rows d_in"]) -> Int32[np.ndarray, "rows d_out"]:
        """Returns the integer product of unsigned digits and the weight."""
        result: np.ndarray = self._session.run(None, {"x": digits})[0]
        return result


def share_threads(threads: int) -> None:
    """Makes all sessions of this process share `threads` threads: one pool for each of a hundred weights would thrash.

    onnxruntime fixes the number with the first session of a process; a later call leaves it as it is.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    with contextlib.suppress(Fail):
        onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _model(weight: Int8[np.ndarray, "d_in d_out"]) -> bytes:
    node = _text(1, "x") + _text(1, "w") + _text(2, "y") + _text(4, "MatMulInteger")
    tensor = b"".join(_number(1, size) for size in weight.shape) + _number(2, _INT8)
    tensor += _text(8, "w") + _bytes(9, weight.tobytes())
    graph = _bytes(1, node) + _text(2, "product") + _bytes(5, tensor)
    graph += _bytes(11, _value("x", _UINT8)) + _bytes(12, _value("y", _INT32))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 13))  # IR version 8, operator set 13


def _value(name: str, kind: int) -> bytes:
    dimensions = _bytes(1, _text(2, "rows")) + _bytes(1, _text(2, f"{name}_columns"))
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, dimensions)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
