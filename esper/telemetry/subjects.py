"""Names on the bus: builds, parses and matches subjects ``esper.v1.<run>.<kind>[.<layer>]``.

A layer's dotted module name is one token on the wire. ``.`` becomes ``/`` (so ``block.0.conv`` reads ``block/0/conv``),
letters, digits, ``_`` and ``-`` stay, every other byte of the UTF-8 form becomes ``%XX``, and the empty name of a root
module becomes a lone ``%``. The encoding is one to one, and none of its characters means anything to NATS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from esper.contracts.errors import InvalidInputError

PREFIX: Final = "esper.v1"
"""First two tokens of every subject."""

MAX_SUBJECT_BYTES: Final = 512
"""Longest subject we build, in bytes; far below what a NATS control line holds."""

MAX_LAYER_TOKEN_BYTES: Final = 400
"""Longest encoded layer name, in bytes."""

RESERVED_RUNS: Final = frozenset({"jobs", "dead"})
"""Third tokens that are not runs."""

_RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ROOT_LAYER = "%"
_TOKEN = re.compile(r"[A-Za-z0-9_/%-]+")


class Kind(StrEnum):
    """What a message of a run speaks of; the fourth token of its subject."""

    HEALTH = "health"
    STATE = "state"
    DECISION = "decision"
    PLAN = "plan"
    KERNEL = "kernel"
    SEED = "seed"
    FIELD_REPORT = "field_report"
    ALERT = "alert"
    CONTROL = "control"
    FORECAST = "forecast"

    @property
    def durable(self) -> bool:
        """Whether a stream keeps messages of this kind; health and forecasts are fan-out where the newest matters."""
        return self not in (Kind.HEALTH, Kind.FORECAST)

    @property
    def express(self) -> bool:
        """Whether messages of this kind keep no order with those of others, and wait behind none of them.

        Somebody waits for a control answer, and it needs nothing before it but its own command, which it follows by
        nature. States, decisions, plans, seed events and reports are read as one history and stay in one order.
        """
        return self is Kind.CONTROL


@dataclass(frozen=True, slots=True)
class Subject:
    """A parsed subject of a run."""

    run_id: str
    """Run it belongs to."""
    kind: Kind
    """What it speaks of."""
    layer: str | None = None
    """Dotted module name, or ``None`` when it speaks of the whole run."""

    def __str__(self) -> str:
        return build_subject(self.run_id, self.kind, self.layer)


def encode_layer(layer: str) -> str:
    """Give the one subject token that stands for a dotted module name.

    Raises:
        InvalidInputError: The token would be longer than ``MAX_LAYER_TOKEN_BYTES``.
    """
    if not layer:
        return _ROOT_LAYER
    try:
        parts = [quote(part, safe="").replace("~", "%7E") for part in layer.split(".")]
    except UnicodeEncodeError as error:
        raise InvalidInputError.of("layer", "be text that UTF-8 can carry", layer) from error
    token = "/".join(parts)
    if len(token) > MAX_LAYER_TOKEN_BYTES:
        rule = f"take at most {MAX_LAYER_TOKEN_BYTES} bytes once encoded ({len(token)} here)"
        raise InvalidInputError.of("layer", rule, layer)
    return token


def decode_layer(token: str) -> str:
    """Give the dotted module name that ``encode_layer`` turned into this token.

    Raises:
        InvalidInputError: No name encodes to this token.
    """
    if token == _ROOT_LAYER:
        return ""
    try:
        layer = ".".join(unquote_to_bytes(part).decode("utf-8") for part in token.split("/"))
        canonical = encode_layer(layer) == token
    except (UnicodeError, InvalidInputError):
        canonical = False
        layer = ""
    if not canonical:
        raise InvalidInputError.of("layer token", "be a layer name in its one encoded form", token)
    return layer


def check_run_id(run_id: str) -> str:
    """Give the run id back if it is legal as a subject token.

    Raises:
        InvalidInputError: It does not match ``[a-z0-9][a-z0-9-]{0,63}`` or is reserved.
    """
    if not _RUN.fullmatch(run_id):
        raise InvalidInputError.of("run_id", "match [a-z0-9][a-z0-9-]{0,63}", run_id)
    if run_id in RESERVED_RUNS:
        raise InvalidInputError.of("run_id", f"not be one of {', '.join(sorted(RESERVED_RUNS))}", run_id)
    return run_id


def check_name(parameter: str, name: str) -> str:
    """Give a stream, consumer or lane name back if it is legal as one token.

    Raises:
        InvalidInputError: It does not match ``[A-Za-z0-9_-]{1,64}``.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInputError.of(parameter, "match [A-Za-z0-9_-]{1,64}", name)
    return name


def build_subject(run_id: str, kind: Kind | str, layer: str | None = None) -> str:
    """Give the subject of one run's messages of one kind, about one layer or the whole run.

    Raises:
        InvalidInputError: A part is illegal or too long.
    """
    check_run_id(run_id)
    try:
        kind = Kind(kind)
    except ValueError as error:
        raise InvalidInputError.of("kind", f"be one of {', '.join(Kind)}", kind) from error
    base = f"{PREFIX}.{run_id}.{kind.value}"
    return base if layer is None else f"{base}.{encode_layer(layer)}"


def parse_subject(subject: str) -> Subject:
    """Give the parts of a run's subject; the inverse of ``build_subject``.

    Raises:
        InvalidInputError: It is not a subject that ``build_subject`` gives.
    """
    tokens = subject.split(".")
    if len(tokens) not in (4, 5) or ".".join(tokens[:2]) != PREFIX:
        raise InvalidInputError.of("subject", f"read {PREFIX}.<run>.<kind>[.<layer>]", subject)
    run_id = check_run_id(tokens[2])
    if tokens[3] not in list(Kind):
        raise InvalidInputError.of("kind", f"be one of {', '.join(Kind)}", tokens[3])
    layer = decode_layer(tokens[4]) if len(tokens) == 5 else None
    return Subject(run_id, Kind(tokens[3]), layer)


def run_pattern(run_id: str | None = None) -> str:
    """Give the pattern of everything a run says; ``None`` stands for every run."""
    return f"{PREFIX}.{_run_token(run_id)}.>"


def kind_patterns(kind: Kind | str, run_id: str | None = None) -> tuple[str, str]:
    """Give the two patterns that together take every message of a kind: without and with a layer."""
    bare = f"{PREFIX}.{_run_token(run_id)}.{Kind(kind).value}"
    return bare, f"{bare}.>"


def compile_job_subject(lane: str) -> str:
    """Give the work-queue subject of compile jobs in one lane.

    Raises:
        InvalidInputError: ``lane`` is not one legal token.
    """
    return f"{PREFIX}.jobs.compile.{check_name('lane', lane)}"


def dead_subject(stream: str) -> str:
    """Give the subject where messages of a stream go that nobody could process."""
    return f"{PREFIX}.dead.{check_name('stream', stream)}"


def check_subject(subject: str) -> str:
    """Give a subject back if a message may be published to it.

    Raises:
        InvalidInputError: It is empty, too long, has a wildcard or a character outside the encoding.
    """
    _check_length("subject", subject)
    if not all(_TOKEN.fullmatch(token) for token in subject.split(".")):
        raise InvalidInputError.of("subject", "be tokens of [A-Za-z0-9_/%-] joined by dots", subject)
    return subject


def check_pattern(pattern: str) -> str:
    """Give a pattern back if it is legal: ``*`` stands for one token, a last ``>`` for one or more.

    Raises:
        InvalidInputError: It is empty, too long, or misplaces a wildcard.
    """
    _check_length("subject pattern", pattern)
    tokens = pattern.split(".")
    for place, part in enumerate(tokens):
        legal = part == "*" or (part == ">" and place == len(tokens) - 1) or _TOKEN.fullmatch(part)
        if not legal:
            raise InvalidInputError.of("subject pattern", "be tokens joined by dots, * or a last >", pattern)
    return pattern


def matches(pattern: str, subject: str) -> bool:
    """Say whether a subject falls under a pattern."""
    wanted, given = pattern.split("."), subject.split(".")
    for place, part in enumerate(wanted):
        if part == ">":
            return len(given) > place
        if place >= len(given) or part not in ("*", given[place]):
            return False
    return len(wanted) == len(given)


def overlaps(first: str, second: str) -> bool:
    """Say whether some subject falls under both patterns."""
    left, right = first.split("."), second.split(".")
    for one, other in zip(left, right, strict=False):
        if ">" in (one, other):
            return True
        if "*" not in (one, other) and one != other:
            return False
    longer = left if len(left) > len(right) else right
    shorter = min(len(left), len(right))
    return len(left) == len(right) or (len(longer) == shorter and longer[-1] == ">")


def _run_token(run_id: str | None) -> str:
    return "*" if run_id is None else check_run_id(run_id)


def _check_length(parameter: str, text: str) -> None:
    if not text or len(text) > MAX_SUBJECT_BYTES:
        raise InvalidInputError.of(parameter, f"be 1 to {MAX_SUBJECT_BYTES} characters", text)
