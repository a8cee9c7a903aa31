"""What follows from a compile spec alone, worked out once: identity, price, and that it is legal.

Runs ask for few things and often, and a spec says all of its graph each time. One that was read, checked and priced
before is known by its bytes; so a request for a kernel that is there costs a look at the library and little else.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from esper.blueprints.cost import cost
from esper.blueprints.ir import content_id
from esper.contracts.errors import InvalidInputError
from esper.contracts.kernel import CompileSpec
from esper.services.tezzeret.content_key import content_key

_MAX_SEED: Final = 2**63 - 1
_MAX_KNOWN_BYTES: Final = 2 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSpec:
    """A legal spec and what follows from it; `check_spec` makes them."""

    spec: CompileSpec
    """What is to be compiled."""
    blueprint_id: str
    """Content id of its graph."""
    content_key: str
    """Key of the request to this process's toolchain."""
    parameters: int
    """Parameters that the kernel has."""


def check_spec(spec: CompileSpec) -> CheckedSpec:
    """Check a spec and work out what follows from it.

    Raises:
        InvalidBlueprintError: The blueprint is not legal at the site.
        InvalidInputError: The random seed is out of range.
    """
    if not 0 <= spec.random_seed <= _MAX_SEED:
        raise InvalidInputError.of("spec.random_seed", "be within [0, 2**63)", spec.random_seed)
    parameters = cost(spec.ir, spec.site).parameters
    blueprint_id = content_id(spec.ir)
    key = content_key(spec, blueprint_id=blueprint_id)
    return CheckedSpec(spec=spec, blueprint_id=blueprint_id, content_key=key, parameters=parameters)


class KnownSpecs:
    """Checked specs by their wire bytes, those used last kept. Belongs to one event loop."""

    def __init__(self, max_bytes: int = _MAX_KNOWN_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._known: OrderedDict[bytes, CheckedSpec] = OrderedDict()

    def find(self, said: bytes) -> CheckedSpec | None:
        """Give what these bytes were found to say; ``None`` where they were not read yet, or long ago."""
        found = self._known.get(said)
        if found is not None:
            self._known.move_to_end(said)
        return found

    def learn(self, said: bytes, checked: CheckedSpec) -> None:
        """Note what bytes say; the oldest go where there are more than ``max_bytes`` of them."""
        if said not in self._known:
            self._held_bytes += len(said)
        self._known[said] = checked
        while self._held_bytes > self._max_bytes:
            gone, _ = self._known.popitem(last=False)
            self._held_bytes -= len(gone)
