"""Which role each method of the mesh asks of its caller: the one table, complete by test."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class Role(enum.IntEnum):
    """What a caller may do; each role includes those below it."""

    VIEWER = 1
    """May look."""
    OPERATOR = 2
    """May also intervene in runs, and bring in blueprints."""
    SERVICE = 3
    """A part of the mesh itself: may also report outcomes and store kernels."""

    @classmethod
    def of(cls, name: str) -> Role | None:
        """Give the role of a lower-case name, or ``None``."""
        return next((role for role in cls if role.name.lower() == name), None)


_BY_SERVICE: Final[Mapping[str, Mapping[Role, tuple[str, ...]]]] = {
    "Tolaria": {Role.VIEWER: ("ListRuns", "GetRun", "WatchRun", "ListSeeds"), Role.OPERATOR: ("ControlRun",)},
    "Tamiyo": {
        Role.VIEWER: ("ListDecisions", "GetPosterior", "Explain"),
        Role.OPERATOR: ("Analyze", "SelectSeed", "ReplayRun", "ExportMemory", "ImportMemory"),
        Role.SERVICE: ("SubmitFieldReport",),
    },
    "Karn": {
        Role.VIEWER: ("ListArchive",),
        Role.OPERATOR: ("ProposeBlueprints",),
        Role.SERVICE: ("SubmitFieldReport",),
    },
    "Urza": {
        Role.VIEWER: (
            *("GetBlueprint", "SearchBlueprints", "GetLineage"),
            *("GetKernel", "ListKernels", "DownloadKernel"),
        ),
        Role.OPERATOR: ("CreateBlueprint", "SetBlueprintState", "PinKernel", "SweepLibrary"),
        Role.SERVICE: ("UploadKernel", "GetKernelUpload", "RecordFieldReport"),
    },
    "Tezzeret": {
        Role.VIEWER: ("GetJob", "WatchJob", "ListJobs", "ListDeadLetters", "GetSandbox"),
        Role.OPERATOR: ("Compile", "RequeueDeadLetter", "CancelJob"),
    },
    "Nissa": {
        Role.VIEWER: ("GetCurrentMetrics", "WatchMetrics", "GetSystemHealth", "ListAnomalies", "GetRunReport"),
        Role.OPERATOR: ("AcknowledgeAnomaly",),
    },
}

METHOD_ROLES: Final[Mapping[str, Role]] = {
    f"/esper.v1.{service}Service/{method}": role
    for service, by_role in _BY_SERVICE.items()
    for role, methods in by_role.items()
    for method in methods
}
"""``/package.Service/Method`` to the least role that may call it."""
