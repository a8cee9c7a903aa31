"""What a decision hangs on besides its packet, in a form that is stored once: candidates, settings, versions.

    candidates   a list of places names a menu for each, a menu names blueprints; each is named by the SHA-256 of its
                 bytes. Blueprints go by all of their bytes and not by their id alone, which leaves out names and tags
    settings     every number of the policy's configuration by its name
    versions     of what the figures are worked out with: another one may turn the last bit, and with it a draw

Costs and sites are left out: they follow from blueprint and packet. So is the stream of random numbers (run's seed and
packet's sequence). No clock is looked at: a decision's time is its packet's.
"""

from __future__ import annotations

import hashlib
import platform
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from typing import Any, Final

import numpy as np

import esper
from esper.contracts import wire
from esper.contracts.blueprint import Blueprint
from esper.contracts.errors import InvalidStateError
from esper.contracts.replay import (
    CandidateList,
    CandidateMenu,
    CandidatePlace,
    PolicySettings,
    ReplayDifference,
    Setting,
    SoftwareVersion,
)
from esper.services.tamiyo.calibration import CALIBRATION_VERSION
from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.posterior import MODEL_VERSION

_MAX_BLUEPRINTS: Final = 4_096
_MAX_MENUS: Final = 256

Part = tuple[str, bytes]
"""SHA-256 of some bytes, 64 hex digits, and the bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the decision on one packet hung on, as it is stored."""

    previous_sequence: int
    """Sequence of the run's packet before it; 0 for the first."""
    moment_us: int
    """Newest moment of a lesson or plan that was known."""
    num_lessons: int
    """Lessons that were known, of all runs."""
    candidates: str
    """Digest of the list of candidates; empty where none were asked for."""
    settings: str
    """Digest of the policy's settings."""


class CandidatePacker:
    """Turns candidates into parts; what stays the same from packet to packet is worked out once. Not thread-safe."""

    def __init__(self) -> None:
        self._blueprints: OrderedDict[str, tuple[Blueprint, Part]] = OrderedDict()
        self._menus: OrderedDict[tuple[str, ...], Part] = OrderedDict()

    def pack(self, candidates: Sequence[Candidate], layers: Iterable[str]) -> tuple[str, dict[str, bytes]]:
        """Give the digest of the list of candidates that were asked for at some layers, and every part it needs."""
        parts: dict[str, bytes] = {}
        places: list[CandidatePlace] = []
        for (layer, source), rows in groupby(candidates, key=lambda one: (one.layer, one.source)):
            blueprints = [self._packed(one.blueprint) for one in rows]
            menu, payload = self._menu(tuple(digest for digest, _ in blueprints))
            parts.update(blueprints)
            parts[menu] = payload
            places.append(CandidatePlace(layer=layer, source=source, menu=menu))
        whole, payload = part_of(CandidateList(places=tuple(places), layers=tuple(sorted(layers))))
        parts[whole] = payload
        return whole, parts

    def _packed(self, blueprint: Blueprint) -> Part:
        held = self._blueprints.get(blueprint.id)
        if held is not None and (held[0] is blueprint or held[0] == blueprint):
            return held[1]
        part = part_of(blueprint)
        self._blueprints[blueprint.id] = blueprint, part
        while len(self._blueprints) > _MAX_BLUEPRINTS:
            self._blueprints.popitem(last=False)
        return part

    def _menu(self, blueprints: tuple[str, ...]) -> Part:
        if blueprints not in self._menus:
            self._menus[blueprints] = part_of(CandidateMenu(blueprints=blueprints))
            while len(self._menus) > _MAX_MENUS:
                self._menus.popitem(last=False)
        return self._menus[blueprints]


def part_of(value: object) -> Part:
    """Give a domain value's bytes with their digest."""
    payload = wire.serialize(value)
    return digest_of(payload), payload


def digest_of(payload: bytes) -> str:
    """Give the name of a part: 64 hex digits."""
    return hashlib.sha256(payload).hexdigest()


def settings_of(config: TamiyoConfig) -> PolicySettings:
    """Give what a policy of these settings decides with, here and now."""
    versions = {
        "calibration": str(CALIBRATION_VERSION),
        "esper": esper.__version__,
        "machine": platform.machine(),
        "numpy": np.__version__,
        "posterior": str(MODEL_VERSION),
        "python": platform.python_version(),
    }
    return PolicySettings(
        settings=tuple(_flat(config)),
        versions=tuple(SoftwareVersion(name=name, version=version) for name, version in versions.items()),
    )


def config_of(recorded: PolicySettings) -> TamiyoConfig:
    """Give the settings back; one that was not known then has its default.

    Raises:
        InvalidStateError: A setting is not known any more.
        InvalidInputError: A setting breaks a rule of now.
    """
    values = {one.name: one.values for one in recorded.settings}
    config: TamiyoConfig = _filled(TamiyoConfig(), values)
    if values:
        raise InvalidStateError(
            f"settings must be known to this version to decide with them again, got {', '.join(sorted(values))}",
            parameter="settings",
        )
    return config


def changes_between(recorded: PolicySettings, present: PolicySettings) -> tuple[ReplayDifference, ...]:
    """Give the settings and versions that differ, by name."""
    then, now = _in_words(recorded), _in_words(present)
    return tuple(
        ReplayDifference(field=name, recorded=then.get(name, ""), replayed=now.get(name, ""))
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    )


def _in_words(settings: PolicySettings) -> dict[str, str]:
    numbers = {one.name: ", ".join(repr(value) for value in one.values) for one in settings.settings}
    return numbers | {f"{one.name} version": one.version for one in settings.versions}


def _flat(config: Any, prefix: str = "") -> Iterator[Setting]:
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            yield from _flat(value, f"{name}.")
        else:
            row = value if isinstance(value, tuple) else (value,)
            yield Setting(name=name, values=tuple(float(number) for number in row))


def _filled(config: Any, values: dict[str, tuple[float, ...]], prefix: str = "") -> Any:
    """Give the configuration with the numbers of ``values``, which are taken out of it."""
    found: dict[str, Any] = {}
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            found[field.name] = _filled(value, values, f"{name}.")
        elif name in values:
            row = values.pop(name)
            found[field.name] = row if isinstance(value, tuple) else type(value)(row[0])
    return replace(config, **found)
