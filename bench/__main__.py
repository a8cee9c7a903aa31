"""The command line: ``python -m bench NAME``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, Protocol

from bench.report import Result, publish
from esper.contracts.errors import EsperError

MEASURES: Final = {
    "k1_dormant": "what a wrapped, dormant model costs over the same model before",
    "k2_active": "seeds that take part, over the same maths written by hand in plain PyTorch",
    "k3_cache": "the native kernel cache against cachebox, theine, cachetools and lru_cache",
    "k4_state_ring": "seed state and signal ring against NumPy arrays and collections.deque",
    "k5_dispatcher": "forking and joining against a thread pool, and whether every planted race is found",
    "k6_surgery": "how long a step is held up by growing, and whether a grown model is saved to the bit",
    "c1_compile": "compiling and validating a kernel against scripting and saving alone",
    "c2_adaptation": "from a decision to an active seed, cold and with the kernel in memory",
    "c3_library": "the library against the same SQL by hand and a bare gRPC call, and its transfers",
    "c4_tiers": "which cache tier has the kernels of growing runs, how fast, and without the second",
    "incubation": "ways in which a seed learns alone: quality and cost of each",
    "g2_counterfactual": "the effects of eight rivals in fused passes, over one configuration after the other",
    "g2_selection": "whether what a race measures tells which candidate is worth growing: each is trained out",
    "g3_memory": "how much less is tried by a run whose mesh has seen another of its kind",
    "g4_without_trace": "bits that differ, after seeds have gone, from a run that never grew",
    "g5_cost": "what growing takes by phase, in FLOPs and time, and how long it holds a step up",
    "growth": "grown networks against their controls on a sealed test",
}
"""Every measure, and what it tells; each is a module of this package with ``measure(quick)``."""

_SHORT: Final = {name.split("_", maxsplit=1)[0]: name for name in reversed(MEASURES)}


class Measure(Protocol):
    """What the module of a measure holds."""

    def measure(self, *, quick: bool) -> Result:
        """Run it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; gives the exit code: 0 where everything was measured, goals met or not."""
    asked = _parser().parse_args(arguments)
    if asked.list:
        for name, summary in MEASURES.items():
            print(f"{name:16} {summary}")
        return 0
    if asked.name is None:
        _parser().error(f"name a measure: {', '.join(MEASURES)}, or all")
    if asked.name == "all":
        return _run_all(quick=asked.quick, json_alone=asked.json)
    return run_one(_SHORT.get(asked.name, asked.name), quick=asked.quick, json_alone=asked.json)


def run_one(name: str, *, quick: bool, json_alone: bool) -> int:
    """Run one measure in this process and print what it gives."""
    module: Measure = import_module(f"bench.{name}")
    try:
        result = module.measure(quick=quick)
    except EsperError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    path = publish(result, json_alone=json_alone)
    print(f"written to {path}", file=sys.stderr)
    return 0


def _run_all(*, quick: bool, json_alone: bool) -> int:
    """Run every measure in a process of its own, so that none finds what another left."""
    flags = [*(["--quick"] if quick else []), *(["--json"] if json_alone else [])]
    codes = [subprocess.run([sys.executable, "-m", "bench", name, *flags], check=False).returncode for name in MEASURES]
    return max(codes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esper bench", description="Measure Esper against its references.")
    parser.add_argument("name", nargs="?", choices=[*MEASURES, *_SHORT, "all"], metavar="NAME", help="measure, or all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: about a minute (growth: ten)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a measure and nothing else")
    parser.add_argument("--list", action="store_true", help="name the measures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
