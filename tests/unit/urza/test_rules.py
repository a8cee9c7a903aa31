"""Drafts, queries and pages: what the library takes and how it says no."""

from __future__ import annotations

from typing import Any

import pytest

from esper.contracts.blueprint import BlueprintMetadata, BlueprintState, Lineage, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.tag_expression import parse_tags
from esper.services.urza.rules import (
    MAX_PAGE_BYTES,
    BlueprintDraft,
    BlueprintQuery,
    PageRequest,
    fitting,
    require_artifact_id,
    require_text,
)
from esper.testing.urza_samples import graph


def draft(**changes: Any) -> BlueprintDraft:
    fields: dict[str, Any] = {"name": "scale", "ir": graph(1)}
    return BlueprintDraft(**(fields | changes))


@pytest.mark.parametrize("name", ["a", "a_b-c.d", "0", "x" * 128])
def test_good_names_are_taken(name: str) -> None:
    assert draft(name=name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name must be 1 to 128 characters long"),
        ("x" * 129, "name must be 1 to 128 characters long"),
        ("Upper", r"name must match \[a-z0-9\]"),
        ("../etc", r"name must match \[a-z0-9\]"),
        ("a b", r"name must match \[a-z0-9\]"),
        ("a@1", r"name must match \[a-z0-9\]"),
        ("a\n", r"name must match \[a-z0-9\]"),
        ("0" * 64, "name must not look like a content id"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draft(name=name)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["ok", "Bad"], r"metadata.tags\[1\] must match"),
        (["x" * 65], r"metadata.tags\[0\] must be 1 to 64 characters long"),
        ([""], r"metadata.tags\[0\] must be 1 to 64 characters long"),
        (["a", "b", "a"], r"metadata.tags must name every tag once, got \['a'\]"),
        ([f"t{number}" for number in range(33)], "metadata.tags must hold at most 32 tags, got 33"),
    ],
)
def test_bad_tags_are_refused(tags: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draft(metadata=BlueprintMetadata(tags=tags))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (BlueprintMetadata(description="x" * 2_001), "metadata.description must be at most 2000 characters, got 2001"),
        (BlueprintMetadata(citation="x" * 501), "metadata.citation must be at most 500 characters, got 501"),
        (BlueprintMetadata(description="a\x00b"), "metadata.description must hold no control characters"),
        (BlueprintMetadata(description="\ud800"), "metadata.description must hold no control characters"),
        (BlueprintMetadata(site_kinds=(SiteKind.LINEAR,) * 2), "metadata.site_kinds must name every kind once"),
    ],
)
def test_bad_metadata_is_refused(metadata: BlueprintMetadata, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draft(metadata=metadata)


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        (Lineage(operator="magic"), "lineage.operator must be one of template, mutation, crossover"),
        (Lineage(author="x" * 129), "lineage.author must be at most 128 characters"),
        (Lineage(parent_ids=("abc",)), r"lineage.parent_ids\[0\] must be 64 lower-case hex digits, got 'abc'"),
        (Lineage(parent_ids=("0" * 64,) * 2), "lineage.parent_ids must name every parent once"),
        (Lineage(parent_ids=tuple(f"{n:064x}" for n in range(17))), "lineage.parent_ids must be at most 16, got 17"),
    ],
)
def test_bad_lineage_is_refused(lineage: Lineage, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        draft(lineage=lineage)


@pytest.mark.parametrize("state", [BlueprintState.DEPRECATED, BlueprintState.RETIRED])
def test_nothing_is_born_old(state: BlueprintState) -> None:
    with pytest.raises(InvalidInputError, match=f"state must be one of DRAFT, VALIDATED, ACTIVE .*got '{state.name}'"):
        draft(state=state)


@pytest.mark.parametrize("field", ["all_tags", "any_tags", "no_tags"])
def test_a_query_s_tags_are_checked(field: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"{field}\[0\] must match"):
        BlueprintQuery(**{field: ("no good",)})  # type: ignore[arg-type]


def test_a_query_s_text_is_bounded() -> None:
    with pytest.raises(InvalidInputError, match="text must be at most 128 characters, got 129"):
        BlueprintQuery(text="x" * 129)


def test_equal_conditions_share_page_tokens_and_others_do_not() -> None:
    query = BlueprintQuery(all_tags=("a", "b"), text="X")
    assert query.scope == BlueprintQuery(all_tags=("b", "a"), text="x").scope
    others = (BlueprintQuery(any_tags=("a", "b"), text="X"), BlueprintQuery(all_tags=("a",), text="X"))
    assert len({query.scope, *(other.scope for other in others)}) == 3


def test_page_sizes_are_bounded() -> None:
    assert (PageRequest().limit, PageRequest(size=500).limit) == (50, 500)
    for size in (-1, 501):
        with pytest.raises(InvalidInputError, match=rf"page_size must be 1 to 500, or 0 for the default, got {size}"):
            PageRequest(size=size)


def test_a_page_ends_where_a_message_is_full() -> None:
    assert fitting([]) == 0
    assert fitting([10, 10, 10]) == 3
    assert fitting([MAX_PAGE_BYTES // 2] * 3) == 1
    assert fitting([MAX_PAGE_BYTES * 2, 1]) == 1


@pytest.mark.parametrize(
    "value", ["", "k", "K" + "0" * 32, "k" + "g" * 32, "k" + "0" * 33, "../k", "k" + "0" * 32 + "\n"]
)
def test_an_artifact_id_can_never_be_a_path(value: str) -> None:
    with pytest.raises(InvalidInputError, match="artifact_id must be 'k' and 32 lower-case hex digits"):
        require_artifact_id("artifact_id", value)


def test_text_may_have_lines() -> None:
    assert require_text("reason", "one\n\ttwo", max_chars=20) == "one\n\ttwo"


def test_queries_that_mean_the_same_share_page_tokens_and_others_do_not() -> None:
    def scope(text: str) -> str:
        return BlueprintQuery(tags=parse_tags(text)).scope

    assert scope("a & (b | c)") == scope("( c|b )&a") == scope("!!a & (b | c) & a")
    assert len({scope(text) for text in ("a & b", "a | b", "!(a & b)", "a", "", "a & !b")}) == 6
