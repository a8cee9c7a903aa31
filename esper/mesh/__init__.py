"""What every gRPC server and channel of Esper shares, and the processes of a mesh on one machine."""

from __future__ import annotations

from esper.mesh.auth import LOCAL_CALLER, Authorizer, Caller, TokenStore, current_caller
from esper.mesh.breaker import CircuitBreaker
from esper.mesh.calls import END_OF_STREAM, MeshCall, MeshChannel, StreamCall, UnaryCall
from esper.mesh.channel import ChannelConfig, open_channel, probe, service_config
from esper.mesh.deadline import deadline_scope, remaining_s
from esper.mesh.health import ReadinessProbe
from esper.mesh.in_process import InProcessChannel
from esper.mesh.interceptors import RpcEnvelope, RpcPolicy
from esper.mesh.page_token import PageKey, decode_page_token, encode_page_token
from esper.mesh.ports import LOOPBACK, free_port, free_ports, host_port, is_loopback, require_free
from esper.mesh.process_state import MeshState, ProcessRecord, read_state, stop_recorded
from esper.mesh.processes import ProcessSpec, ProcessSupervisor, Readiness
from esper.mesh.roles import METHOD_ROLES, Role
from esper.mesh.rpc_metrics import RpcMetrics
from esper.mesh.server import MeshServer, ServerConfig
from esper.mesh.status import (
    ERROR_DOMAIN,
    ERROR_OF,
    STATUS_OF,
    code_of,
    from_rpc_error,
    incident_id,
    retry_delay_s,
    to_grpc_status,
    to_status,
)
from esper.mesh.tls import CertificateAuthority, TlsConfig
from esper.mesh.validation import (
    require_enum,
    require_id,
    require_name,
    require_page_size,
    require_range,
    require_size,
    require_tags,
)

__all__ = [
    "END_OF_STREAM",
    "ERROR_DOMAIN",
    "ERROR_OF",
    "LOCAL_CALLER",
    "LOOPBACK",
    "METHOD_ROLES",
    "STATUS_OF",
    "Authorizer",
    "Caller",
    "CertificateAuthority",
    "ChannelConfig",
    "CircuitBreaker",
    "InProcessChannel",
    "MeshCall",
    "MeshChannel",
    "MeshServer",
    "MeshState",
    "PageKey",
    "ProcessRecord",
    "ProcessSpec",
    "ProcessSupervisor",
    "Readiness",
    "ReadinessProbe",
    "Role",
    "RpcEnvelope",
    "RpcMetrics",
    "RpcPolicy",
    "ServerConfig",
    "StreamCall",
    "TlsConfig",
    "TokenStore",
    "UnaryCall",
    "code_of",
    "current_caller",
    "deadline_scope",
    "decode_page_token",
    "encode_page_token",
    "free_port",
    "free_ports",
    "from_rpc_error",
    "host_port",
    "incident_id",
    "is_loopback",
    "open_channel",
    "probe",
    "read_state",
    "remaining_s",
    "require_enum",
    "require_free",
    "require_id",
    "require_name",
    "require_page_size",
    "require_range",
    "require_size",
    "require_tags",
    "retry_delay_s",
    "service_config",
    "stop_recorded",
    "to_grpc_status",
    "to_status",
]
