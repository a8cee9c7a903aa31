"""How an archive is refused."""

from __future__ import annotations

import ast
from typing import Final

from esper.contracts.errors import CorruptDataError, InvalidInputError

_MAX_SHOWN_CHARS: Final = 200


def refuse(rule: str, received: object, *, record: str = "") -> CorruptDataError:
    """Build the error that names the record at fault, the rule and what stood there."""
    where = f"binary: record '{record}'" if record else "binary"
    return CorruptDataError(InvalidInputError.of(where, rule, received).message, parameter="binary")


def shown(node: ast.AST) -> str:
    """Give the beginning of the source of a node for a message; of one nested too deep to print, what it is."""
    try:
        return ast.unparse(node)[:_MAX_SHOWN_CHARS]
    except RecursionError:
        return type(node).__name__
