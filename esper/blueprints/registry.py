"""The registry of templates: named designs, and the blueprints they yield."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from esper.blueprints.cost import plan_cost
from esper.blueprints.ir import content_id
from esper.blueprints.plan import plan
from esper.blueprints.templates import TEMPLATES
from esper.blueprints.text import parse_text
from esper.blueprints.types import Mixing
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintCost,
    BlueprintIR,
    BlueprintMetadata,
    Lineage,
    Site,
    SiteKind,
)
from esper.contracts.errors import AlreadyExistsError, InvalidBlueprintError, InvalidInputError, NotFoundError

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    ir: BlueprintIR
    metadata: BlueprintMetadata


class BlueprintRegistry:
    """Named templates, in the order they were registered.

    Registering is not thread-safe; reading is.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def register_template(
        self,
        name: str,
        builder: Callable[[], BlueprintIR],
        *,
        tags: Sequence[str] = (),
        description: str = "",
        citation: str = "",
        site_kinds: Sequence[SiteKind] = (),
    ) -> None:
        """Add a template; the builder is called once, here.

        Raises:
            InvalidInputError: The name does not match [a-z0-9][a-z0-9_.-]{0,127}.
            AlreadyExistsError: The name is taken.
            InvalidBlueprintError: The builder's graph is not legal.
        """
        if not _NAME.fullmatch(name):
            raise InvalidInputError.of("name", "match [a-z0-9][a-z0-9_.-]{0,127}", name)
        if name in self._entries:
            raise AlreadyExistsError(f"template '{name}' is already registered", parameter="name")
        ir = builder()
        content_id(ir)
        metadata = BlueprintMetadata(
            tags=list(tags), description=description, citation=citation, site_kinds=tuple(site_kinds)
        )
        self._entries[name] = _Entry(ir=ir, metadata=metadata)

    def names(self) -> tuple[str, ...]:
        """Give the names of all templates, in the order they were registered."""
        return tuple(self._entries)

    def create_blueprint(self, name: str, metadata: BlueprintMetadata | None = None) -> Blueprint:
        """Give the blueprint of a template, with the metadata given or else the template's own.

        Raises:
            NotFoundError: No template has the name; the message lists those that there are.
        """
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            raise NotFoundError(f"template must be one of {known}, got {name!r}", parameter="name")
        said = entry.metadata if metadata is None else metadata
        return Blueprint(
            id=content_id(entry.ir),
            name=name,
            ir=entry.ir,
            metadata=replace(said, tags=list(said.tags)),
            lineage=Lineage(operator="template", author="registry"),
        )

    def for_site(self, site: Site, *, mixing: Mixing = Mixing.FULL) -> list[Blueprint]:
        """Give the blueprints that are legal at a site and meant for its kind, cheapest first.

        ``mixing`` bounds how far information may travel between positions: at a site of a causal language model give
        ``Mixing.CAUSAL``, or seeds would look ahead. Cheap means few parameters, then few operations.
        """
        found: list[tuple[int, int, str]] = []
        for name, entry in self._entries.items():
            price = _price(entry, site, mixing)
            if price is not None:
                found.append((price.parameters, price.flops, name))
        return [self.create_blueprint(name) for _, _, name in sorted(found)]


def default_registry() -> BlueprintRegistry:
    """Give a new registry that holds every template that ships with Esper."""
    registry = BlueprintRegistry()
    for template in TEMPLATES:
        registry.register_template(
            template.name,
            lambda source=template.source: parse_text(source),  # type: ignore[misc]
            tags=template.tags,
            description=template.description,
            citation=template.citation,
            site_kinds=template.site_kinds,
        )
    return registry


def _price(entry: _Entry, site: Site, mixing: Mixing) -> BlueprintCost | None:
    """Give the cost at the site; ``None`` where the template is not to be offered."""
    if entry.metadata.site_kinds and site.kind not in entry.metadata.site_kinds:
        return None
    try:
        layout = plan(entry.ir, site)
    except InvalidBlueprintError:
        return None
    return plan_cost(layout) if layout.mixing <= mixing else None
