"""Every domain value survives the way to the wire and back; what breaks a rule is refused by name."""

from __future__ import annotations

import dataclasses
import struct
import typing
from datetime import UTC, datetime, timedelta
from enum import Enum

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.contracts import wire
from esper.contracts.blueprint import AttributeValue, BlueprintIR, Expression, IRNode, Site, SiteKind
from esper.contracts.decision import ParameterChange
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.contracts.kernel import CompileFallback, CompileTarget
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import FieldReport, SeedStatus, SystemStatePacket
from esper.v1 import blueprint_pb2, kernel_pb2, lifecycle_pb2, telemetry_pb2

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
FLOAT32 = st.floats(width=32, allow_nan=False)
SITES = st.builds(
    Site,
    kind=st.sampled_from(SiteKind),
    input_shape=st.tuples(st.integers(1, 512)),
    output_shape=st.tuples(st.integers(1, 512)),
)


def values_of(hint: object) -> st.SearchStrategy[object]:
    """Give a strategy for a type hint of a domain class."""
    if hint == AttributeValue:
        return st.one_of(st.booleans(), st.integers(-5, 5), FLOAT32, TEXT, TEXT.map(Expression))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=2)
    if arguments and type(None) in arguments:
        return st.one_of(st.none(), values_of(arguments[0]))
    if arguments:
        return st.dictionaries(TEXT, values_of(arguments[1]), max_size=2)
    return scalars_of(hint)


def scalars_of(hint: object) -> st.SearchStrategy[object]:
    """Give a strategy for a hint without arguments."""
    assert isinstance(hint, type)
    if hint is Site:
        return SITES
    if issubclass(hint, Enum):
        return st.sampled_from(hint)
    if dataclasses.is_dataclass(hint):
        return instances_of(hint)
    known: dict[type, st.SearchStrategy[object]] = {
        int: st.integers(0, 2**31 - 1),
        float: FLOAT32,
        bool: st.booleans(),
        str: TEXT,
        bytes: st.binary(max_size=8),
        datetime: st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
        timedelta: st.timedeltas(timedelta(0), timedelta(days=9)),
    }
    return known[hint]


def instances_of(cls: type) -> st.SearchStrategy[object]:
    """Give a strategy for a whole domain class."""
    if cls is Site:
        return SITES
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(cls)})


@pytest.mark.parametrize("cls", sorted(wire.message_types(), key=lambda cls: cls.__name__))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_domain_class_survives_the_round_trip(cls: type, data: st.DataObject) -> None:
    value = data.draw(instances_of(cls))
    assert wire.parse(wire.serialize(value), cls) == value


@pytest.mark.parametrize("cls", sorted(wire.message_types(), key=lambda cls: cls.__name__))
def test_message_has_no_field_the_domain_class_lacks(cls: type) -> None:
    message = wire.message_types()[cls]
    known = {field.name for field in dataclasses.fields(cls)}
    assert {field.name for field in message.DESCRIPTOR.fields} == known


def test_lifecycle_numbers_agree_with_the_schema() -> None:
    schema = lifecycle_pb2.SeedLifecycleState.items()
    prefix = "SEED_LIFECYCLE_STATE_"
    expected = {name.removeprefix(prefix): number for name, number in schema if number}
    assert {state.name: int(state) for state in SeedLifecycleState} == expected


def test_unspecified_enum_is_refused_by_field_name() -> None:
    message = telemetry_pb2.SeedStatus(seed_index=1)
    with pytest.raises(InvalidInputError, match=r"SeedStatus\.state must be one of DORMANT.*UNSPECIFIED"):
        wire.from_wire(message, SeedStatus)


def test_unknown_enum_number_is_refused_by_value() -> None:
    message = telemetry_pb2.SeedStatus()
    message.ParseFromString(telemetry_pb2.SeedStatus(state=3).SerializeToString()[:-1] + b"\x63")
    with pytest.raises(InvalidInputError, match=r"SeedStatus\.state must be one of .*got 99"):
        wire.from_wire(message, SeedStatus)


def test_absent_required_time_is_refused() -> None:
    message = telemetry_pb2.SystemStatePacket(run_id="r", sequence=1, phase=telemetry_pb2.RUN_PHASE_STARTED)
    with pytest.raises(InvalidInputError, match=r"SystemStatePacket\.created_at must be set"):
        wire.from_wire(message, SystemStatePacket)


def test_a_packet_of_a_version_without_the_newer_fields_is_read() -> None:
    message = telemetry_pb2.SystemStatePacket(run_id="r", sequence=1, phase=telemetry_pb2.RUN_PHASE_STARTED)
    message.created_at.GetCurrentTime()
    message.layers.add(layer="0").seeds.add(state=lifecycle_pb2.SEED_LIFECYCLE_STATE_ACTIVE)
    packet = wire.parse(message.SerializeToString(), SystemStatePacket)
    assert packet.allowed_blueprints == ""
    assert packet.layers[0].seeds[0].source == ""


def test_a_change_of_a_version_without_groups_is_one_of_every_group() -> None:
    older = b"\x09" + struct.pack("<d", 0.5)  # field 1 alone, as it was before there were groups and resets
    change = wire.parse(older, ParameterChange)
    assert change == ParameterChange(learning_rate_factor=0.5, group=None, resets_state=False)
    assert wire.serialize(ParameterChange(learning_rate_factor=0.5)) == older


@pytest.mark.parametrize("group", [None, 0, 3])
@pytest.mark.parametrize("resets_state", [False, True])
def test_a_change_of_one_group_survives_the_wire(group: int | None, resets_state: bool) -> None:
    change = ParameterChange(weight_decay_factor=2.0, group=group, resets_state=resets_state)
    assert wire.parse(wire.serialize(change), ParameterChange) == change


def test_a_field_report_of_a_version_without_fall_backs_is_read() -> None:
    message = telemetry_pb2.FieldReport(report_id="r1", outcome=telemetry_pb2.ADAPTATION_OUTCOME_KEPT)
    message.created_at.GetCurrentTime()
    assert wire.parse(message.SerializeToString(), FieldReport).fallbacks == ()
    message.fallbacks.add(target=kernel_pb2.COMPILE_TARGET_TORCHSCRIPT, reason="no operator")
    given_up = (CompileFallback(target=CompileTarget.TORCHSCRIPT, reason="no operator"),)
    assert wire.parse(message.SerializeToString(), FieldReport).fallbacks == given_up


def test_empty_attribute_is_refused() -> None:
    message = blueprint_pb2.IRNode(name="a", op="linear")
    message.attributes["features"].SetInParent()
    with pytest.raises(InvalidInputError, match="hold a value in every attribute"):
        wire.from_wire(message, IRNode)


def test_bytes_of_another_format_are_corrupt() -> None:
    with pytest.raises(CorruptDataError, match=r"esper\.v1\.BlueprintIR does not parse"):
        wire.parse(b"\xff\xff\xff", BlueprintIR)


def test_message_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"be esper\.v1\.SeedStatus"):
        wire.from_wire(telemetry_pb2.HealthBatch(), SeedStatus)


def test_value_that_does_not_fit_its_wire_type_is_refused() -> None:
    value = SeedStatus(seed_index=-1, state=SeedLifecycleState.DORMANT)
    with pytest.raises(InvalidInputError, match=r"SeedStatus\.seed_index must fit its wire type"):
        wire.to_wire(value)


def test_moment_without_time_zone_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="carry a time zone"):
        wire.to_timestamp(datetime(2026, 1, 1))  # noqa: DTZ001


def test_site_with_an_empty_shape_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"site\.input_shape must be 1 to 4 sizes"):
        Site(kind=SiteKind.LINEAR, input_shape=(), output_shape=(1,))
