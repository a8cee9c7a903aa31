"""Expressions over tags: ``validated & conv2d & !deprecated``, with ``|`` and parentheses.

    expression  =  term { "|" term }
    term        =  factor { "&" factor }
    factor      =  "!" factor  |  "(" expression ")"  |  tag

``!`` binds closest, then ``&``, then ``|``. Blanks between the parts do not matter. What is parsed is in one canonical
form: nested conjunctions and alternatives are flat, operands are sorted and none is there twice, ``!!tag`` is ``tag``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from esper.contracts.errors import InvalidInputError

MAX_CHARS: Final = 1_024
"""Longest expression, in characters."""
MAX_DEPTH: Final = 16
"""Most parentheses and ``!`` that may stand inside one another."""
MAX_TAGS: Final = 32
"""Most tags in one expression, each counted as often as it is written."""

_TAG_CHARS: Final = 64
_PART: Final = re.compile(r"[&|!()]|[a-z0-9][a-z0-9_.-]*", re.ASCII)
_BLANK: Final = re.compile(r"[ \t\r\n]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tag:
    """Holds where the tag is there."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Not:
    """Holds where its operand does not."""

    operand: Tag | AllOf | AnyOf

    def __str__(self) -> str:
        return f"!{_inside(self.operand)}"


@dataclass(frozen=True, slots=True)
class AllOf:
    """Holds where every operand does; two or more of them."""

    operands: tuple[TagExpression, ...]

    def __str__(self) -> str:
        return " & ".join(map(_inside, self.operands))


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Holds where one operand does; two or more of them."""

    operands: tuple[TagExpression, ...]

    def __str__(self) -> str:
        return " | ".join(map(_inside, self.operands))


TagExpression = Tag | Not | AllOf | AnyOf
"""A parsed expression; ``str`` gives its canonical text, equal for expressions that differ only in their writing."""


def parse_tags(text: str, *, parameter: str = "tag_expression") -> TagExpression | None:
    """Give the expression that a text stands for; ``None`` for a blank one, which always holds.

    Raises:
        InvalidInputError: The text is none, or too long, too deep or of too many tags; the message names the position,
            counted in characters from 1.
    """
    if len(text) > MAX_CHARS:
        raise InvalidInputError(
            f"{parameter} must be at most {MAX_CHARS} characters, got {len(text)}", parameter=parameter
        )
    parser = _Parser(text, parameter)
    return None if parser.at_end else parser.whole()


def holds(expression: TagExpression | None, tags: AbstractSet[str]) -> bool:
    """Say whether an expression holds for a set of tags; ``None`` holds for every set."""
    match expression:
        case None:
            return True
        case Tag():
            return expression.name in tags
        case Not():
            return not holds(expression.operand, tags)
        case AllOf():
            return all(holds(operand, tags) for operand in expression.operands)
        case AnyOf():
            return any(holds(operand, tags) for operand in expression.operands)


def named(expression: TagExpression | None) -> frozenset[str]:
    """Give every tag that an expression names."""
    match expression:
        case None:
            return frozenset()
        case Tag():
            return frozenset({expression.name})
        case Not():
            return named(expression.operand)
        case AllOf() | AnyOf():
            return frozenset().union(*map(named, expression.operands))


def covers(expression: TagExpression) -> Iterator[frozenset[str]]:
    """Give sets of tags of each of which a blueprint must have one for the expression to hold."""
    if isinstance(expression, Tag):
        yield frozenset({expression.name})
    elif isinstance(expression, AllOf):
        for operand in expression.operands:
            yield from covers(operand)
    elif isinstance(expression, AnyOf):
        firsts = [next(covers(operand), None) for operand in expression.operands]
        known = [first for first in firsts if first is not None]
        if len(known) == len(firsts):
            yield frozenset().union(*known)


class _Parser:
    """Reads one text from left to right; `whole` may be called once."""

    def __init__(self, text: str, parameter: str) -> None:
        self._text, self._parameter = text, parameter
        self._place = self._num_tags = self._depth = 0
        self._part = ""
        self._advance()

    @property
    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._place == len(self._text)

    def whole(self) -> TagExpression:
        """Give the expression that the text is, to its end."""
        found = self._expression()
        if not self.at_end:
            raise self._refused("have '&', '|' or its end")
        return found

    def _expression(self) -> TagExpression:
        return self._joined("|", self._term, AnyOf)

    def _term(self) -> TagExpression:
        return self._joined("&", self._factor, AllOf)

    def _joined(self, sign: str, operand: Callable[[], TagExpression], cls: type[AllOf | AnyOf]) -> TagExpression:
        operands = [operand()]
        while self._part == sign:
            self._advance()
            operands.append(operand())
        return _canonical(cls, operands)

    def _factor(self) -> TagExpression:
        if self._part == "!":
            operand = self._deeper(self._factor)
            return operand.operand if isinstance(operand, Not) else Not(operand)
        if self._part == "(":
            found = self._deeper(self._expression)
            if self._part != ")":
                raise self._refused("have '&', '|' or ')'")
            self._advance()
            return found
        return self._tag()

    def _tag(self) -> Tag:
        part = self._part
        if not part or part in "&|!()":
            raise self._refused("have a tag, '!' or '('")
        if len(part) > _TAG_CHARS:
            raise self._refused(f"have a tag of at most {_TAG_CHARS} characters")
        self._num_tags += 1
        if self._num_tags > MAX_TAGS:
            raise self._refused(f"hold at most {MAX_TAGS} tags")
        self._advance()
        return Tag(part)

    def _deeper(self, rule: Callable[[], TagExpression]) -> TagExpression:
        """Take the present part, and what ``rule`` finds behind it, one step deeper."""
        if self._depth == MAX_DEPTH:
            raise self._refused(f"nest '!' and '(' at most {MAX_DEPTH} deep")
        self._depth += 1
        self._advance()
        found = rule()
        self._depth -= 1
        return found

    def _advance(self) -> None:
        """Step over the present part and the blanks behind it, to the next one; it is empty where none begins."""
        blank = _BLANK.match(self._text, self._place + len(self._part))
        assert blank is not None
        self._place = blank.end()
        part = _PART.match(self._text, self._place)
        self._part = part[0] if part else ""

    def _refused(self, rule: str) -> InvalidInputError:
        shown = self._part or self._text[self._place : self._place + 1]
        got = repr(shown[:_TAG_CHARS]) if shown else "its end"
        return InvalidInputError(
            f"{self._parameter} must {rule} at character {self._place + 1}, got {got}", parameter=self._parameter
        )


def _canonical(cls: type[AllOf | AnyOf], operands: list[TagExpression]) -> TagExpression:
    flat: dict[str, TagExpression] = {}
    for operand in operands:
        for one in operand.operands if isinstance(operand, cls) else (operand,):
            flat[str(one)] = one
    ordered = tuple(flat[text] for text in sorted(flat))
    return ordered[0] if len(ordered) == 1 else cls(ordered)


def _inside(operand: TagExpression) -> str:
    return f"({operand})" if isinstance(operand, AllOf | AnyOf) else str(operand)
