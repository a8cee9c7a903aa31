"""Who calls, and whether they may: bearer tokens from outside, certificates within the mesh, one role per method.

A token is shown once, when it is issued; the file keeps its SHA-256 alone. A certificate of the mesh's authority names
its owner as ``spiffe://esper/<name>`` and stands for the role `Role.SERVICE`. Within one process everybody is local.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from esper.contracts.errors import (
    AlreadyExistsError,
    ConfigError,
    CorruptDataError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from esper.mesh.roles import METHOD_ROLES, Role
from esper.mesh.validation import require_id

log = logging.getLogger(__name__)

AUTHORIZATION_KEY: Final = "authorization"
_SPIFFE_PREFIX: Final = "spiffe://esper/"
_SAN_KEY: Final = "x509_subject_alternative_name"
_VERSION: Final = 1


@dataclass(frozen=True)
class Caller:
    """Who makes a call."""

    name: str
    """Name of the token or certificate; what audits record."""
    role: Role
    """What they may do."""


LOCAL_CALLER: Final = Caller("local", Role.SERVICE)
"""Whoever calls within this process, or over loopback where no tokens are set up."""

_caller: ContextVar[Caller] = ContextVar("esper_caller", default=LOCAL_CALLER)


def current_caller() -> Caller:
    """Give the caller of the RPC being served in this task; `LOCAL_CALLER` outside of any."""
    return _caller.get()


def bearer(token: str) -> tuple[str, str]:
    """Give the metadata entry that carries a token."""
    return AUTHORIZATION_KEY, f"Bearer {token}"


class TokenStore:
    """The tokens of one file; a change of the file holds from the next call on. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._by_digest: dict[str, Caller] = {}

    def issue(self, name: str, role: Role) -> str:
        """Add a token and give it; it cannot be shown again.

        Raises:
            InvalidInputError: the name is not an identity.
            AlreadyExistsError: there is a token of this name.
        """
        require_id("name", name)
        with self._lock:
            known = self._read()
            if any(caller.name == name for caller in known.values()):
                raise AlreadyExistsError(f"name must be free, got {name!r}, which has a token", parameter="name")
            token = secrets.token_urlsafe(32)
            self._write({**known, _digest(token): Caller(name, role)})
        return token

    def revoke(self, name: str) -> None:
        """Take the token of a name away.

        Raises:
            NotFoundError: there is none.
        """
        with self._lock:
            known = self._read()
            kept = {digest: caller for digest, caller in known.items() if caller.name != name}
            if len(kept) == len(known):
                raise NotFoundError(f"name must be that of a token, got {name!r}", parameter="name")
            self._write(kept)

    def callers(self) -> tuple[Caller, ...]:
        """Give whom the tokens belong to."""
        with self._lock:
            return tuple(self._read().values())

    def find(self, token: str) -> Caller | None:
        """Give whom a token belongs to, or ``None``; digests are compared, so timing tells nothing of tokens."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._by_digest, self._stamp = self._read(), stamp
            return self._by_digest.get(_digest(token))

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _read(self) -> dict[str, Caller]:
        try:
            raw: Any = json.loads(self._path.read_bytes())
            if raw["version"] != _VERSION:
                raise CorruptDataError(f"{self._path} must have version {_VERSION}, got {raw['version']!r}")
            return {str(entry["sha256"]): Caller(str(entry["name"]), Role[entry["role"]]) for entry in raw["tokens"]}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CorruptDataError):
                raise
            raise CorruptDataError(f"{self._path} must be a token file, got {type(error).__name__}: {error}") from error

    def _write(self, tokens: Mapping[str, Caller]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        entries = [{"name": c.name, "role": c.role.name, "sha256": digest} for digest, c in tokens.items()]
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "tokens": entries}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class Authorizer:
    """Decides for every call of a server who makes it and whether they may."""

    def __init__(self, tokens: TokenStore | None, *, roles: Mapping[str, Role] = METHOD_ROLES) -> None:
        """Make an authorizer.

        Args:
            tokens: Tokens of callers from outside; ``None`` lets callers without a certificate be `LOCAL_CALLER`.
            roles: Least role by ``/package.Service/Method``.
        """
        self._tokens = tokens
        self._roles = roles

    def require_declared(self, paths: Iterable[str]) -> None:
        """Make sure each method has a role.

        Raises:
            ConfigError: one has none; the message names it.
        """
        missing = [path for path in paths if path not in self._roles]
        if missing:
            raise ConfigError(
                f"every method must declare its role, got none for {', '.join(missing)}", parameter="roles"
            )

    def authorize(
        self, path: str, metadata: Iterable[tuple[str, str | bytes]], auth_context: Mapping[str, Any]
    ) -> Caller:
        """Give the caller of a call, and make it the current one of this task.

        Raises:
            PermissionDeniedError: the token is unknown, nobody vouches for the caller, or the role is too low.
            UnavailableError: the token file is damaged; nobody gets in by it.
        """
        caller = self._identify(metadata, auth_context)
        needed = self._roles.get(path)
        if needed is None:
            raise PermissionDeniedError(f"{path.lstrip('/')} must declare a role before anybody may call it, got none")
        if caller.role < needed:
            raise PermissionDeniedError(
                f"the caller of {path.lstrip('/')} must be at least {needed.name.lower()}, got {caller.name!r}, "
                f"who is {caller.role.name.lower()}"
            )
        _caller.set(caller)
        return caller

    def _identify(self, metadata: Iterable[tuple[str, str | bytes]], auth_context: Mapping[str, Any]) -> Caller:
        token = _token_in(metadata)
        if token is not None and self._tokens is not None:
            try:
                found = self._tokens.find(token)
            except CorruptDataError as error:
                log.error("tokens_unreadable", extra={"error": error.message})
                raise UnavailableError("the tokens of this server cannot be read; its log says why") from error
            if found is None:
                raise PermissionDeniedError("the bearer token must be one this mesh issued, got another one")
            return found
        name = _certificate_name(auth_context)
        if name is not None:
            return Caller(name, Role.SERVICE)
        if self._tokens is None:
            return LOCAL_CALLER
        raise PermissionDeniedError("the caller must show a bearer token or a certificate of the mesh, got neither")


def _token_in(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for key, value in metadata:
        if key == AUTHORIZATION_KEY and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return None


def _certificate_name(auth_context: Mapping[str, Any]) -> str | None:
    """Give the name in the caller's certificate; gRPC has checked by whom that is signed."""
    for raw in auth_context.get(_SAN_KEY, ()):
        text = raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else str(raw)
        if text.startswith(_SPIFFE_PREFIX):
            return text.removeprefix(_SPIFFE_PREFIX)
    return None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
