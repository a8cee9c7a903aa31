"""Tag expressions as text: what they mean, that one meaning has one text, and how a mistake is named."""

from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.contracts.tag_expression import MAX_CHARS, covers, holds, named, parse_tags


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("validated & conv2d & !deprecated", "!deprecated & conv2d & validated"),
        ("a | b & c", "a | (b & c)"),
        ("(a | b) & c", "(a | b) & c"),
        ("!a & b", "!a & b"),
        ("!(a & b)", "!(a & b)"),
        ("!!a", "a"),
        ("!(!(a | b))", "a | b"),
        ("a & (b & (c & a))", "a & b & c"),
        ("(a | b) | (b | a)", "a | b"),
        ("((a))", "a"),
        ("a\t&\n b", "a & b"),
        ("t-1.x_y|0", "0 | t-1.x_y"),
    ],
)
def test_one_meaning_has_one_text(text: str, canonical: str) -> None:
    expression = parse_tags(text)
    assert str(expression) == canonical
    assert parse_tags(canonical) == expression


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_a_blank_expression_is_none(text: str) -> None:
    assert parse_tags(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&", r"tag_expression must have a tag, '!' or '\(' at character 1, got '&'"),
        ("a & ", r"must have a tag, '!' or '\(' at character 5, got its end"),
        ("a b", "must have '&', '|' or its end at character 3, got 'b'"),
        ("(a | b", "must have '&', '|' or '\\)' at character 7, got its end"),
        ("a | (b))", "must have '&', '|' or its end at character 8, got '\\)'"),
        ("a & Upper", r"must have a tag, '!' or '\(' at character 5, got 'U'"),
        ("a = b", "must have '&', '|' or its end at character 3, got '='"),
        ("a && b", r"must have a tag, '!' or '\(' at character 4, got '&'"),
        ("not a", "must have '&', '|' or its end at character 5, got 'a'"),
        ("a & é", r"must have a tag, '!' or '\(' at character 5, got 'é'"),
        ("a & ²", r"must have a tag, '!' or '\(' at character 5, got '²'"),
        ("!", r"must have a tag, '!' or '\(' at character 2, got its end"),
        ("()", r"must have a tag, '!' or '\(' at character 2, got '\)'"),
        ("-a", r"must have a tag, '!' or '\(' at character 1, got '-'"),
        ("a & " + "b" * 65, "must have a tag of at most 64 characters at character 5"),
        ("!" * 17 + "a", r"must nest '!' and '\(' at most 16 deep at character 17, got '!'"),
        ("(" * 17 + "a" + ")" * 17, r"must nest '!' and '\(' at most 16 deep at character 17, got '\('"),
        ("|".join(f"t{number}" for number in range(33)), "must hold at most 32 tags at character 119, got 't32'"),
        ("a" * (MAX_CHARS + 1), "tag_expression must be at most 1024 characters, got 1025"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        parse_tags(text)
    assert caught.value.parameter == "tag_expression"


def test_an_expression_at_its_bounds_is_taken() -> None:
    assert parse_tags("!" * 16 + "a") == parse_tags("a")
    assert parse_tags("&".join(f"t{number}" for number in range(32))) is not None
    assert parse_tags("a" + " " * (MAX_CHARS - 1)) == parse_tags("a")


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("a & b", [{"a"}, {"b"}]),
        ("a | b", [{"a", "b"}]),
        ("a & (b | c) & !d", [{"a"}, {"b", "c"}]),
        ("(a & b) | c", [{"a", "c"}]),
        ("a | !b", []),
        ("!a", []),
    ],
)
def test_an_expression_tells_which_tags_it_cannot_do_without(text: str, needed: list[set[str]]) -> None:
    expression = parse_tags(text)
    assert expression is not None
    assert list(covers(expression)) == needed


@pytest.mark.parametrize(
    ("text", "holding", "failing"),
    [
        ("", [set(), {"a"}], []),
        ("a", [{"a"}, {"a", "b"}], [set(), {"b"}]),
        ("!a", [set(), {"b"}], [{"a"}, {"a", "b"}]),
        ("a & !b", [{"a"}, {"a", "c"}], [set(), {"b"}, {"a", "b"}]),
        ("a | b & c", [{"a"}, {"b", "c"}], [{"b"}, {"c"}]),
        ("!(a | b)", [set(), {"c"}], [{"a"}, {"b"}]),
    ],
)
def test_an_expression_holds_for_sets_of_tags(text: str, holding: list[set[str]], failing: list[set[str]]) -> None:
    expression = parse_tags(text)
    assert all(holds(expression, tags) for tags in holding)
    assert not any(holds(expression, tags) for tags in failing)


def test_an_expression_names_its_tags() -> None:
    assert named(parse_tags("a & !(b | !c) & a")) == {"a", "b", "c"}
    assert named(None) == frozenset()
