"""Keys of kernels: Ed25519 signing keys that make signatures, and rings of public keys that are trusted.

private key   PKCS#8 PEM in a file that only its owner can read, or in an environment variable
public keys   ``*.pub`` files (SubjectPublicKeyInfo PEM) in a directory, or JSON ``{"keys": ["<base64 of 32 bytes>"]}``
key id        first 16 hex digits of SHA-256 of the raw public key
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from esper.contracts.errors import ConfigError, EsperError, NotFoundError, SignatureError, UnavailableError
from esper.execution.durable_file import link_new, replace_file

PRIVATE_FILE: Final = "kernel-signing.pem"
"""Name of the private key in a state directory."""
PUBLIC_SUFFIX: Final = ".pub"
"""Suffix of public keys in a directory of trusted keys."""

_MAX_FILE_BYTES: Final = 64 * 1024
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def key_id_of(public_bytes: bytes) -> str:
    """Give the id of a raw 32-byte public key."""
    return hashlib.sha256(public_bytes).hexdigest()[:16]


class SigningKey:
    """A private Ed25519 key; thread-safe."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_bytes: bytes = private.public_key().public_bytes_raw()
        self.key_id: str = key_id_of(self.public_bytes)

    def __repr__(self) -> str:
        return f"SigningKey(key_id={self.key_id!r})"

    @classmethod
    def generate(cls) -> Self:
        """Make a new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes | str) -> Self:
        """Read a key from unencrypted PKCS#8 PEM, e.g. the value of an environment variable.

        Raises:
            ConfigError: It is no Ed25519 private key in PEM.
        """
        data = pem.encode() if isinstance(pem, str) else pem
        try:
            private = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            rule = "be an unencrypted Ed25519 key in PKCS#8 PEM"
            raise ConfigError(f"signing key must {rule}, got data that is none") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"signing key must be Ed25519, got {type(private).__name__}")
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a key from a PEM file.

        Raises:
            NotFoundError: There is no such file.
            ConfigError: Group or others may touch the file, or it is no key.
            UnavailableError: The file cannot be read.
        """
        try:
            mode = path.stat().st_mode
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"signing key must be at {path}, got no file there", parameter="path") from error
        except OSError as error:
            raise UnavailableError(f"signing key {path} cannot be read: {error.strerror}") from error
        if mode & _OTHERS:
            raise ConfigError(f"signing key {path} must have mode 0600, got {stat.S_IMODE(mode):04o}", parameter="path")
        return cls.from_pem(data)

    @classmethod
    def load_or_create(cls, state_dir: Path) -> Self:
        """Read the key of a state directory; make it, and its public half beside it, on the first start.

        Processes that start at once agree on one key.

        Raises:
            ConfigError: The file is no key, or group or others may touch it.
            UnavailableError: The directory cannot be written.
        """
        path = state_dir / PRIVATE_FILE
        try:
            return cls.load(path)
        except NotFoundError:
            pass
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            link_new(path, cls.generate().private_pem(), mode=0o600)
            made = cls.load(path)
            made.write_public(state_dir)
        except OSError as error:
            if isinstance(error, EsperError):
                raise
            raise UnavailableError(f"state directory {state_dir} cannot be written: {error}") from error
        return made

    def sign(self, data: bytes) -> bytes:
        """Give the 64-byte signature over ``data``."""
        return self._private.sign(data)

    def private_pem(self) -> bytes:
        """Give the private key as unencrypted PKCS#8 PEM; keep it out of logs."""
        return self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def public_pem(self) -> bytes:
        """Give the public key as PEM, the content of a ``.pub`` file."""
        return self._private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def write_public(self, directory: Path) -> Path:
        """Write the public half to ``<key id>.pub`` in a directory and give its path."""
        path = directory / f"{self.key_id}{PUBLIC_SUFFIX}"
        replace_file(path, self.public_pem(), mode=0o644)
        return path

    def ring(self) -> KeyRing:
        """Give a ring that trusts this key alone."""
        return KeyRing([self.public_bytes])


class KeyRing:
    """Public keys that are trusted; immutable, thread-safe."""

    def __init__(self, public_keys: Iterable[bytes] = ()) -> None:
        """Trust these raw 32-byte public keys.

        Raises:
            ConfigError: One is no Ed25519 public key.
        """
        self._keys: dict[str, Ed25519PublicKey] = {}
        for raw in public_keys:
            try:
                self._keys[key_id_of(raw)] = Ed25519PublicKey.from_public_bytes(raw)
            except ValueError as error:
                raise ConfigError(f"public key must be 32 bytes, got {len(raw)} bytes") from error

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Ids of the trusted keys, sorted."""
        return tuple(sorted(self._keys))

    @classmethod
    def from_dir(cls, directory: Path) -> Self:
        """Trust every ``*.pub`` file of a directory.

        Raises:
            NotFoundError: There is no such directory.
            ConfigError: A file is no Ed25519 public key, or there is none at all.
        """
        if not directory.is_dir():
            raise NotFoundError(f"trusted keys must be in directory {directory}, got no directory there")
        keys = [_read_public(path) for path in sorted(directory.glob(f"*{PUBLIC_SUFFIX}"))]
        if not keys:
            raise ConfigError(f"{directory} must hold at least one *{PUBLIC_SUFFIX} file, got none")
        return cls(keys)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Trust the keys of ``{"keys": ["<base64 of 32 bytes>", …]}``.

        Raises:
            ConfigError: The text has another form.
        """
        rule = 'be JSON {"keys": ["<base64 of 32 bytes>", ...]}'
        try:
            entries = json.loads(text)["keys"]
            if not isinstance(entries, list) or not entries:
                raise ConfigError(f"trusted keys must {rule}, got no list of keys")
            return cls([base64.b64decode(entry, validate=True) for entry in entries])
        except (KeyError, TypeError, binascii.Error, json.JSONDecodeError) as error:
            raise ConfigError(f"trusted keys must {rule}, got text of {len(text)} characters that is not") from error

    def to_json(self) -> str:
        """Give the ring in the form that ``from_json`` reads."""
        raw = (self._keys[key_id].public_bytes_raw() for key_id in self.key_ids)
        return json.dumps({"keys": [base64.b64encode(key).decode() for key in raw]})

    def merged(self, other: KeyRing) -> KeyRing:
        """Give a ring that trusts the keys of both."""
        found = [*self._keys.values(), *other._keys.values()]
        return KeyRing(key.public_bytes_raw() for key in found)

    def verify(self, key_id: str, signature: bytes, data: bytes) -> None:
        """Return when the signature over ``data`` was made by the trusted key of this id.

        Raises:
            SignatureError: The key is unknown, or the signature is absent or false.
        """
        key = self._keys.get(key_id)
        if key is None:
            trusted = ", ".join(self.key_ids) or "none"
            raise SignatureError(f"signing key must be a trusted one ({trusted}), got {key_id[:64]!r}")
        try:
            key.verify(signature, data)
        except InvalidSignature as error:
            raise SignatureError(f"signature must be one of key {key_id} over these bytes, got a false one") from error


def _read_public(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"public key {path} must be at most {_MAX_FILE_BYTES} bytes")
        key = serialization.load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"public key {path} must be Ed25519 in PEM, got data that is none") from error
    except OSError as error:
        raise UnavailableError(f"public key {path} cannot be read: {error.strerror}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"public key {path} must be Ed25519, got {type(key).__name__}")
    return key.public_bytes_raw()
