"""Puts the templates that ship with Esper into the library, and takes them through its life cycle.

Where a release ships another graph under a template's name, that is a new version. It names the one shipped before as
its parent, and what was shipped before is DEPRECATED: no longer offered, while runs and checkpoints that use it go on
and find it, with its kernels and what was reported of it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Final

from esper.blueprints.registry import BlueprintRegistry
from esper.contracts import wire
from esper.contracts.blueprint import Blueprint, BlueprintState, Lineage
from esper.contracts.errors import AlreadyExistsError, InvalidTransitionError
from esper.services.urza.blueprint_records import BlueprintRecord
from esper.services.urza.blueprint_store import BlueprintStore
from esper.services.urza.rules import BlueprintDraft

log = logging.getLogger(__name__)

VALIDATED_TAG: Final = "validated"
"""Tag that every template carries in the library."""

_ACTOR: Final = "registry"
_STEPS: Final = (
    (BlueprintState.DRAFT, BlueprintState.VALIDATED, "the graph passed the structural checks of the registry"),
    (BlueprintState.VALIDATED, BlueprintState.ACTIVE, "offered to runs as a template"),
)


async def seed_library(blueprints: BlueprintStore, registry: BlueprintRegistry) -> tuple[Blueprint, ...]:
    """Store every template, make it ACTIVE, and have it supersede the versions shipped before; idempotent.

    Whatever an operator did is left alone: a version that was withdrawn by hand stays so, and versions that others
    stored under a template's name stay offered. A template whose graph somebody stored under another name is there
    already; it is left out, and the log says so. Replicas may seed one library at once.

    Raises:
        UnavailableError: The store cannot be reached.
    """
    seeded = []
    num_new = 0
    for name in registry.names():
        shipped = [one for one in await blueprints.version_records(name) if _is_shipped(one)]
        try:
            blueprint, created = await blueprints.create(_draft_of(registry, name, shipped))
        except AlreadyExistsError as error:
            log.warning("template_stored_under_another_name", extra={"template": name, "error": str(error)})
            continue
        num_new += created
        for before, after, reason in _STEPS:
            if blueprint.state is before:
                blueprint = await _step(blueprints, blueprint.id, after, reason)
        await _supersede(blueprints, blueprint, shipped)
        seeded.append(blueprint)
    log.info("library_seeded", extra={"templates": len(seeded), "new": num_new})
    return tuple(seeded)


def _is_shipped(record: BlueprintRecord) -> bool:
    lineage = wire.parse(record.lineage, Lineage)
    return (lineage.operator, lineage.author) == ("template", _ACTOR)


async def _supersede(blueprints: BlueprintStore, template: Blueprint, shipped: list[BlueprintRecord]) -> None:
    """Deprecate what was shipped before a template; a template that is not offered itself supersedes nothing."""
    if template.state is not BlueprintState.ACTIVE:
        extra = {"template": f"{template.name}@{template.version}", "state": template.state.name}
        log.warning("template_not_offered", extra=extra)
        return
    reason = f"superseded by {template.name}@{template.version}"
    for one in shipped:
        if one.version < template.version and one.state == BlueprintState.ACTIVE:
            await _step(blueprints, one.id, BlueprintState.DEPRECATED, reason)
            log.info("template_superseded", extra={"template": f"{one.name}@{one.version}", "by": template.version})


async def _step(blueprints: BlueprintStore, blueprint_id: str, state: BlueprintState, reason: str) -> Blueprint:
    try:
        return await blueprints.set_state(blueprint_id, state, actor=_ACTOR, reason=reason)
    except InvalidTransitionError:  # another replica has taken this step and the next
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
