"""The generated stub of every service, by the service's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from esper.v1.karn_service_pb2_grpc import KarnServiceStub
from esper.v1.nissa_service_pb2_grpc import NissaServiceStub
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub
from esper.v1.tolaria_service_pb2_grpc import TolariaServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

STUBS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "tolaria": TolariaServiceStub,
    "tamiyo": TamiyoServiceStub,
    "karn": KarnServiceStub,
    "urza": UrzaServiceStub,
    "tezzeret": TezzeretServiceStub,
    "nissa": NissaServiceStub,
}
"""Makes a stub from a gRPC or an in-process channel."""
