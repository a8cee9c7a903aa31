"""Signing keys and rings: made once, kept private, read from where they are given."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from esper.contracts.errors import ConfigError, NotFoundError, SignatureError, StorageFullError, UnavailableError
from esper.execution.keys import PRIVATE_FILE, KeyRing, SigningKey, key_id_of


def test_the_first_start_makes_a_key_and_later_ones_keep_it(tmp_path: Path) -> None:
    first = SigningKey.load_or_create(tmp_path / "state")
    again = SigningKey.load_or_create(tmp_path / "state")
    assert first.key_id == again.key_id == key_id_of(first.public_bytes)
    assert stat.S_IMODE((tmp_path / "state" / PRIVATE_FILE).stat().st_mode) == 0o600
    assert KeyRing.from_dir(tmp_path / "state").key_ids == (first.key_id,)
    assert not list((tmp_path / "state").glob(".*"))


def test_starts_at_the_same_moment_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: SigningKey.load_or_create(tmp_path), range(16)))
    assert len({key.key_id for key in keys}) == 1


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    SigningKey.load_or_create(tmp_path)
    (tmp_path / PRIVATE_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match="must have mode 0600, got 0640"):
        SigningKey.load_or_create(tmp_path)


def test_a_key_travels_as_pem() -> None:
    key = SigningKey.generate()
    back = SigningKey.from_pem(key.private_pem().decode())
    assert back.key_id == key.key_id
    key.ring().verify(back.key_id, back.sign(b"data"), b"data")
    assert "PRIVATE" not in repr(key)


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unencrypted Ed25519 key in PKCS#8 PEM"):
        SigningKey.from_pem("garbage")
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ConfigError, match="must be Ed25519, got"):
        SigningKey.from_pem(pem)
    (tmp_path / "bad.pub").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="must be Ed25519 in PEM"):
        KeyRing.from_dir(tmp_path)


def test_an_absent_key_and_an_absent_ring_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="signing key must be at"):
        SigningKey.load(tmp_path / "none.pem")
    with pytest.raises(NotFoundError, match="got no directory there"):
        KeyRing.from_dir(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"at least one \*\.pub file, got none"):
        KeyRing.from_dir(tmp_path)


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"cannot be (read|written)"):
        SigningKey.load_or_create(tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageFullError, match="must have room for"):
        SigningKey.load_or_create(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ring_travels_as_json() -> None:
    first, second = SigningKey.generate(), SigningKey.generate()
    ring = KeyRing([first.public_bytes, second.public_bytes])
    back = KeyRing.from_json(ring.to_json())
    assert back.key_ids == ring.key_ids
    assert first.key_id in back
    assert len(back) == 2


@pytest.mark.parametrize("bad", ["", "[]", "{}", '{"keys": []}', '{"keys": ["!"]}', '{"keys": [1]}'])
def test_json_of_another_form_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"trusted keys must be JSON"):
        KeyRing.from_json(bad)


def test_a_public_key_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be 32 bytes, got 3 bytes"):
        KeyRing([b"abc"])


def test_a_false_signature_is_refused() -> None:
    key = SigningKey.generate()
    for signature in (b"", b"\0" * 64, key.sign(b"other")):
        with pytest.raises(SignatureError, match=f"one of key {key.key_id}"):
            key.ring().verify(key.key_id, signature, b"data")
