"""Oona: the message bus that carries a run's telemetry, events and compile jobs."""

from esper.telemetry.bus import Bus, BusMessage, BusStats, Consumer, Delivery, PublishAck, Subscription
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.nats_bus import NatsBus
from esper.telemetry.nats_connection import NatsOptions
from esper.telemetry.nats_server import NatsServer, NatsServerConfig
from esper.telemetry.streams import COMPILE, DEAD, EVENTS, STREAMS, StreamSpec, streams_with_replicas
from esper.telemetry.subjects import (
    Kind,
    Subject,
    build_subject,
    compile_job_subject,
    dead_subject,
    kind_patterns,
    parse_subject,
    run_pattern,
)

__all__ = [
    "COMPILE",
    "DEAD",
    "EVENTS",
    "STREAMS",
    "Bus",
    "BusMessage",
    "BusStats",
    "Consumer",
    "Delivery",
    "Kind",
    "MemoryBroker",
    "MemoryBus",
    "NatsBus",
    "NatsOptions",
    "NatsServer",
    "NatsServerConfig",
    "PublishAck",
    "StreamSpec",
    "Subject",
    "Subscription",
    "build_subject",
    "compile_job_subject",
    "dead_subject",
    "kind_patterns",
    "parse_subject",
    "run_pattern",
    "streams_with_replicas",
]
