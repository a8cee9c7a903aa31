"""Puts the templates that ship with Esper into the library, and takes them through its life cycle."""

from __future__ import annotations

import dataclasses
import logging
from typing import Final

from esper.blueprints.registry import BlueprintRegistry
from esper.contracts.blueprint import Blueprint, BlueprintState
from esper.contracts.errors import AlreadyExistsError
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
    """Store every template and make it ACTIVE; idempotent, and whatever an operator did later is left alone.

    A template whose graph somebody stored under another name is there already; it is left out, and the log says so.

    Raises:
        UnavailableError: The store cannot be reached.
    """
    seeded = []
    num_new = 0
    for name in registry.names():
        try:
            blueprint, created = await blueprints.create(_draft_of(registry, name))
        except AlreadyExistsError as error:
            log.warning("template_stored_under_another_name", extra={"template": name, "error": str(error)})
            continue
        num_new += created
        for before, after, reason in _STEPS:
            if blueprint.state is before:
                blueprint = await blueprints.set_state(blueprint.id, after, actor=_ACTOR, reason=reason)
        seeded.append(blueprint)
    log.info("library_seeded", extra={"templates": len(seeded), "new": num_new})
    return tuple(seeded)


def _draft_of(registry: BlueprintRegistry, name: str) -> BlueprintDraft:
    template = registry.create_blueprint(name)
    tags = list(template.metadata.tags)
    if VALIDATED_TAG not in tags:
        tags.append(VALIDATED_TAG)
    metadata = dataclasses.replace(template.metadata, tags=tags)
    return BlueprintDraft(name=name, ir=template.ir, metadata=metadata, lineage=template.lineage)
