"""TLS for the local mesh: an own certificate authority, leaf certificates, and gRPC credentials that follow rotation.

Keys are ECDSA P-256, written with mode 0600. The authority's key stays in the state directory; a leaf is good for the
given DNS names and addresses. In Kubernetes the same three files come from cert-manager.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from esper.contracts.errors import ConfigError, CorruptDataError, InvalidInputError, NotFoundError

_BACKDATED: Final = dt.timedelta(minutes=5)  # for clocks that run behind


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """The three PEM files one side of a mutual TLS connection needs."""

    ca_path: Path
    """Certificates of the authorities that the other side's certificate must come from."""

    cert_path: Path
    """Own certificate chain, leaf first."""

    key_path: Path
    """Own private key, unencrypted PKCS #8."""

    require_client_cert: bool = True
    """On a server: refuse callers that show no certificate of the authority."""

    server_name: str | None = None
    """On a client: name to check the server's certificate for; ``None`` takes the host of the target."""

    def __post_init__(self) -> None:
        for name in ("ca_path", "cert_path", "key_path"):
            path = getattr(self, name)
            if not path.is_file():
                raise ConfigError(f"{name} must name a file that exists, got {str(path)!r}", parameter=name)

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Give the bytes of authority, certificate and key as they are on disk now."""
        return self.ca_path.read_bytes(), self.cert_path.read_bytes(), self.key_path.read_bytes()


@dataclass(frozen=True)
class CertificateAuthority:
    """A certificate authority that lives in one directory as ``ca.pem`` and ``ca.key``."""

    directory: Path

    @classmethod
    def open_or_create(cls, directory: Path, *, valid_days: int = 3650) -> CertificateAuthority:
        """Open the authority in ``directory``, or make one there first.

        Raises:
            CorruptDataError: only one of the two files is there, or they do not belong together.
        """
        authority = cls(directory)
        present = [path.exists() for path in (authority.cert_path, authority.key_path)]
        if not any(present):
            authority._create(valid_days)
        elif not all(present):
            raise CorruptDataError(f"{directory} must hold both ca.pem and ca.key, got only one of them")
        authority._load()
        return authority

    @property
    def cert_path(self) -> Path:
        """The authority's certificate."""
        return self.directory / "ca.pem"

    @property
    def key_path(self) -> Path:
        """The authority's private key."""
        return self.directory / "ca.key"

    def issue(
        self, name: str, hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1"), *, valid_days: int = 90
    ) -> TlsConfig:
        """Write a fresh leaf certificate ``<name>.pem`` and ``<name>.key``, in the place of older ones.

        Args:
            name: Who it is for, e.g. a service; becomes the common name and ``spiffe://esper/<name>``.
            hosts: DNS names and addresses a server with this certificate is reached by.
            valid_days: Days until it expires, at least 1.
        """
        if not name.isidentifier():
            raise InvalidInputError.of("name", "be an identifier (it names files)", name)
        if valid_days < 1:
            raise InvalidInputError.of("valid_days", "be at least 1 day", valid_days)
        ca_cert, ca_key = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, ca_cert.subject, key, valid_days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(usages, critical=False)
        builder = builder.add_extension(_alternative_names(name, hosts), critical=False)
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        certificate = builder.add_extension(authority_id, critical=False).sign(ca_key, hashes.SHA256())
        cert_path, leaf_key_path = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        _write_private(leaf_key_path, _key_bytes(key))
        _write_private(cert_path, certificate.public_bytes(serialization.Encoding.PEM))
        return TlsConfig(ca_path=self.cert_path, cert_path=cert_path, key_path=leaf_key_path)

    def _create(self, valid_days: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Esper local mesh")])
        builder = _builder("Esper local mesh", subject, key, valid_days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_signing_usage(), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        _write_private(self.key_path, _key_bytes(key))
        _write_private(self.cert_path, certificate.public_bytes(serialization.Encoding.PEM))

    def _load(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        try:
            certificate = x509.load_pem_x509_certificate(self.cert_path.read_bytes())
            key = serialization.load_pem_private_key(self.key_path.read_bytes(), password=None)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{self.directory} must hold a certificate authority, got {error.filename} missing"
            ) from error
        except (ValueError, TypeError) as error:
            raise CorruptDataError(f"{self.directory} must hold ca.pem and ca.key in PEM form, got {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CorruptDataError(f"{self.directory}: ca.key must be the key of ca.pem, got another one")
        return certificate, key


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """Give server credentials that read the files anew for every connection, so that rotation needs no restart."""

    def current() -> Any:
        ca, certificate, key = config.read()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        current(), current, require_client_authentication=config.require_client_cert
    )
    return credentials


def channel_credentials(config: TlsConfig) -> grpc.ChannelCredentials:
    """Give client credentials from the files as they are now."""
    ca, certificate, key = config.read()
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=certificate)


def _builder(
    common_name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid_days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + dt.timedelta(days=valid_days))
        .add_extension(subject_id, critical=False)
    )


def _signing_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(name: str, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"spiffe://esper/{name}")]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 in one step, so that a reader sees the old content or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
