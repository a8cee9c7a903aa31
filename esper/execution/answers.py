"""Which kernel answers a compile request: the request's identity, and what the compiler has named for it here.

    content key   SHA-256 over graph, site, target, device, form, random seed and the toolchain that compiles
    job id        ``j`` + first 32 hex digits of the content key

The toolchain is the compiler's knowledge. A reader takes it from the signed manifest of the kernel that the compiler
named last, and so computes the key under which an equal request would be answered now: a compiler that was renewed
gives other keys, for which nothing is known until it has named a kernel itself.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from esper.blueprints.ir import content_id
from esper.contracts.errors import InvalidInputError
from esper.contracts.kernel import CompileSpec, DeviceKind, KernelManifest

_MAX_ANSWERS: Final = 4096


def content_key(
    spec: CompileSpec, toolchain: Mapping[str, str], *, optimized: bool | None = None, blueprint_id: str = ""
) -> str:
    """Give the key of a request, 64 hex digits.

    Args:
        spec: What is to be compiled; must be legal.
        toolchain: Versions that make the kernel what it is.
        optimized: Whether the inference form is meant; ``None`` follows from the device, as the compiler does it.
        blueprint_id: Content id of the graph where it is known; it costs as much as all the rest.
    """
    inference = spec.device is not DeviceKind.CPU if optimized is None else optimized
    said = {
        "ir": blueprint_id or content_id(spec.ir),
        "site": [spec.site.kind.name, list(spec.site.input_shape), list(spec.site.output_shape)],
        "target": spec.target.name,
        "device": spec.device.name,
        "form": "inference" if inference else "trainable",
        "seed": spec.random_seed,
        "toolchain": dict(toolchain),
    }
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"esper-compile-v1\n" + canonical.encode()).hexdigest()


def job_id_of(key: str) -> str:
    """Give the id of the job of a content key."""
    return f"j{key[:32]}"


class KernelAnswers:
    """What the compiler has named for requests since this was made, newest kept; thread-safe.

    Only manifests that were proven may be learnt. Nothing here says that a kernel is still at hand.
    """

    def __init__(self, max_answers: int = _MAX_ANSWERS) -> None:
        if max_answers < 1:
            raise InvalidInputError.of("max_answers", "be >= 1", max_answers)
        self._max_answers = max_answers
        self._lock = threading.Lock()
        self._named: OrderedDict[str, str] = OrderedDict()
        self._toolchain: Mapping[str, str] | None = None

    def learn(self, manifest: KernelManifest) -> None:
        """Note a kernel that the compiler has just named as its answer."""
        job_id = job_id_of(manifest.content_key)
        with self._lock:
            self._toolchain = manifest.toolchain
            self._named[job_id] = manifest.artifact_id
            self._named.move_to_end(job_id)
            while len(self._named) > self._max_answers:
                self._named.popitem(last=False)

    def refuse(self, job_id: str) -> bool:
        """Forget the answer of a job that the compiler says has none; say whether there was one."""
        with self._lock:
            return self._named.pop(job_id, None) is not None

    def withdraw(self, artifact_id: str) -> None:
        """Forget a kernel wherever it was named."""
        with self._lock:
            for job_id in [job_id for job_id, named in self._named.items() if named == artifact_id]:
                del self._named[job_id]

    def find(self, spec: CompileSpec) -> str | None:
        """Give the id of the kernel that the compiler named for an equal request, ``None`` where it named none."""
        toolchain = self._toolchain
        if toolchain is None:
            return None
        job_id = job_id_of(content_key(spec, toolchain))
        with self._lock:
            return self._named.get(job_id)
