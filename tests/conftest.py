"""What every test shares."""

from __future__ import annotations

import gc
import signal

import pytest
from hypothesis import HealthCheck, settings

# A shell's background job ignores Ctrl-C from birth, and so would every test of it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine is no defect: neither a slow example nor a slow draw fails a test.
settings.register_profile("esper", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("esper")


@pytest.fixture(autouse=True)
def no_python_code_inside_collections() -> None:
    """Take Hypothesis' timing callback out of the garbage collector.

    CPython 3.11 keeps the recursion depth of ``ast.parse`` per interpreter. A callback written in Python lets threads
    switch in the middle of a collection inside ``ast.parse``; when another thread parses meanwhile (``torch.jit``
    does), the first one ends in "SystemError: AST constructor recursion depth mismatch". The callback only feeds
    statistics.
    """
    gc.callbacks[:] = [call for call in gc.callbacks if not getattr(call, "__module__", "").startswith("hypothesis")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a module that share one of its fixtures in one worker, so that it is made once."""
    for item in items:
        if isinstance(item, pytest.Function) and _shares(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _shares(item: pytest.Function) -> bool:
    definitions = item._fixtureinfo.name2fixturedefs  # there is no public way to a fixture's scope
    return any(one.scope == "module" and one.baseid for found in definitions.values() for one in found)
