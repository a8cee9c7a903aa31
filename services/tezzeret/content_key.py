"""The identity of a compile request: equal requests to equal toolchains have equal keys, and share job and kernel."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version

from esper.contracts.kernel import CompileSpec
from esper.execution import answers
from esper.execution.answers import job_id_of

__all__ = ["content_key", "job_id_of", "toolchain"]

_RECIPE = "3"
"""Raise when the compiler's recipe changes in a way that must yield new kernels."""


@lru_cache(maxsize=1)
def toolchain() -> Mapping[str, str]:
    """Give the versions that make a kernel what it is."""
    return {
        "esper": version("esper"),
        "torch": version("torch"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "recipe": _RECIPE,
    }


def content_key(spec: CompileSpec, *, optimized: bool | None = None, blueprint_id: str = "") -> str:
    """Give the key of a request to this process's toolchain; see `esper.execution.answers.content_key`."""
    return answers.content_key(spec, toolchain(), optimized=optimized, blueprint_id=blueprint_id)
