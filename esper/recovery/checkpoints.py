"""The checkpoint manager: component states on disk, each part stored once, nothing half-written ever read back.

Layout of the directory:

    blobs/<sha256>.safetensors     tensors of one component, named by their content: an unchanged one is stored once
    <checkpoint id>.json           manifest: components, plain data, digests; written last, its own digest inside

A file appears under its final name only when it is whole (written beside it, flushed to the device, renamed).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch

from esper.contracts.errors import CorruptDataError, InvalidInputError, NotFoundError
from esper.core.flatten import flatten, unflatten
from esper.execution.durable_file import replace_file

log = logging.getLogger(__name__)

_FORMAT: Final = 1
_ID: Final = re.compile(r"c\d{17}-[0-9a-f]{8}")


class ComponentType(StrEnum):
    """What a checkpoint can hold; each is captured and restored by its owner."""

    TOLARIA = "tolaria"
    """Counters and position of the training run, optimizer, scheduler, random streams."""
    KASMINA = "kasmina"
    """Model, grown structure, seeds."""
    ORCHESTRATOR = "orchestrator"
    """Adaptations under way, budget, history."""
    TAMIYO = "tamiyo"
    """Policy's memory of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentState:
    """State of one component as nested plain data with tensors."""

    component: ComponentType
    """Whose state it is."""
    state_data: Mapping[str, Any]
    """Numbers, text, lists, tuples, mappings and tensors, nested at will."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredCheckpoint:
    """A checkpoint as read back and verified."""

    checkpoint_id: str
    """Its id."""
    created_at: datetime
    """When it was written."""
    components: Mapping[ComponentType, ComponentState] = field(default_factory=dict)
    """Components by type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where and how often checkpoints are written.

    Raises:
        InvalidInputError: A value breaks its rule.
    """

    directory: Path
    """Directory of the checkpoints; created when missing."""
    interval: timedelta = timedelta(minutes=30)
    """Time between two scheduled checkpoints, > 0."""
    keep: int = 5
    """Checkpoints kept; older ones go, with the parts nobody needs any more. At least 1."""

    def __post_init__(self) -> None:
        if self.interval <= timedelta(0):
            raise InvalidInputError.of("checkpoint.interval", "be > 0", self.interval)
        if self.keep < 1:
            raise InvalidInputError.of("checkpoint.keep", "be at least 1", self.keep)


Components = Mapping[ComponentType, ComponentState | Mapping[str, Any]]


class CheckpointManager:
    """Writes and reads checkpoints in one directory; one writer per directory, any number of readers."""

    def __init__(self, config: CheckpointConfig | Path | str) -> None:
        self.config = config if isinstance(config, CheckpointConfig) else CheckpointConfig(directory=Path(config))
        self._blobs = self.config.directory / "blobs"

    async def create_checkpoint(self, components: Components) -> str:
        """Write a checkpoint and give its id; the files are written in a worker thread.

        Tensors are read while they are written: hand over copies when training goes on meanwhile.

        Raises:
            InvalidInputError: There is no component, or a state holds what has no plain form.
            StorageFullError: The device is full; earlier checkpoints are untouched.
        """
        return await asyncio.to_thread(self.write, components)

    async def restore_checkpoint(self, checkpoint_id: str) -> RestoredCheckpoint:
        """Read a checkpoint back, verified to the last byte.

        Raises:
            InvalidInputError: The id is malformed.
            NotFoundError: There is no such checkpoint.
            CorruptDataError: A digest or the format does not hold.
        """
        return await asyncio.to_thread(self.read, checkpoint_id)

    @property
    def interval_s(self) -> float:
        """Seconds between two scheduled checkpoints."""
        return self.config.interval.total_seconds()

    def save_state(self, state: Mapping[str, Mapping[str, Any]]) -> str:
        """Write component states by name, in the calling thread; see :meth:`create_checkpoint`."""
        return self.write({ComponentType(name): data for name, data in state.items()})

    def load_state(self, checkpoint_id: str) -> dict[str, Mapping[str, Any]]:
        """Give component states by name, in the calling thread; see :meth:`restore_checkpoint`."""
        restored = self.read(checkpoint_id).components
        return {kind.value: component.state_data for kind, component in restored.items()}

    def write(self, components: Components) -> str:
        """Write a checkpoint in the calling thread; see :meth:`create_checkpoint`."""
        if not components:
            raise InvalidInputError.of("components", "hold at least one component", "none")
        self._blobs.mkdir(parents=True, exist_ok=True)
        entries = {kind.value: self._write_component(kind, state) for kind, state in components.items()}
        now = datetime.now(UTC)
        checkpoint_id = self._next_id(now)
        body = {"format": _FORMAT, "id": checkpoint_id, "created_at": now.isoformat(), "components": entries}
        document = {"body": body, "sha256": _digest_of_json(body)}
        replace_file(self._manifest(checkpoint_id), json.dumps(document).encode())
        self._retire()
        log.info("checkpoint_written", extra={"checkpoint_id": checkpoint_id})
        return checkpoint_id

    def read(self, checkpoint_id: str) -> RestoredCheckpoint:
        """Read a checkpoint in the calling thread; see :meth:`restore_checkpoint`."""
        body = self._body(checkpoint_id)
        try:
            components = {
                ComponentType(name): self._read_component(name, entry) for name, entry in body["components"].items()
            }
            created_at = datetime.fromisoformat(body["created_at"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorruptDataError):
                raise
            raise CorruptDataError(f"checkpoint {checkpoint_id} must follow format {_FORMAT}: {error}") from error
        return RestoredCheckpoint(checkpoint_id=checkpoint_id, created_at=created_at, components=components)

    def list_checkpoints(self) -> tuple[str, ...]:
        """Give the ids, oldest first; whether they verify is told by reading them."""
        found = (path.stem for path in self.config.directory.glob("c*.json"))
        return tuple(sorted(name for name in found if _ID.fullmatch(name)))

    def latest(self) -> str | None:
        """Give the newest id that verifies, or ``None``; one that does not is passed over with a warning."""
        for checkpoint_id in reversed(self.list_checkpoints()):
            try:
                self.read(checkpoint_id)
            except CorruptDataError as error:
                log.warning("checkpoint_corrupt", extra={"checkpoint_id": checkpoint_id, "error": str(error)})
            else:
                return checkpoint_id
        return None

    def _next_id(self, now: datetime) -> str:
        """Give an id that sorts after every other, also when the clock was set back."""
        stamp = int(f"{now:%Y%m%d%H%M%S}{now.microsecond // 1000:03d}")
        known = self.list_checkpoints()
        if known:
            stamp = max(stamp, int(known[-1][1:18]) + 1)
        return f"c{stamp:017d}-{secrets.token_hex(4)}"

    def _manifest(self, checkpoint_id: str) -> Path:
        if not _ID.fullmatch(checkpoint_id):
            raise InvalidInputError.of("checkpoint_id", "look like c20260101120000000-0123abcd", checkpoint_id)
        return self.config.directory / f"{checkpoint_id}.json"

    def _body(self, checkpoint_id: str) -> Any:
        path = self._manifest(checkpoint_id)
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise NotFoundError(f"checkpoint must exist in {self.config.directory}, got {checkpoint_id}") from None
        except ValueError as error:
            raise CorruptDataError(f"checkpoint {checkpoint_id} must be JSON: {error}") from error
        body = document.get("body") if isinstance(document, dict) else None
        if not isinstance(body, dict) or document.get("sha256") != _digest_of_json(body):
            raise CorruptDataError(f"checkpoint {checkpoint_id} must match its digest")
        if body.get("format") != _FORMAT or body.get("id") != checkpoint_id:
            raise CorruptDataError(f"checkpoint {checkpoint_id} must have format {_FORMAT}, got {body.get('format')!r}")
        return body

    def _write_component(self, kind: ComponentType, state: ComponentState | Mapping[str, Any]) -> dict[str, Any]:
        data = state.state_data if isinstance(state, ComponentState) else state
        tree, tensors = flatten(data, kind.value)
        payload = safetensors.torch.save({name: _storable(tensor) for name, tensor in tensors.items()})
        digest = hashlib.sha256(payload).hexdigest()
        blob = self._blobs / f"{digest}.safetensors"
        if not blob.exists():
            replace_file(blob, payload)
        return {"tree": tree, "sha256": digest, "size_bytes": len(payload)}

    def _read_component(self, name: str, entry: Mapping[str, Any]) -> ComponentState:
        digest = str(entry["sha256"])
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise CorruptDataError(f"digest of component {name} must be 64 hex digits, got {digest!r}")
        try:
            payload = (self._blobs / f"{digest}.safetensors").read_bytes()
        except FileNotFoundError as error:
            raise CorruptDataError(f"tensors of component {name} must be present, got no blob {digest}") from error
        if hashlib.sha256(payload).hexdigest() != digest:
            raise CorruptDataError(f"tensors of component {name} must match their digest {digest}")
        data = unflatten(entry["tree"], safetensors.torch.load(payload))
        return ComponentState(component=ComponentType(name), state_data=data)

    def _retire(self) -> None:
        known = self.list_checkpoints()
        for checkpoint_id in known[: -self.config.keep]:
            self._manifest(checkpoint_id).unlink(missing_ok=True)
        needed = set()
        for checkpoint_id in known[-self.config.keep :]:
            try:
                needed |= {entry["sha256"] for entry in self._body(checkpoint_id)["components"].values()}
            except CorruptDataError as error:
                log.warning("checkpoint_corrupt", extra={"checkpoint_id": checkpoint_id, "error": str(error)})
                return
        for blob in self._blobs.glob("*.safetensors"):
            if blob.stem not in needed:
                blob.unlink(missing_ok=True)


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # safetensors refuses tensors that share memory (tied weights, views), so each is stored on its own.
    return tensor.detach().cpu().contiguous().clone()


def _digest_of_json(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
