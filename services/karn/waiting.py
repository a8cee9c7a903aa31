"""Reports of designs that nobody here knows yet: they wait for their design, and are learned once it comes by."""

from __future__ import annotations

from esper.contracts.run import FieldReport
from esper.services.karn.store import ReportKey


class WaitingReports:
    """Reports by when they came, the newest alone; what is dropped is looked for again at the next start."""

    def __init__(self, max_reports: int) -> None:
        self._max_reports = max_reports
        self._reports: dict[ReportKey, FieldReport] = {}
        self._asked: set[str] = set()

    def add(self, key: ReportKey, report: FieldReport) -> None:
        """Have a report wait; the oldest goes where there are too many."""
        self._reports[key] = report
        while len(self._reports) > self._max_reports:
            del self._reports[min(self._reports)]

    def take(self, blueprint_id: str) -> list[tuple[ReportKey, FieldReport]]:
        """Give the reports that waited for a design, in the order in which they came, and have them wait no more."""
        keys = sorted(key for key, report in self._reports.items() if report.blueprint_id == blueprint_id)
        self._asked.discard(blueprint_id)
        return [(key, self._reports.pop(key)) for key in keys]

    def unasked(self) -> list[str]:
        """Give the designs that the library was not asked for since this began, by content id."""
        wanted = {report.blueprint_id for report in self._reports.values()}
        self._asked &= wanted
        return sorted(wanted - self._asked)

    def note_asked(self, blueprint_id: str) -> None:
        """Note that the library was asked for a design and has none."""
        self._asked.add(blueprint_id)
