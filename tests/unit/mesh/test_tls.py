"""The local authority: files, modes, chains, and what it refuses."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from esper.contracts.errors import ConfigError, CorruptDataError, InvalidInputError, NotFoundError
from esper.mesh import CertificateAuthority, TlsConfig


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.open_or_create(tmp_path / "tls")


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_private_files_are_private(authority: CertificateAuthority) -> None:
    leaf = authority.issue("urza")
    for path in (authority.cert_path, authority.key_path, leaf.cert_path, leaf.key_path):
        assert path.stat().st_mode & 0o777 == 0o600
    assert authority.directory.stat().st_mode & 0o777 == 0o700


def test_leaf_is_signed_by_the_authority(authority: CertificateAuthority) -> None:
    leaf, root = load(authority.issue("urza").cert_path), load(authority.cert_path)
    leaf.verify_directly_issued_by(root)
    assert leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "urza"
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_leaf_names_hosts_and_identity(authority: CertificateAuthority) -> None:
    names = load(authority.issue("urza", ["urza.esper.svc", "10.0.0.7"]).cert_path).extensions
    found = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["urza.esper.svc"]
    assert [str(address) for address in found.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert found.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://esper/urza"]


def test_leaf_is_valid_now_and_for_as_long_as_asked(authority: CertificateAuthority) -> None:
    leaf = load(authority.issue("urza", valid_days=2).cert_path)
    now = dt.datetime.now(dt.UTC)
    assert leaf.not_valid_before_utc < now < leaf.not_valid_after_utc < now + dt.timedelta(days=2, minutes=1)


def test_authority_is_opened_again_not_made_anew(authority: CertificateAuthority) -> None:
    before = authority.cert_path.read_bytes()
    CertificateAuthority.open_or_create(authority.directory)
    assert authority.cert_path.read_bytes() == before


def test_new_leaf_takes_the_place_of_the_old(authority: CertificateAuthority) -> None:
    first = load(authority.issue("urza").cert_path)
    second = load(authority.issue("urza").cert_path)
    assert first.serial_number != second.serial_number


def test_half_an_authority_is_refused(authority: CertificateAuthority) -> None:
    authority.key_path.unlink()
    with pytest.raises(CorruptDataError, match=r"must hold both ca\.pem and ca\.key, got only one"):
        CertificateAuthority.open_or_create(authority.directory)


def test_key_of_another_authority_is_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    other = CertificateAuthority.open_or_create(tmp_path / "other")
    authority.key_path.write_bytes(other.key_path.read_bytes())
    with pytest.raises(CorruptDataError, match=r"ca\.key must be the key of ca\.pem, got another one"):
        authority.issue("urza")


def test_damaged_and_missing_files_are_refused(authority: CertificateAuthority, tmp_path: Path) -> None:
    authority.cert_path.write_bytes(b"nonsense")
    with pytest.raises(CorruptDataError, match=r"must hold ca\.pem and ca\.key in PEM form"):
        authority.issue("urza")
    with pytest.raises(NotFoundError, match="must hold a certificate authority"):
        CertificateAuthority(tmp_path / "nowhere").issue("urza")


@pytest.mark.parametrize("name", ["", "../evil", "a b"])
def test_names_that_are_no_file_names_are_refused(authority: CertificateAuthority, name: str) -> None:
    with pytest.raises(InvalidInputError, match="name must be an identifier"):
        authority.issue(name)


def test_validity_below_a_day_is_refused(authority: CertificateAuthority) -> None:
    with pytest.raises(InvalidInputError, match="valid_days must be at least 1 day, got 0"):
        authority.issue("urza", valid_days=0)


def test_config_needs_files_that_exist(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigError, match="ca_path must name a file that exists"):
        TlsConfig(ca_path=missing, cert_path=missing, key_path=missing)
