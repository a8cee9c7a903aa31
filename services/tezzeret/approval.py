"""What Tezzeret looks at before it puts its name under what a worker made."""

from __future__ import annotations

from esper.blueprints.ir import canonical_bytes
from esper.contracts.errors import CompilationError, CorruptDataError, InvalidInputError
from esper.contracts.kernel import CompileSpec, KernelArtifact, KernelManifest
from esper.execution.artifact import artifact_bytes, check_parts, load_weights, sign
from esper.execution.keys import SigningKey
from esper.services.tezzeret.content_key import content_key


def approve(artifact: KernelArtifact, spec: CompileSpec, signer: SigningKey) -> tuple[KernelManifest, bytes]:
    """Sign a worker's kernel once it answers the request; give manifest and serialised artefact.

    A worker runs code that came from outside: its word counts for nothing that can be looked up here.

    Raises:
        CompilationError: The kernel is not what was asked for, or has a check that failed.
    """
    try:
        manifest = check_parts(artifact)
        load_weights(artifact.weights)
    except (CorruptDataError, InvalidInputError) as error:
        raise CompilationError(f"worker must give a sound kernel, got one that is not: {error}") from error
    wanted = {
        "content_key": content_key(spec),
        "site": spec.site,
        "device": spec.device,
    }
    wrong = [name for name, value in wanted.items() if getattr(manifest, name) != value]
    if artifact.ir != canonical_bytes(spec.ir):
        wrong.append("ir")
    if not manifest.validated:
        wrong.append("checks")
    if wrong:
        raise CompilationError(f"worker must give the kernel that was asked for, it differs in {', '.join(wrong)}")
    return manifest, artifact_bytes(sign(artifact, signer))
