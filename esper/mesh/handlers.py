"""A table of RPC handlers filled by the generated ``add_XServicer_to_server`` functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

Registrar = Callable[[Any, Any], None]
"""A generated ``add_XServicer_to_server(servicer, server)``."""


class HandlerTable:
    """Takes the place of a server in the generated registrars and remembers what they register.

    Not thread-safe; fill it before the first lookup.
    """

    def __init__(self) -> None:
        self._services: dict[str, dict[str, Any]] = {}
        self._generic: list[Any] = []

    def add_servicer(self, registrar: Registrar, servicer: object) -> tuple[str, ...]:
        """Register one servicer and give the full names of the services it brought."""
        before = set(self.service_names)
        registrar(servicer, self)
        return tuple(name for name in self.service_names if name not in before)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        """Remember handlers of the older registration form."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Remember handlers by service and method name."""
        self._services[service_name] = dict(method_handlers)

    @property
    def service_names(self) -> tuple[str, ...]:
        """Full names of the services, in order of registration."""
        names = dict.fromkeys(self._services)
        for handler in self._generic:
            service_name = getattr(handler, "service_name", None)
            if service_name is not None:
                names.setdefault(service_name())
        return tuple(names)

    @property
    def method_paths(self) -> tuple[str, ...]:
        """``/package.Service/Method`` of every method that was registered by name."""
        return tuple(f"/{service}/{method}" for service, methods in self._services.items() for method in methods)

    def find(self, details: grpc.HandlerCallDetails) -> Any:
        """Give the handler of ``details.method`` (``/package.Service/Method``), or ``None``."""
        service, _, method = details.method.lstrip("/").partition("/")
        known = self._services.get(service, {}).get(method)
        if known is not None:
            return known
        for generic in self._generic:
            handler = generic.service(details)
            if handler is not None:
                return handler
        return None

    def copy_to(self, server: grpc.aio.Server) -> None:
        """Register everything with a real server that was not started yet."""
        if self._generic:
            server.add_generic_rpc_handlers(tuple(self._generic))
        for name, handlers in self._services.items():
            server.add_registered_method_handlers(name, handlers)  # type: ignore[attr-defined]
