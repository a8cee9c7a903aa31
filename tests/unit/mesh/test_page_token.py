"""Page tokens: they come back unchanged or not at all."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.errors import InvalidInputError
from esper.mesh import decode_page_token, encode_page_token

COLUMNS = st.one_of(st.none(), st.text(max_size=40), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
REFUSED = "page_token must be empty or one this listing gave for the same filters, unchanged, got"


@given(st.lists(COLUMNS, max_size=4).map(tuple), st.text(max_size=30), st.binary(max_size=64))
def test_round_trip(position: tuple[Any, ...], scope: str, key: bytes) -> None:
    if any(
        "\ud800" <= character <= "\udfff" for text in (*position, scope) if isinstance(text, str) for character in text
    ):
        return
    token = encode_page_token(position, scope=scope, key=key)
    back = decode_page_token(token, scope=scope, arity=len(position), key=key)
    assert back == position
    assert [type(column) for column in back or ()] == [type(column) for column in position]


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_any_changed_byte_is_noticed(where: int, change: int) -> None:
    token = encode_page_token(("kernel_7", 12.5), scope="list")
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    raw[where % len(raw)] ^= change
    with pytest.raises(InvalidInputError, match=REFUSED):
        decode_page_token(base64.urlsafe_b64encode(bytes(raw)).decode().rstrip("="), scope="list", arity=2)


def test_empty_token_asks_for_the_first_page() -> None:
    assert decode_page_token("", scope="list", arity=2) is None


@pytest.mark.parametrize("token", ["!!!", "AAAA", "a" * 5000, "é", "AQ", " "])
def test_strange_tokens_are_refused(token: str) -> None:
    with pytest.raises(InvalidInputError, match=REFUSED) as caught:
        decode_page_token(token, scope="list", arity=1)
    assert caught.value.parameter == "page_token"


def test_token_of_another_listing_is_refused() -> None:
    token = encode_page_token(("a",), scope="Search|tags=conv2d")
    with pytest.raises(InvalidInputError, match=REFUSED):
        decode_page_token(token, scope="Search|tags=linear", arity=1)


def test_token_with_another_number_of_columns_is_refused() -> None:
    token = encode_page_token(("a", 1), scope="list")
    with pytest.raises(InvalidInputError, match=REFUSED):
        decode_page_token(token, scope="list", arity=1)


def test_signed_token_needs_the_key() -> None:
    token = encode_page_token(("a",), scope="list", key=b"secret")
    with pytest.raises(InvalidInputError, match=REFUSED):
        decode_page_token(token, scope="list", arity=1)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ((True,), "position must hold text, numbers and None only, got True"),
        ((b"x",), "position must hold text, numbers and None only"),
        ((float("nan"),), "position must hold finite numbers only, got nan"),
        (("x" * 3000,), "position must make a token of at most 2048 characters"),
    ],
)
def test_positions_that_cannot_be_tokens(position: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        encode_page_token(position, scope="list")
