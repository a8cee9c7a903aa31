"""Health batches on the wire: columns of the signal ring to bytes of ``HealthBatch``, and back to columns.

The packed columns are written with NumPy, without a Python object per signal; the bytes are those that protobuf itself
would write. Legend: N signals in a batch; float columns are float32, ids are uint32, steps and times uint64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.v1 import telemetry_pb2

Columns = Mapping[str, NDArray[Any]]
"""Equally long columns by field name, as ``SignalRing.drain`` gives them."""

MAX_SIGNAL_BYTES: Final = 58
"""Most bytes one signal takes: seven floats, two ids of at most 5 bytes, step and time of at most 10."""

FLOAT_COLUMNS: Final = {
    "mean": "means",
    "variance": "variances",
    "entropy": "entropies",
    "dead_share": "dead_shares",
    "nonfinite_share": "nonfinite_shares",
    "gradient_variance": "gradient_variances",
    "latency_ms": "latencies_ms",
}
"""Float columns of the ring and their fields in ``HealthBatch``."""

VARINT_COLUMNS: Final = {"layer_id": "layer_ids", "seed": "seeds", "step": "steps", "time_ns": "times_ns"}
"""Integer columns of the ring and their fields."""

_FIELDS: Final = telemetry_pb2.HealthBatch.DESCRIPTOR.fields_by_name
_DTYPES: Final = {"layer_id": np.uint32, "seed": np.int32, "step": np.uint64, "time_ns": np.uint64}


def count_signals(columns: Columns) -> int:
    """Give N of drained columns."""
    return len(columns["step"])


def encode_health(envelope: telemetry_pb2.HealthBatch, columns: Columns) -> bytes:
    """Give the bytes of a batch: the envelope's own fields, then the columns.

    Raises:
        InvalidInputError: A column is missing or of another length than the rest.
    """
    length = count_signals(columns)
    parts = [envelope.SerializeToString()]
    for name, field in {**VARINT_COLUMNS, **FLOAT_COLUMNS}.items():
        column = columns.get(name)
        if column is None or column.shape != (length,):
            shape = None if column is None else column.shape
            raise InvalidInputError.of(f"column {name}", f"have shape ({length},)", shape)
        if length:
            body = _varints(column) if name in VARINT_COLUMNS else column.astype("<f4", copy=False).tobytes()
            parts += [_length(_FIELDS[field].number << 3 | 2), _length(len(body)), body]
    return b"".join(parts)


def health_columns(batch: telemetry_pb2.HealthBatch) -> dict[str, NDArray[Any]]:
    """Give a received batch as columns by the ring's field names, equally long.

    Raises:
        CorruptDataError: The columns differ in length.
    """
    columns: dict[str, NDArray[Any]] = {}
    for name, field in VARINT_COLUMNS.items():
        columns[name] = np.array(getattr(batch, field), dtype=_DTYPES[name])
    for name, field in FLOAT_COLUMNS.items():
        columns[name] = np.array(getattr(batch, field), dtype=np.float32)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise CorruptDataError(f"columns of a health batch must be equally long, got {lengths}")
    return columns


def _varints(column: NDArray[Any]) -> bytes:
    """Give the packed varints of a column; signed columns are zigzag coded."""
    if np.issubdtype(column.dtype, np.signedinteger):
        wide = column.astype(np.int64)
        values = ((wide << 1) ^ (wide >> 63)).astype(np.uint64)
    else:
        values = column.astype(np.uint64)
    groups = max(1, -(-int(values.max()).bit_length() // 7))
    shifts = np.arange(groups, dtype=np.uint64) * np.uint64(7)
    rest = values[:, None] >> shifts[None, :]
    octets = (rest & np.uint64(0x7F)).astype(np.uint8)
    octets[:, :-1] |= np.where(rest[:, 1:] > 0, np.uint8(0x80), np.uint8(0))
    used = rest > 0
    used[:, 0] = True
    return octets[used].tobytes()


def _length(value: int) -> bytes:
    """Give one small number as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
