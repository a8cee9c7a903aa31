from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.telemetry.health_wire import (
    FLOAT_COLUMNS,
    MAX_SIGNAL_BYTES,
    VARINT_COLUMNS,
    Columns,
    encode_health,
    health_columns,
)
from esper.v1.telemetry_pb2 import HealthBatch, LayerIndexEntry

DTYPES = {"layer_id": np.uint32, "seed": np.int32, "step": np.uint64, "time_ns": np.uint64}


@st.composite
def batches(draw: st.DrawFn) -> Columns:
    count = draw(st.integers(0, 20))
    dtypes = DTYPES | dict.fromkeys(FLOAT_COLUMNS, np.float32)
    return {name: draw(any_bits(dtype, count)) for name, dtype in dtypes.items()}


def any_bits(dtype: type[np.generic], count: int) -> st.SearchStrategy[np.ndarray]:
    """Give columns from raw bytes; every NaN is the quiet one, for a Python float keeps no other."""
    size = np.dtype(dtype).itemsize * count
    columns = st.binary(min_size=size, max_size=size).map(lambda data: np.frombuffer(data, dtype))
    return (
        columns.map(lambda column: np.where(np.isnan(column), dtype(np.nan), column))
        if dtype is np.float32
        else columns
    )


def envelope() -> HealthBatch:
    entries = [LayerIndexEntry(layer_id=3, layer="block.0")]
    return HealthBatch(run_id="run-1", sequence=7, layer_index=entries, ring_dropped=2, batches_dropped=1)


@settings(max_examples=25)
@given(batches())
def test_the_bytes_say_what_protobuf_itself_would_write(columns: Columns) -> None:
    by_hand = envelope()
    for name, field in {**VARINT_COLUMNS, **FLOAT_COLUMNS}.items():
        getattr(by_hand, field).extend(columns[name].tolist())
    encoded = encode_health(envelope(), columns)
    assert HealthBatch.FromString(encoded).SerializeToString(deterministic=True) == by_hand.SerializeToString(
        deterministic=True
    )
    assert len(encoded) <= len(envelope().SerializeToString()) + MAX_SIGNAL_BYTES * len(columns["step"]) + 11 * 6


@settings(max_examples=25)
@given(batches())
def test_columns_come_back_bit_for_bit(columns: Columns) -> None:
    decoded = health_columns(HealthBatch.FromString(encode_health(envelope(), columns)))
    assert decoded.keys() == {*VARINT_COLUMNS, *FLOAT_COLUMNS}
    for name, column in decoded.items():
        np.testing.assert_array_equal(column, columns[name])


def test_columns_of_unequal_length_are_refused() -> None:
    columns = {name: np.zeros(2, dtype=np.float32) for name in FLOAT_COLUMNS}
    columns |= {name: np.zeros(2, dtype=dtype) for name, dtype in DTYPES.items()}
    columns["mean"] = np.zeros(3, dtype=np.float32)
    with pytest.raises(InvalidInputError, match=r"column mean must have shape \(2,\), got \(3,\)"):
        encode_health(envelope(), columns)
    del columns["mean"]
    with pytest.raises(InvalidInputError, match=r"column mean must have shape \(2,\), got None"):
        encode_health(envelope(), columns)


def test_a_received_batch_with_unequal_columns_is_corrupt() -> None:
    with pytest.raises(CorruptDataError, match="columns of a health batch must be equally long"):
        health_columns(HealthBatch(steps=[1, 2], means=[0.5]))
