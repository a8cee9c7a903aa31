"""Print the Secrets that the manifests name, for ``kubectl apply -f -``; what they hold is kept in one directory.

python deploy/k8s/make_secrets.py --dir ~/esper-secrets | kubectl apply -f -

A second run with the same directory gives the same keys and passwords and fresh certificates (good for 90 days).
"""  # noqa: INP001 -- a script, no package

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from esper.execution.keys import PRIVATE_FILE, SigningKey
from esper.mesh.settings import SERVICES
from esper.mesh.tls import CertificateAuthority

NAMESPACE: Final = "esper"
OWNERS: Final = (*SERVICES, "trainer", "nats")
"""Whoever shows a certificate."""


def main() -> None:
    """Read the command line and print one list of Secrets."""
    parser = argparse.ArgumentParser(description="Print the Secrets of deploy/k8s.")
    parser.add_argument("--dir", type=Path, required=True, help="where authority, signing key and passwords rest")
    parser.add_argument("--database-url", help="PostgreSQL outside of the cluster; default: the one of the base")
    parser.add_argument("--no-certificates", action="store_true", help="leave certificates to cert-manager")
    given = parser.parse_args()
    made = stores_and_keys(given.dir, given.database_url)
    if not given.no_certificates:
        made += certificates(given.dir)
    json.dump({"apiVersion": "v1", "kind": "List", "items": made}, sys.stdout, indent=1)
    sys.stdout.write("\n")


def stores_and_keys(directory: Path, database_url: str | None = None) -> list[dict[str, Any]]:
    """Give the Secrets of the stores, of the compiler's signing key, of the keys that are trusted, and of REST."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    postgres, redis = _password(directory / "postgres.password"), _password(directory / "redis.password")
    rest_token = _password(directory / "urza-rest.password")
    key = SigningKey.load_or_create(directory / "keys")
    stores = {
        "database-url": database_url or f"postgresql://esper:{postgres}@postgres.{NAMESPACE}.svc:5432/esper",
        "postgres-password": postgres,
        "redis-url": f"redis://:{redis}@redis.{NAMESPACE}.svc:6379/0",
        "redis-password": redis,
    }
    return [
        _secret("esper-stores", {name: text.encode() for name, text in stores.items()}),
        _secret("esper-signing-key", {PRIVATE_FILE: key.private_pem()}),
        _secret("esper-trusted-keys", {f"{key.key_id}.pub": key.public_pem()}),
        _secret("urza-rest", {"token": rest_token.encode()}),
    ]


def certificates(directory: Path) -> list[dict[str, Any]]:
    """Give a Secret with a fresh certificate for each of `OWNERS`, from the authority of the directory."""
    authority = CertificateAuthority.open_or_create(directory / "authority")
    made = []
    for owner in OWNERS:
        ca, certificate, key = authority.issue(owner, hosts_of(owner)).read()
        files = {"ca.crt": ca, "tls.crt": certificate, "tls.key": key}
        made.append(_secret(f"{owner}-tls", files, kind="kubernetes.io/tls"))
    return made


def hosts_of(owner: str) -> tuple[str, ...]:
    """Give the names an owner of a certificate is reached by within the cluster."""
    service = (owner, f"{owner}.{NAMESPACE}", f"{owner}.{NAMESPACE}.svc", f"{owner}.{NAMESPACE}.svc.cluster.local")
    if owner != "nats":
        return service
    return (*service, f"*.nats-headless.{NAMESPACE}.svc", f"*.nats-headless.{NAMESPACE}.svc.cluster.local")


def _password(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="ascii")
    password = secrets.token_hex(24)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(password)
    return password


def _secret(name: str, files: Mapping[str, bytes], *, kind: str = "Opaque") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app.kubernetes.io/part-of": "esper"}},
        "type": kind,
        "data": {key: base64.b64encode(value).decode() for key, value in files.items()},
    }


if __name__ == "__main__":
    main()
