"""One adaptation is one trace, from decision to field report, through every process it passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

import pytest

from esper.mesh import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STAGES = {
    ("esper-tamiyo", "esper.adaptation.decide"),
    ("esper-training", "esper.adaptation.plan"),
    ("esper-tezzeret", "tezzeret.compile"),
    ("esper-tezzeret", "tezzeret.validating"),
    ("esper-tezzeret", "tezzeret.compiling"),
    ("esper-tezzeret", "tezzeret.packaging"),
    ("esper-tezzeret", "esper.adaptation.store"),
    ("esper-urza", "esper.v1.UrzaService/UploadKernel"),
    ("esper-tezzeret", "esper.adaptation.announce"),
    ("esper-training", "esper.adaptation.load"),
    ("esper-training", "esper.adaptation.germinate"),
    ("esper-training", "esper.adaptation.evaluate"),
    ("esper-training", "esper.adaptation.report"),
}
"""Where each stage of an adaptation leaves a span, and its name."""

TRAINING = """
import sys
from pathlib import Path
import torch
from torch import nn
import esper
from esper.cli import digits
splits = digits.load_digits()
model = esper.wrap(digits.make_host(0))
growth = esper.GrowthConfig(incubation_epochs=1, graft_epochs=1, max_looks=1)
session = esper.SessionConfig(decision_wait_s=10.0, growth=growth)
with esper.Mesh.local(Path(sys.argv[1])) as mesh:
    trainer = esper.Trainer(
        model, digits.make_optimizer(model), nn.CrossEntropyLoss(), mesh=mesh, budget=esper.Budget(added_params=2.0),
        config=esper.TrainerConfig(show_progress=False, session=session),
    )
    report = trainer.fit(splits.train_loader(0), splits.control_loader(), 18)
print(*(item.trace_id for item in report.adaptations if item.contribution is not None))
"""


@dataclass
class Collector:
    """A real OTLP collector, and the spans that it says it got: (service, span name) by trace."""

    endpoint: str
    process: subprocess.Popen[str]
    spans: dict[str, set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))

    def read(self) -> None:
        """Take in what it prints until it ends."""
        assert self.process.stdout is not None
        service = trace = ""
        for line in self.process.stdout:
            if found := re.search(r"-> service\.name: Str\((.*)\)", line):
                service = found[1]
            elif found := re.search(r"^\s+Trace ID\s+: (\w+)", line):
                trace = found[1]
            elif found := re.search(r"^\s+Name\s+: (.*)", line):
                self.spans[trace].add((service, found[1].strip()))


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    """The collector, as a process on loopback."""
    spec = util.find_spec("rotel")
    assert spec is not None
    assert spec.origin is not None
    grpc_port, http_port = free_ports(2)
    debug = ("--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed")
    ports = ("--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}", "--otlp-http-endpoint", f"127.0.0.1:{http_port}")
    process = subprocess.Popen(
        [str(Path(spec.origin).parent / "rotel-agent"), "start", *debug, *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"HOME": str(tmp_path)},
    )
    running = Collector(f"http://127.0.0.1:{grpc_port}", process)
    reader = threading.Thread(target=running.read)
    reader.start()
    try:
        yield running
    finally:
        process.terminate()
        process.wait(20)
        reader.join(20)


def test_an_adaptation_is_one_trace_across_processes(collector: Collector, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path / "mesh")],
        check=False,
        capture_output=True,
        text=True,
        timeout=350,
        # What is made ready beforehand is compiled in no adaptation's trace.
        env={
            **os.environ,
            "ESPER_OTLP_ENDPOINT": collector.endpoint,
            "ESPER_TAMIYO_FORECAST": "0",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    traces = done.stdout.split()
    assert traces, "no adaptation was measured"
    _until(lambda: any(collector.spans[trace] >= STAGES for trace in traces))
    assert any(collector.spans[trace] >= STAGES for trace in traces), {
        trace: sorted(STAGES - collector.spans[trace]) for trace in traces
    }


def _until(reached: Callable[[], bool], deadline_s: float = 15.0) -> None:
    looked, end_s = threading.Event(), time.monotonic() + deadline_s
    while not reached() and time.monotonic() < end_s:
        looked.wait(0.1)
