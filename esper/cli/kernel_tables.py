"""Kernels and their checks as rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from esper.cli.output import console, print_rows
from esper.cli.sites import site_text
from esper.contracts.kernel import KernelManifest, ValidationCheck

CHECK_COLUMNS: Final = ("check", "figure", "limit", "unit", "passed", "detail")
"""Columns of a table of checks."""


def check_rows(checks: Sequence[ValidationCheck]) -> list[tuple[Any, ...]]:
    """Give one row a check, for programs; ``None`` where there is no figure or limit."""
    return [(check.name, check.figure, check.limit, check.unit, check.passed, check.detail) for check in checks]


def print_checks(title: str, checks: Sequence[ValidationCheck]) -> None:
    """Print checks as a table for people, with figures to four digits."""
    rows = [
        (check.name, _digits(check.figure), _digits(check.limit), check.unit, check.passed, check.detail)
        for check in checks
    ]
    print_rows(title, CHECK_COLUMNS, rows, as_json=False)


def print_manifest(manifest: KernelManifest, size_bytes: int) -> None:
    """Print what a manifest says, for people: facts, targets that were given up, parts and checks."""
    cost = manifest.cost
    facts = [
        ("kernel", manifest.artifact_id),
        ("blueprint", manifest.blueprint_id),
        ("site", site_text(manifest.site)),
        ("target", manifest.target.name.lower()),
        ("device", manifest.device.name.lower()),
        ("optimizations", " ".join(manifest.optimizations)),
        ("cost", f"{cost.parameters} parameters, {cost.flops} FLOPs, {cost.activation_bytes} bytes of activations"),
        ("size_bytes", size_bytes),
        ("compile_s", f"{manifest.compilation_time.total_seconds():.3f}"),
        ("toolchain", " ".join(f"{name}={version}" for name, version in sorted(manifest.toolchain.items()))),
        ("created", manifest.created_at.isoformat()),
        ("content_key", manifest.content_key),
    ]
    facts += [(f"not {given_up.target.name.lower()}", given_up.reason) for given_up in manifest.fallbacks]
    print_rows("kernel", ("field", "value"), facts, as_json=False)
    parts = [(part.name, part.size_bytes, part.sha256.hex()) for part in manifest.parts]
    print_rows("parts", ("part", "bytes", "sha256"), parts, as_json=False)
    print_checks("checks", manifest.checks)


def print_summary(manifest: KernelManifest, size_bytes: int) -> None:
    """Print a kernel in a line or two, with every target that was given up for it."""
    passed = sum(check.passed for check in manifest.checks)
    line = (
        f"{manifest.artifact_id}  {manifest.target.name.lower()} for {site_text(manifest.site)}, "
        f"{manifest.cost.parameters} parameters, {passed} of {len(manifest.checks)} checks passed, {size_bytes} bytes"
    )
    console.print(line, highlight=False, soft_wrap=True)
    for given_up in manifest.fallbacks:
        line = f"not {given_up.target.name.lower()}: {given_up.reason}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _digits(figure: float | None) -> str | None:
    return None if figure is None else f"{figure:.4g}"
