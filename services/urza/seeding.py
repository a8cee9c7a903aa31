"""Puts the templates that ship with Esper into the library, and takes them through its life cycle.

Where a release ships another graph under a template's name, that is a new version. It names the one shipped before as
its parent, and what was shipped before is DEPRECATED: no longer offered, while runs and checkpoints that use it go on
and find it, with its kernels and what was reported of it. So is a template that a release no longer ships at all,
unless a newer release has been here: that one's templates an older one does not know. What left the offer in one of
these ways comes back when a later release ships it again; what a person withdrew does not.

A version whose row has rotted is set aside; the release's own is stored anew in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from typing import Final

from esper import __version__
from esper.blueprints.registry import BlueprintRegistry
from esper.contracts import wire
from esper.contracts.blueprint import Blueprint, BlueprintState, Lineage
from esper.contracts.errors import AlreadyExistsError, InvalidInputError, InvalidTransitionError
from esper.services.urza.blueprint_records import BlueprintRecord, rot_of
from esper.services.urza.blueprint_store import BlueprintStore
from esper.services.urza.models import REGISTRY
from esper.services.urza.rules import BlueprintDraft

log = logging.getLogger(__name__)

VALIDATED_TAG: Final = "validated"
"""Tag that every template carries in the library."""

_STEPS: Final = (
    (BlueprintState.DRAFT, BlueprintState.VALIDATED, "the graph passed the structural checks of the registry"),
    (BlueprintState.VALIDATED, BlueprintState.ACTIVE, "offered to runs as a template"),
)


async def seed_library(blueprints: BlueprintStore, registry: BlueprintRegistry) -> tuple[Blueprint, ...]:
    """Store every template, make it ACTIVE, and have it supersede the versions shipped before; idempotent.

    Whatever an operator did is left alone: a version that was withdrawn by hand stays so, one that was offered again
    by hand does, too, and versions that others stored under a template's name stay offered. A template whose graph
    somebody stored under another name is there already; it is left out, and the log says so, as it does of one that
    this build cannot read. Replicas may seed one library at once.

    Raises:
        UnavailableError: The store cannot be reached.
    """
    release = _digest_of(registry)
    await blueprints.templates.register(release)  # before anything of it is stored: see _withdraw_unshipped
    seeded = []
    num_new = 0
    for name in registry.names():
        try:
            template, created = await _seed(blueprints, registry, name, release)
        except AlreadyExistsError as error:
            log.warning("template_stored_under_another_name", extra={"template": name, "error": str(error)})
        except InvalidInputError as error:  # parts that parse and break a rule: a newer release may know it
            log.error("template_unreadable", extra={"template": name, "error": str(error)})
        else:
            num_new += created
            seeded.append(template)
    await _withdraw_unshipped(blueprints, registry, release)
    log.info("library_seeded", extra={"templates": len(seeded), "new": num_new})
    return tuple(seeded)


async def _seed(
    blueprints: BlueprintStore, registry: BlueprintRegistry, name: str, release: str
) -> tuple[Blueprint, bool]:
    own_id = registry.create_blueprint(name).id
    others = [one for one in await blueprints.version_records(name) if one.id != own_id]
    shipped = [one for one in await _sound(blueprints, others) if _is_shipped(one)]
    template, created = await blueprints.create(_draft_of(registry, name, shipped))
    for before, after, reason in _STEPS:
        if template.state is before:
            template = await _step(blueprints, template.id, before, after, reason)
    template = await _offer_again(blueprints, template, release)
    await _supersede(blueprints, template, shipped, release)
    return template, created


async def _sound(blueprints: BlueprintStore, records: Sequence[BlueprintRecord]) -> list[BlueprintRecord]:
    """Give the records that hold, with the others set aside."""
    found = []
    for record in records:
        if rot_of(record) is None:
            found.append(record)
        else:
            await blueprints.set_aside(record.id)
    return found


def _is_shipped(record: BlueprintRecord) -> bool:
    lineage = wire.parse(record.lineage, Lineage)
    return (lineage.operator, lineage.author) == ("template", REGISTRY)


async def _offer_again(blueprints: BlueprintStore, template: Blueprint, release: str) -> Blueprint:
    """Put a template back that the registry itself took out of the offer, unless this is an older release."""
    if template.state is not BlueprintState.DEPRECATED:
        return template
    if (await blueprints.history(template.id))[-1].actor != REGISTRY:
        return template
    reason = f"shipped again with Esper {__version__}"
    step = BlueprintState.DEPRECATED, BlueprintState.ACTIVE, reason
    after = await _step(blueprints, template.id, *step, release=release)
    if after.state is BlueprintState.ACTIVE:
        log.info("template_shipped_again", extra={"template": f"{template.name}@{template.version}"})
    return after


async def _supersede(
    blueprints: BlueprintStore, template: Blueprint, shipped: list[BlueprintRecord], release: str
) -> None:
    """Deprecate what else was shipped under a template's name; one that is not offered itself supersedes nothing."""
    if template.state is not BlueprintState.ACTIVE:
        extra = {"template": f"{template.name}@{template.version}", "state": template.state.name}
        log.warning("template_not_offered", extra=extra)
        return
    reason = f"superseded by {template.name}@{template.version}"
    for one in shipped:
        if await _deprecate(blueprints, one, reason, release):
            log.info("template_superseded", extra={"template": f"{one.name}@{one.version}", "by": template.version})


async def _withdraw_unshipped(blueprints: BlueprintStore, registry: BlueprintRegistry, release: str) -> None:
    """Deprecate templates that the registry stored and this release has not, unless it is an older one.

    What is withdrawn is read before the order is: a newer release is registered before its first template is stored.
    """
    names = registry.names()
    ids = {registry.create_blueprint(name).id for name in names}
    offered = [one for one in await blueprints.templates.offered() if one.name not in names and one.id not in ids]
    gone = [one for one in await _sound(blueprints, offered) if _is_shipped(one)]
    if not gone:
        return
    if not await blueprints.templates.is_newest(release):
        log.info("templates_of_newer_release", extra={"templates": [f"{one.name}@{one.version}" for one in gone]})
        return
    for one in gone:
        if await _deprecate(blueprints, one, f"no longer shipped with Esper {__version__}", release):
            log.info("template_no_longer_shipped", extra={"template": f"{one.name}@{one.version}"})


async def _deprecate(blueprints: BlueprintStore, one: BlueprintRecord, reason: str, release: str) -> bool:
    """Take a template out of the offer, unless somebody put it back by hand or this is an older release."""
    if one.state != BlueprintState.ACTIVE:
        return False
    last = (await blueprints.history(one.id))[-1]
    if last.from_state is BlueprintState.DEPRECATED and last.actor != REGISTRY:
        return False
    step = BlueprintState.ACTIVE, BlueprintState.DEPRECATED, reason
    return (await _step(blueprints, one.id, *step, release=release)).state is BlueprintState.DEPRECATED


async def _step(
    blueprints: BlueprintStore,
    blueprint_id: str,
    before: BlueprintState,
    after: BlueprintState,
    reason: str,
    *,
    release: str = "",
) -> Blueprint:
    """Take a step; where another replica took this one and the next, or a newer release is known, change nothing."""
    said = {"actor": REGISTRY, "reason": reason}
    try:
        return await blueprints.set_state(blueprint_id, after, before=before, release=release, **said)
    except InvalidTransitionError:
        return await blueprints.get(blueprint_id)


def _draft_of(registry: BlueprintRegistry, name: str, shipped: list[BlueprintRecord]) -> BlueprintDraft:
    """Give what is to be stored; the version shipped last is its parent."""
    template = registry.create_blueprint(name)
    tags = list(template.metadata.tags)
    if VALIDATED_TAG not in tags:
        tags.append(VALIDATED_TAG)
    metadata = dataclasses.replace(template.metadata, tags=tags)
    lineage = dataclasses.replace(template.lineage, parent_ids=tuple(one.id for one in shipped[-1:]))
    return BlueprintDraft(name=name, ir=template.ir, metadata=metadata, lineage=lineage)


def _digest_of(registry: BlueprintRegistry) -> str:
    """Give what a release is known by: its version, and the names and graphs of its templates."""
    templates = sorted(f"{name} {registry.create_blueprint(name).id}" for name in registry.names())
    return hashlib.sha256("\n".join((__version__, *templates)).encode()).hexdigest()
