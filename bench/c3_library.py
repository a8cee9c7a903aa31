"""C3: the library through gRPC against the same questions in SQL by hand, and its kernels against a bare gRPC stream.

    put, get, search, lineage   one call, over the SQL by hand on the same database plus one bare unary `grpc.aio` call
                                that carries the same messages
    flat                        the same call to a large library over a small one, in turn
    transfer                    bytes per second of one kernel over those of a bare stream of the same chunks
    flushed                     the same of a bare stream whose bytes go to disk: what is left for an upload at most

The library and the bare server share a process of their own; the client and the SQL by hand are in this one.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, Final

from bench.bare_grpc import BareClient
from bench.library_questions import CALLS, SEARCHES, Library, Question, create_request
from bench.library_rows import Shelf
from bench.library_server import served
from bench.library_sql import PostgresSql, SqliteSql, fill_library, postgres_server
from bench.loops import Loop
from bench.paired import PairedTimes, spread, time_pair
from bench.report import Figure, Result, at_least, at_most
from esper.contracts.chunks import DOWNLOAD_CHUNK_BYTES, MAX_CHUNK_BYTES, Chunk, split
from esper.contracts.wire import to_message
from esper.execution.keys import SigningKey
from esper.execution.tier_urza import UrzaTier, upload_kernel
from esper.mesh import open_channel
from esper.testing.urza_samples import field_report, kernel_bytes
from esper.v1 import telemetry_pb2
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

SEARCH_GOAL: Final = at_most(1.5)
FLAT_GOAL: Final = at_most(1.5)
TRANSFER_GOAL: Final = at_least(0.5)
DIALECTS: Final = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}

_WARMUP: Final = 3

MakeUrl = Callable[[str], str]
"""Makes a database of a name and says where it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much is measured."""

    size: int
    """Blueprints of the library that is held against SQL by hand."""
    flat_sizes: tuple[int, int]
    """Blueprints of the small and of the large library."""
    seconds: float
    """Time for each pairing."""
    num_puts: int
    """Rounds of puts."""
    kernel_floats: int
    """Weights of a kernel that is sent."""
    num_kernels: int
    """Rounds of uploads."""


FULL: Final = Extent(
    size=100_000,
    flat_sizes=(10_000, 1_000_000),
    seconds=3.0,
    num_puts=300,
    kernel_floats=1_000_000,
    num_kernels=30,
)
QUICK: Final = Extent(
    size=5_000, flat_sizes=(1_000, 5_000), seconds=0.3, num_puts=30, kernel_floats=1_000_000, num_kernels=5
)


def measure(*, quick: bool) -> Result:
    """Measure on SQLite and PostgreSQL: 100,000 blueprints and up to a million, or 5,000.

    Raises:
        UnavailableError: The package that brings PostgreSQL is not installed.
    """
    extent = QUICK if quick else FULL
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as directory, postgres_server() as make_postgres:
        for dialect in DIALECTS:
            make = make_postgres if dialect == "postgresql" else _sqlite_in(Path(directory))
            figures += dialect_figures(dialect, make, Path(directory) / dialect, extent)
    return Result(name="c3_library", figures=tuple(figures), notes=_NOTES)


def dialect_figures(dialect: str, make_url: MakeUrl, keys_dir: Path, extent: Extent) -> list[Figure]:
    """Give every figure on one database."""
    sizes = sorted({extent.size, *extent.flat_sizes})
    with Loop() as loop, opened(loop, dialect, make_url, keys_dir, sizes) as (libraries, bare):
        small, large = (libraries[size] for size in extent.flat_sizes)
        figures = call_figures(loop, libraries[extent.size], bare, extent)
        figures += flat_figures(loop, small, large, extent)
        figures += transfer_figures(loop, libraries[extent.size], bare, extent)
        return [*figures, flushed_figure(loop, dialect, bare, keys_dir / "flushed", extent)]


@contextmanager
def opened(
    loop: Loop, dialect: str, make_url: MakeUrl, keys_dir: Path, sizes: list[int]
) -> Iterator[tuple[dict[int, Library], BareClient]]:
    """Serve a filled library of each size; gives them, and a client of the bare server."""
    key = SigningKey.generate()
    keys_dir.mkdir()
    key.write_public(keys_dir)
    urls = [make_url(f"library_{size}") for size in sizes]
    with ExitStack() as leaving:
        *addresses, bare_address = leaving.enter_context(served(urls, keys_dir))
        libraries: dict[int, Library] = {}
        for size, url, address in zip(sizes, urls, addresses, strict=True):
            channel = loop.wait(_opened(open_channel, address))
            leaving.callback(_closing, loop, channel.close)
            library = loop.wait(_filled(dialect, url, UrzaServiceStub(channel), key, size))
            leaving.callback(_closing, loop, library.hand.close)
            libraries[size] = library
        bare = loop.wait(_opened(BareClient, bare_address))
        leaving.callback(_closing, loop, bare.close)
        yield libraries, bare


def call_figures(loop: Loop, library: Library, bare: BareClient, extent: Extent) -> list[Figure]:
    """Give the ratio of every call to SQL by hand and a bare call, and its time."""
    where = DIALECTS[library.hand.dialect]
    figures: list[Figure] = []
    for name in CALLS:
        times = loop_pair(loop, library, bare, name, extent)
        ours_ms = [took_ns / 1e6 for took_ns in times.ours_ns]
        figures += [
            Figure(
                name=f"{name}, {where}, over SQL by hand and a bare call",
                value=times.ratio,
                unit="ratio",
                goal=SEARCH_GOAL if name in SEARCHES else None,
                spread=times.spread,
                certain=times.certain,
            ),
            Figure(name=f"{name}, {where}", value=statistics.median(ours_ms), unit="ms", spread=spread(ours_ms)),
        ]
    return figures


def loop_pair(loop: Loop, library: Library, bare: BareClient, name: str, extent: Extent) -> PairedTimes:
    """Time one call of the library against SQL by hand and a bare call."""
    num_puts = extent.num_puts + _WARMUP
    ours = library.question(name, num_puts)
    by_hand = loop.wait(library.question_by_hand(name, num_puts))
    request, method = library.request(name), CALLS[name]
    loop.wait(bare.hold(method, loop.wait(getattr(library.stub, method)(request))))

    async def reference() -> None:
        await by_hand()
        await bare.call(method, request)

    return _timed(loop, name, ours, reference, extent)


def flat_figures(loop: Loop, small: Library, large: Library, extent: Extent) -> list[Figure]:
    """Give the ratio of every call to the large library over the same to the small one."""
    where = DIALECTS[small.hand.dialect]
    num_puts = extent.num_puts + _WARMUP
    figures: list[Figure] = []
    for name in CALLS:
        ours, reference = (library.question(name, num_puts) for library in (large, small))
        times = _timed(loop, name, ours, reference, extent)
        figures.append(
            Figure(
                name=f"{name}, {where}, {large.shelf.size:,} blueprints over {small.shelf.size:,}",
                value=times.ratio,
                unit="ratio",
                goal=FLAT_GOAL,
                spread=times.spread,
                certain=times.certain,
            )
        )
    return figures


def transfer_figures(loop: Loop, library: Library, bare: BareClient, extent: Extent) -> list[Figure]:
    """Give bytes per second up and down, over those of bare streams of the same chunks."""
    where = DIALECTS[library.hand.dialect]
    payloads = [
        kernel_bytes(library.key, number, weight_floats=extent.kernel_floats)
        for number in range(extent.num_kernels + _WARMUP)
    ]
    fresh = iter(payloads)
    sent = [_request(chunk) for chunk in split(payloads[0], chunk_bytes=MAX_CHUNK_BYTES)]
    up = time_pair(
        loop.calling(lambda: upload_kernel(library.stub, next(fresh))),
        loop.calling(lambda: bare.upload(sent)),
        seconds=0.0,
        min_rounds=extent.num_kernels,
        warmup=_WARMUP,
    )
    artifact_id, _ = loop.wait(upload_kernel(library.stub, payloads[0]))
    kept = [_request(chunk) for chunk in split(payloads[0], chunk_bytes=DOWNLOAD_CHUNK_BYTES)]
    loop.wait(bare.upload(kept))
    tier = UrzaTier(library.stub)
    down = time_pair(
        loop.calling(lambda: tier.read(artifact_id)), loop.calling(bare.download), seconds=extent.seconds * 2
    )
    size = len(payloads[0])
    return [*_transfer("download", where, down, size), *_transfer("upload", where, up, size)]


def flushed_figure(loop: Loop, dialect: str, bare: BareClient, path: Path, extent: Extent) -> Figure:
    """Give the rate of a bare upload whose bytes are then flushed into one file: no store that keeps them has more."""
    payload = random.Random(0).randbytes(4 * extent.kernel_floats)
    sent = [_request(chunk) for chunk in split(payload, chunk_bytes=MAX_CHUNK_BYTES)]

    async def flushed() -> None:
        await bare.upload(sent)
        with path.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())

    times = time_pair(
        loop.calling(flushed), loop.calling(lambda: bare.upload(sent)), seconds=0.0, min_rounds=extent.num_kernels
    )
    turned = PairedTimes(ours_ns=times.reference_ns, reference_ns=times.ours_ns)
    return Figure(
        name=f"bare upload and one file flushed, beside {DIALECTS[dialect]}, rate over a bare stream's",
        value=turned.ratio,
        unit="ratio",
        spread=turned.spread,
        certain=turned.certain,
    )


def _transfer(name: str, where: str, times: PairedTimes, size_bytes: int) -> list[Figure]:
    turned = PairedTimes(ours_ns=times.reference_ns, reference_ns=times.ours_ns)
    rates = [size_bytes / 2**20 / (took_ns / 1e9) for took_ns in times.ours_ns]
    return [
        Figure(
            name=f"kernel {name}, {where}, rate over a bare stream's",
            value=turned.ratio,
            unit="ratio",
            goal=TRANSFER_GOAL,
            spread=turned.spread,
            certain=turned.certain,
        ),
        Figure(name=f"kernel {name}, {where}", value=statistics.median(rates), unit="MiB/s", spread=spread(rates)),
    ]


def _timed(loop: Loop, name: str, ours: Question, reference: Question, extent: Extent) -> PairedTimes:
    calls = loop.calling(ours), loop.calling(reference)
    if name == "put":
        return time_pair(*calls, seconds=0.0, min_rounds=extent.num_puts, warmup=_WARMUP)
    return time_pair(*calls, seconds=extent.seconds, warmup=_WARMUP)


async def _filled(dialect: str, url: str, stub: Any, key: SigningKey, size: int) -> Library:
    """Have the library store two blueprints and a report by its API, and fill up by rows like theirs."""
    shelf = Shelf(size=size)
    for number in (size, size + 1):
        sample = await stub.CreateBlueprint(create_request(shelf, number))
    sample_id = sample.blueprint.id
    report = field_report("sample", blueprint_id=sample_id, estimate=0.5)
    message = to_message(report, telemetry_pb2.FieldReport)
    await stub.RecordFieldReport(pb.RecordFieldReportRequest(report=message))
    hand = SqliteSql(Path(url.removeprefix("sqlite:///"))) if dialect == "sqlite" else await PostgresSql.connect(url)
    await fill_library(hand, shelf, sample_id)
    return Library(
        shelf=shelf,
        stub=stub,
        hand=hand,
        sample_id=sample_id,
        key=key,
        fresh=count(size + 2),
        drawn=random.Random(0),
    )


def _closing(loop: Loop, close: Callable[[], Awaitable[Any]]) -> None:
    loop.wait(close())


async def _opened(make: Callable[[str], Any], address: str) -> Any:
    """Make something that belongs to the running loop."""
    return make(address)


def _sqlite_in(directory: Path) -> MakeUrl:
    return lambda name: f"sqlite:///{directory / name}.db"


def _request(chunk: Chunk) -> pb.UploadKernelRequest:
    return pb.UploadKernelRequest(**{field.name: getattr(chunk, field.name) for field in fields(chunk)})


_NOTES: Final = (
    "SQL by hand goes through sqlite3 and asyncpg, with the settings under which the library keeps its data; searches "
    "are written two ways (from the tag, along the names), and the faster one is the reference. The bare call takes "
    "the library's request and gives its answer, both parsed.",
    "Libraries are filled by rows like those that their API writes, and PostgreSQL has gathered statistics (VACUUM "
    "ANALYZE). Every twenty versions make a name and a line of descent: lineage gives nine or ten relatives.",
    "The rare tag is on 40 blueprints and the expression holds for about 100, in a library of any size; the common tag "
    "is on half. Pages hold 50.",
    "A kernel has 4 MB; an upload is verified and flushed to disk, which the bare stream is not: what one flush alone "
    "leaves of the bare rate is the last figure. A download is checked piece by piece and as a whole.",
)
