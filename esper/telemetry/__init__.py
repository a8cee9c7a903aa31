"""Oona: the message bus that carries a run's telemetry, events and compile jobs."""

from esper.telemetry.bus import Bus, BusMessage, BusStats, Consumer, Delivery, PublishAck, Subscription
from esper.telemetry.client import OonaClient
from esper.telemetry.consumer import (
    HealthBatches,
    Received,
    TypedConsumer,
    TypedSubscription,
    decode_any,
    durable_messages,
    health_batches,
    messages,
    replay_run,
)
from esper.telemetry.health_wire import health_columns
from esper.telemetry.mailbox import Mail, Mailbox
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.nats_bus import NatsBus
from esper.telemetry.nats_connection import NatsOptions
from esper.telemetry.nats_server import NatsServer, NatsServerConfig
from esper.telemetry.publisher import OonaPublisher, PublisherConfig, PublisherStats
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
    "HealthBatches",
    "Kind",
    "Mail",
    "Mailbox",
    "MemoryBroker",
    "MemoryBus",
    "NatsBus",
    "NatsOptions",
    "NatsServer",
    "NatsServerConfig",
    "OonaClient",
    "OonaPublisher",
    "PublishAck",
    "PublisherConfig",
    "PublisherStats",
    "Received",
    "StreamSpec",
    "Subject",
    "Subscription",
    "TypedConsumer",
    "TypedSubscription",
    "build_subject",
    "compile_job_subject",
    "dead_subject",
    "decode_any",
    "durable_messages",
    "health_batches",
    "health_columns",
    "kind_patterns",
    "messages",
    "parse_subject",
    "replay_run",
    "run_pattern",
    "streams_with_replicas",
]
