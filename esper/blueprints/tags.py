"""Which tags a run reads off a blueprint, and whether an expression over them lets it stand.

    tag                        a blueprint has it whose graph
    conv, convolution          convolves: ``conv`` or ``depthwise_conv``
    attention                  attends: ``attention``
    linear                     has a map over the features: ``linear`` or ``low_rank``
    dense                      neither convolves nor attends
    name of an operator        uses that operator, e.g. ``global_pool``

These are read off the graph, whatever its author says of it: a design that nobody tagged is bound by an expression like
any other, and a wrong tag opens no door. Every other tag is the author's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from esper.blueprints.operators import OPERATORS
from esper.blueprints.templates import TEMPLATES
from esper.contracts.blueprint import Blueprint, BlueprintIR
from esper.contracts.tag_expression import TagExpression, holds, named

KINDS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "conv": frozenset({"conv", "depthwise_conv"}),
        "convolution": frozenset({"conv", "depthwise_conv"}),
        "attention": frozenset({"attention"}),
        "linear": frozenset({"linear", "low_rank"}),
    }
)
"""Kinds of operators, by the tag that a graph with one of them has."""

DESIGNED: Final = ("karn", "generated")
"""Tags of every design that Karn makes."""
SEEDED: Final = "validated"
"""Tag that the library gives to the templates it begins with."""

_DENSE: Final = "dense"
_NOT_DENSE: Final = KINDS["conv"] | KINDS["attention"]
_READ: Final = frozenset({*KINDS, _DENSE, *OPERATORS})


def tags_of(ir: BlueprintIR, given: Iterable[str] = ()) -> frozenset[str]:
    """Give the tags of a graph to which its author gave some; see the module."""
    operators = frozenset(node.op for node in ir.nodes)
    kinds = {kind for kind, members in KINDS.items() if operators & members}
    dense = () if operators & _NOT_DENSE else (_DENSE,)
    return frozenset({*operators, *kinds, *dense, *(frozenset(given) - _READ)})


def is_allowed(blueprint: Blueprint, expression: TagExpression | None) -> bool:
    """Say whether an expression lets a blueprint stand; ``None`` lets every one."""
    return expression is None or holds(expression, tags_of(blueprint.ir, blueprint.metadata.tags))


def unknown_tags(expression: TagExpression | None) -> list[str]:
    """Give the tags of an expression that nothing has of what ships with Esper: somebody's own, or mistakes."""
    shipped = {SEEDED, *DESIGNED, *(tag for template in TEMPLATES for tag in template.tags)}
    return sorted(named(expression) - _READ - shipped)
