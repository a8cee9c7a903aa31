"""The error tree is complete, drawn as it is, and every message can be read."""

from __future__ import annotations

import re

import pytest

from esper.contracts import errors
from esper.contracts.errors import EsperError, InvalidInputError, ShapeMismatchError, all_error_types


@pytest.mark.parametrize("cls", all_error_types())
def test_every_class_can_be_raised_with_message_and_parameter(cls: type[EsperError]) -> None:
    error = cls("alpha must lie in [0, 1], got 2", parameter="alpha")
    assert (str(error), error.parameter) == ("alpha must lie in [0, 1], got 2", "alpha")


def test_reasons_are_unique_and_stable_in_form() -> None:
    reasons = [cls.reason for cls in all_error_types()]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[A-Z][A-Z_]+", reason) for reason in reasons)


def test_every_class_is_drawn_in_the_tree() -> None:
    drawing = errors.__doc__ or ""
    assert [cls.__name__ for cls in all_error_types() if cls.__name__ not in drawing] == []


def test_of_names_parameter_rule_and_value_and_keeps_the_class() -> None:
    error = ShapeMismatchError.of("weight", "have shape (3, 4)", (3, 5))
    assert isinstance(error, ShapeMismatchError)
    assert str(error) == "weight must have shape (3, 4), got (3, 5)"


def test_of_cuts_a_long_value() -> None:
    assert len(str(InvalidInputError.of("name", "be short", "x" * 10_000))) < 250


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.InvalidInputError, ValueError),
        (errors.NotFoundError, LookupError),
        (errors.UnavailableError, ConnectionError),
        (errors.DeadlineExceededError, TimeoutError),
        (errors.StorageFullError, OSError),
        (errors.PermissionDeniedError, PermissionError),
    ],
)
def test_a_caller_can_catch_the_builtin_it_would_guess(cls: type[EsperError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="reason"):
        raise cls("reason")
