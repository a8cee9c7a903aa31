from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.errors import InvalidInputError
from esper.telemetry.subjects import (
    MAX_LAYER_TOKEN_BYTES,
    Kind,
    Subject,
    build_subject,
    check_pattern,
    check_subject,
    compile_job_subject,
    decode_layer,
    encode_layer,
    kind_patterns,
    matches,
    overlaps,
    parse_subject,
    run_pattern,
)

layers = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
tokens = st.sampled_from(["a", "b", "c"])
subjects = st.lists(tokens, min_size=1, max_size=4).map(".".join)
patterns = st.tuples(st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3), st.booleans()).map(
    lambda parts: ".".join(parts[0] + ([">"] if parts[1] else []))
)


@given(layers)
def test_a_layer_name_comes_back_from_its_token(layer: str) -> None:
    token = encode_layer(layer)
    assert check_subject(f"esper.v1.run.seed.{token}")
    assert decode_layer(token) == layer


@given(layers, layers)
def test_two_names_never_share_a_token(first: str, second: str) -> None:
    assert (encode_layer(first) == encode_layer(second)) == (first == second)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="layer must be text that UTF-8 can carry"):
        encode_layer("a\ud800")


@pytest.mark.parametrize(
    ("layer", "token"),
    [("block.0.conv", "block/0/conv"), ("", "%"), ("a/b", "a%2Fb"), ("ä", "%C3%A4"), ("100%", "100%25"), (".", "/")],
)
def test_the_encoding_is_the_documented_one(layer: str, token: str) -> None:
    assert encode_layer(layer) == token


def test_an_over_long_layer_is_refused() -> None:
    assert encode_layer("a" * MAX_LAYER_TOKEN_BYTES)
    with pytest.raises(InvalidInputError, match=r"layer must take at most 400 bytes once encoded \(401 here\)"):
        encode_layer("a" * (MAX_LAYER_TOKEN_BYTES + 1))


@pytest.mark.parametrize("token", ["a.b", "%2E", "%c3%a4", "%ZZ", "%FF", "a%41", "a b"])
def test_a_token_that_no_name_encodes_to_is_refused(token: str) -> None:
    with pytest.raises(InvalidInputError, match="layer token must be a layer name in its one encoded form"):
        decode_layer(token)


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True), st.sampled_from(list(Kind)), st.none() | layers)
def test_a_subject_is_parsed_into_what_it_was_built_from(run_id: str, kind: Kind, layer: str | None) -> None:
    if run_id in {"jobs", "dead"}:
        return
    subject = build_subject(run_id, kind, layer)
    parsed = parse_subject(subject)
    assert parsed == Subject(run_id, kind, layer)
    assert str(parsed) == subject


@pytest.mark.parametrize("run_id", ["", "Run", "a.b", "a b", "-a", "a" * 65, "run\n"])
def test_an_illegal_run_is_refused(run_id: str) -> None:
    with pytest.raises(InvalidInputError, match=r"run_id must match \[a-z0-9\]\[a-z0-9-\]\{0,63\}, got"):
        build_subject(run_id, Kind.STATE)


@pytest.mark.parametrize("run_id", ["jobs", "dead"])
def test_a_reserved_run_is_refused(run_id: str) -> None:
    with pytest.raises(InvalidInputError, match="run_id must not be one of dead, jobs"):
        build_subject(run_id, Kind.STATE)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"kind must be one of health, .*, got 'gossip'"):
        build_subject("run", "gossip")


@pytest.mark.parametrize("subject", ["esper.v2.run.seed", "esper.v1.run", "esper.v1.run.seed.a.b", ""])
def test_a_foreign_subject_is_not_parsed(subject: str) -> None:
    with pytest.raises(InvalidInputError, match=r"subject must read esper\.v1\.<run>\.<kind>\[\.<layer>\]"):
        parse_subject(subject)


@pytest.mark.parametrize("pattern", ["", ">.a", "a.>.b", "a*", "a..b", "a b"])
def test_an_illegal_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidInputError, match="subject pattern must be"):
        check_pattern(pattern)


def test_only_health_and_forecasts_are_not_durable() -> None:
    assert [kind for kind in Kind if not kind.durable] == [Kind.HEALTH, Kind.FORECAST]


def test_patterns_take_what_they_say() -> None:
    bare, with_layer = kind_patterns(Kind.SEED, "run-1")
    assert matches(bare, build_subject("run-1", "seed"))
    assert matches(with_layer, build_subject("run-1", "seed", "a.b"))
    assert not matches(with_layer, build_subject("run-2", "seed", "a.b"))
    assert matches(run_pattern(), build_subject("run-2", "alert"))
    assert compile_job_subject("cuda") == "esper.v1.jobs.compile.cuda"


@given(patterns, patterns, subjects)
def test_patterns_that_take_one_subject_overlap(first: str, second: str, subject: str) -> None:
    if matches(first, subject) and matches(second, subject):
        assert overlaps(first, second)
        assert overlaps(second, first)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a.*", "a.b.>", False),
        ("a.>", "a", False),
        ("a.*.c", "a.b.*", True),
        ("a.>", "*.b.c", True),
        ("a", "a.b", False),
    ],
)
def test_overlap_by_example(first: str, second: str, expected: bool) -> None:
    assert overlaps(first, second) is expected
