"""``esper kernels``: compile, look at, take along and verify."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from esper.cli.compile_jobs import follow, require_success
from esper.cli.connection import call, current_settings, pages, watch
from esper.cli.files import Force, write_file
from esper.cli.kernel_tables import print_checks, print_manifest, print_summary
from esper.cli.output import Json, Timeout, console, plain, print_json, print_rows
from esper.cli.sites import site_of
from esper.contracts.chunks import Assembler
from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
)
from esper.contracts.kernel import CompileJob, CompileTarget, DeviceKind, JobPriority, KernelManifest
from esper.contracts.wire import from_wire, to_message
from esper.v1 import blueprint_pb2, kernel_pb2, tezzeret_service_pb2, urza_service_pb2

app = typer.Typer(help="Kernels: compile, look, verify.", no_args_is_help=True)

TargetName = StrEnum("TargetName", {one.name: one.name.lower() for one in CompileTarget})  # type: ignore[misc]
"""Names of compile targets, as they are typed."""
DeviceName = StrEnum("DeviceName", {one.name: one.name.lower() for one in DeviceKind})  # type: ignore[misc]
"""Names of devices, as they are typed."""
PriorityName = StrEnum("PriorityName", {one.name: one.name.lower() for one in JobPriority})  # type: ignore[misc]
"""Names of priorities, as they are typed."""

ArtifactId = Annotated[str, typer.Argument(help="Kernel: k and 32 hex digits.")]

_MAX_SEED: Final = 2**63 - 1


@app.command("list")
def list_kernels(
    blueprint: Annotated[str, typer.Option("--blueprint", help="Only kernels of this blueprint.")] = "",
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """List kernels, newest first."""
    blueprint_id = _blueprint(blueprint, timeout).id if blueprint else ""

    request = urza_service_pb2.ListKernelsRequest(blueprint_id=blueprint_id)
    found = [one for page in pages("urza", "ListKernels", request) for one in page.kernels]
    rows = [
        (
            one.artifact_id,
            one.blueprint_id[:12],
            kernel_pb2.CompileTarget.Name(one.target).removeprefix("COMPILE_TARGET_").lower(),
            one.cost.parameters,
            f"{one.compilation_time.ToTimedelta().total_seconds():.3f}",
            one.created_at.ToJsonString(),
        )
        for one in found
    ]
    columns = ("kernel", "blueprint", "target", "parameters", "compile_s", "created")
    print_rows("kernels", columns, rows, as_json=as_json)


@app.command("show")
def show(artifact_id: ArtifactId, as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """Print a kernel's manifest: where it fits, what it costs, its parts and its validation rows.

    It is shown as the library has it; `esper kernels verify` proves it.
    """
    response = _kernel(artifact_id, timeout)
    if as_json:
        print_json(plain(response))
        return
    print_manifest(from_wire(response.manifest, KernelManifest), response.size_bytes)
    if response.HasField("statistics"):
        said = response.statistics
        console.print(f"reported: {said.trials} trials, {said.kept} kept", highlight=False)


@app.command("compile")
def compile_kernel(  # noqa: PLR0913 - each is a word of the command
    blueprint: Annotated[str, typer.Argument(help="Blueprint: id, name or name@version.")],
    site: Annotated[
        str,
        typer.Option("--site", help="Site as KIND:IN:OUT, e.g. linear:64:32 or conv2d:3x32x32:16x32x32."),
    ],
    target: Annotated[
        TargetName, typer.Option("--target", help="What to compile to; one that fails falls back to the next.")
    ] = TargetName("torchscript"),
    device: Annotated[
        DeviceName, typer.Option("--device", help="cpu gives the trainable form, cuda and mobile inference forms.")
    ] = DeviceName("cpu"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the initial weights.", min=0, max=_MAX_SEED)] = 0,
    priority: Annotated[
        PriorityName,
        typer.Option("--priority", help="Which jobs that wait it goes before; an equal job that waits is hurried."),
    ] = PriorityName("normal"),
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or print it and leave.")
    ] = True,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Compile a blueprint of the library for a site, showing each phase; print the kernel.

    Equal requests share one job and one kernel, so asking again costs nothing. Ctrl-C ends the waiting, not the job:
    `esper jobs watch` takes it up again. Exit code 1 when there is no kernel in the end.
    """
    place = to_message(site_of(site), blueprint_pb2.Site)
    spec = tezzeret_service_pb2.CompileSpec(
        ir=_blueprint(blueprint, timeout).ir,
        site=place,
        target=kernel_pb2.CompileTarget.ValueType(CompileTarget[target.name]),
        device=kernel_pb2.DeviceKind.ValueType(DeviceKind[device.name]),
        random_seed=seed,
    )
    request = tezzeret_service_pb2.CompileRequest(
        spec=spec, priority=tezzeret_service_pb2.JobPriority.ValueType(JobPriority[priority.name])
    )
    response = call("tezzeret", "Compile", request, timeout)
    if wait:
        response.job.CopyFrom(follow(response.job.job_id))
    if as_json:
        print_json(plain(response))
    job = from_wire(response.job, CompileJob)
    require_success(job, ended_only=not wait)
    if as_json:
        return
    if not job.artifact_id:
        console.print(f"{job.job_id}  {job.phase.name.lower()}", highlight=False)
        return
    found = _kernel(job.artifact_id, timeout)
    print_summary(from_wire(found.manifest, KernelManifest), found.size_bytes)
    if response.cached:
        console.print("it was there already", highlight=False)


@app.command("download")
def download(
    artifact_id: ArtifactId,
    file: Annotated[Path, typer.Argument(help="File to write.")],
    force: Force = False,
) -> None:
    """Write a kernel as the library has it to a file, checked against the library's digest.

    `esper kernels verify FILE` proves who signed it.
    """
    data = _download(artifact_id)
    write_file(file, data, force=force)
    console.print(f"{file}  {len(data)} bytes", highlight=False, soft_wrap=True)


@app.command("verify")
def verify(
    kernel: Annotated[str, typer.Argument(metavar="FILE|ARTIFACT_ID", help="File with a kernel, or one to download.")],
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key", help="Trusted public key (PEM or JSON), or directory of *.pub; may repeat. Default: the mesh's."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove a kernel: its signature, the digest of every part, and every validation row, each shown.

    A file with --key needs no mesh. Exit code 1 when anything does not hold; the reason is on standard error.
    """
    from esper.cli.kernel_proof import prove, read_file, trusted_keys
    from esper.execution.artifact import ARTIFACT_ID

    from_library = not Path(kernel).exists()
    if from_library and not ARTIFACT_ID.fullmatch(kernel):
        raise InvalidInputError.of("kernel", "be a file, or an artefact id (k and 32 hex digits)", kernel)
    ring = trusted_keys(key or [current_settings().trusted_dir])
    data = _download(kernel) if from_library else read_file(Path(kernel))
    proof = prove(data, ring, artifact_id=kernel if from_library else None)
    if as_json:
        print_json(proof.to_plain())
    else:
        print_rows("proof", ("step", "holds", "detail"), proof.steps, as_json=False)
        if proof.checks:
            print_checks("checks", proof.checks)
    if proof.error is not None:
        raise proof.error
    if not as_json:
        console.print(f"{proof.artifact_id} verifies", highlight=False)


def _download(artifact_id: str) -> bytes:
    from esper.execution.artifact import MAX_ARTIFACT_BYTES

    assembler = Assembler(max_bytes=MAX_ARTIFACT_BYTES)
    request = urza_service_pb2.DownloadKernelRequest(artifact_id=artifact_id)

    def take(chunk: urza_service_pb2.DownloadKernelResponse) -> None:
        try:
            assembler.add(chunk)
        except (InvalidInputError, CapacityExceededError) as error:
            raise CorruptDataError(f"kernel {artifact_id} arrived damaged: {error}") from error

    watch("urza", "DownloadKernel", request, take)
    return assembler.finish()


def _blueprint(reference: str, timeout_s: float) -> blueprint_pb2.Blueprint:
    request = urza_service_pb2.GetBlueprintRequest(reference=reference)
    found: blueprint_pb2.Blueprint = call("urza", "GetBlueprint", request, timeout_s).blueprint
    return found


def _kernel(artifact_id: str, timeout_s: float) -> urza_service_pb2.GetKernelResponse:
    request = urza_service_pb2.GetKernelRequest(artifact_id=artifact_id)
    found: urza_service_pb2.GetKernelResponse = call("urza", "GetKernel", request, timeout_s)
    return found
