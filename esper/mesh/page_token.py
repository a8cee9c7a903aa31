"""Keyset page tokens: the place where the next page starts, opaque to callers and safe to take back.

A token names the sort key of the last row given. It is bound to one query by ``scope`` (the method with its filters),
so that a token of one listing cannot be used with another, and carries a BLAKE2 checksum. With a secret ``key`` the
checksum is a signature; without one it finds accidents, and a forged token can do no more than start a page elsewhere.

Layout, before base64url: version (1 byte), checksum (12 bytes), UTF-8 canonical JSON array of the key's columns.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
from typing import Final

from esper.contracts.errors import InvalidInputError

PageKey = tuple[str | int | float | None, ...]
"""The sort columns of the last row of a page."""

_VERSION: Final = b"\x01"
_CHECKSUM_BYTES: Final = 12
_MAX_TOKEN_LENGTH: Final = 2048


def encode_page_token(position: PageKey, *, scope: str, key: bytes = b"") -> str:
    """Give the token for the page that starts after ``position``.

    Args:
        position: Sort columns of the last row given; finite numbers, text or ``None``.
        scope: What the listing is, e.g. ``"SearchBlueprints|tags=conv2d"``; decoding needs the same.
        key: Secret of the service, at most 64 bytes; empty for a plain checksum.

    Raises:
        InvalidInputError: a column is of another type or not finite, or the columns are too long for a token.
    """
    for column in position:
        if isinstance(column, bool) or not (column is None or isinstance(column, str | int | float)):
            raise InvalidInputError.of("position", "hold text, numbers and None only", column)
        if isinstance(column, float) and not math.isfinite(column):
            raise InvalidInputError.of("position", "hold finite numbers only", column)
    body = json.dumps(list(position), ensure_ascii=False, separators=(",", ":")).encode()
    token = base64.urlsafe_b64encode(_VERSION + _checksum(body, scope, key) + body).decode().rstrip("=")
    if len(token) > _MAX_TOKEN_LENGTH:
        raise InvalidInputError(
            f"position must make a token of at most {_MAX_TOKEN_LENGTH} characters, got {len(token)} characters",
            parameter="position",
        )
    return token


def decode_page_token(token: str, *, scope: str, arity: int, key: bytes = b"") -> PageKey | None:
    """Give the position a token names, or ``None`` for the empty token, which asks for the first page.

    Raises:
        InvalidInputError: the token was changed, belongs to another listing, or is none of ours.
    """
    if not token:
        return None
    if len(token) > _MAX_TOKEN_LENGTH:
        raise _refused(f"{len(token)} characters")
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(token) from error
    version, checksum, body = raw[:1], raw[1 : 1 + _CHECKSUM_BYTES], raw[1 + _CHECKSUM_BYTES :]
    if version != _VERSION or not hmac.compare_digest(checksum, _checksum(body, scope, key)):
        raise _refused(token)
    return _position(body, arity, token)


def _position(body: bytes, arity: int, token: str) -> PageKey:
    try:
        columns = json.loads(body)
    except ValueError as error:
        raise _refused(token) from error
    plain = isinstance(columns, list) and all(column is None or type(column) in (str, int, float) for column in columns)
    if not plain or len(columns) != arity:
        raise _refused(token)
    return tuple(columns)


def _checksum(body: bytes, scope: str, key: bytes) -> bytes:
    digest = hashlib.blake2b(key=key, digest_size=_CHECKSUM_BYTES)
    encoded_scope = scope.encode()
    digest.update(len(encoded_scope).to_bytes(4, "big") + encoded_scope + body)
    return digest.digest()


def _refused(received: object) -> InvalidInputError:
    return InvalidInputError.of(
        "page_token", "be empty or one this listing gave for the same filters, unchanged", received
    )
