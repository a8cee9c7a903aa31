# ruff: noqa: D102 - a test is named by the sentence that it proves
"""What the library promises of kernels at rest, as tests: rot is found, what is referred to stays, uploads go on.

Subclass, and give as fixtures an open ``database`` with the newest tables and nothing in them; ``place``, where the
bytes of kernels rest: ``database`` or a URL of ``fsspec``; ``rot``, which writes into a table past every rule of the
database; and ``texts_may_break``: can that database hold text that is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest
from sqlalchemy import select

from esper.contracts.blueprint import BlueprintState
from esper.contracts.errors import ConfigError, CorruptDataError, InvalidStateError, NotFoundError
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.services.urza.blobs import Blobs
from esper.services.urza.kernel_rows import KernelRecord
from esper.services.urza.models import FieldReportRow, KernelChunkRow, KernelRow, LooseBlobRow, UploadPieceRow
from esper.services.urza.retention import RetentionPolicy
from esper.services.urza.rules import BlueprintDraft, PageRequest
from esper.services.urza.store import StoreLimits, UrzaStore
from esper.services.urza.upload_store import PIECE_BYTES
from esper.testing.urza_contract import KernelStoreContract, content
from esper.testing.urza_samples import field_report, graph, kernel_bytes

KEY = SigningKey.generate()
DAY_US: Final = 24 * 3600 * 1_000_000
COLUMNS: Final = tuple(column.key for column in KernelRow.__table__.columns)
"""Every column of a kernel's row."""
FLIPS: Final = ((0, 0), (0.5, 2), (1, 1))
"""Share of the value's length at which a bit flips, and which bit of that byte; of an integer, the bit alone."""

Rot = Callable[[str, str, Any], Awaitable[None]]
"""Gives every row of a table (one, here) another value in a column: text as its bytes."""


@dataclass
class Clock:
    """A present that the test moves; in microseconds since 1970."""

    now_us: int = 1_800_000_000_000_000

    def __call__(self) -> int:
        """Give the present."""
        return self.now_us

    def pass_days(self, days: float) -> None:
        """Move on."""
        self.now_us += int(days * DAY_US)


def flipped(value: Any, share: float, bit: int) -> Any:
    """Give a value with one bit flipped; text comes back as bytes."""
    if isinstance(value, int):
        return value ^ (1 << bit)
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[int(share * (len(data) - 1))] ^= 1 << bit
    return bytes(data)


class _Suite:
    @pytest.fixture
    def clock(self) -> Clock:
        """Give the store's clock."""
        return Clock()

    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        """Give what sweeps let go of."""
        return RetentionPolicy(keep_unreferenced_days=90, keep_reported_days=30, keep_reports_days=200)

    @pytest.fixture
    async def store(self, database: Database, place: str, clock: Clock, policy: RetentionPolicy) -> UrzaStore:
        """Give a store that trusts one key."""
        blobs = None if place == "database" else Blobs(place)
        if blobs is not None:
            await blobs.prepare()
        return UrzaStore(database, key_ring=KEY.ring(), blobs=blobs, clock=clock, retention=policy)


class OutsideKernelStoreContract(KernelStoreContract):
    """The kernels' contract with their bytes outside the database; give ``place``."""

    @pytest.fixture
    async def store(self, database: Database, place: str) -> UrzaStore:
        """Give a store that trusts one key, with bytes outside."""
        from esper.testing.urza_contract import KEY

        blobs = Blobs(place)
        await blobs.prepare()
        return UrzaStore(database, key_ring=KEY.ring(), blobs=blobs)

    async def test_a_damaged_kernel_is_found_and_removed(self, database: Database, store: UrzaStore) -> None:
        from esper.testing.urza_contract import KEY

        payload = kernel_bytes(KEY, weight_floats=200_000)
        record, _ = await store.kernels.put(payload)
        copy_id = (await _row(database)).copy_id
        blobs = store.kernels._outside()
        for damaged in (payload[:300_000] + b"\xff" + payload[300_001:], payload[:-1], b""):
            await blobs.write(copy_id, damaged)
            with pytest.raises(CorruptDataError, match=r"piece \d does not; it was removed"):
                await content(store, record.artifact_id)
            with pytest.raises(NotFoundError, match="artifact_id must name a stored kernel"):
                await store.kernels.get(artifact_id=record.artifact_id)
            assert await blobs.read(copy_id, 0, 1) is None
            assert (await store.kernels.put(payload))[1]
            copy_id = (await _row(database)).copy_id

    async def test_nothing_of_the_bytes_is_in_the_database(self, database: Database, store: UrzaStore) -> None:
        from esper.testing.urza_contract import KEY

        await store.kernels.put(kernel_bytes(KEY))
        async with database.reading() as session:
            assert (await session.scalars(select(KernelChunkRow.index))).all() == []
            assert (await session.scalars(select(LooseBlobRow.copy_id))).all() == []

    async def test_a_removed_kernel_leaves_no_copy(self, database: Database, store: UrzaStore) -> None:
        from esper.testing.urza_contract import KEY

        record, _ = await store.kernels.put(kernel_bytes(KEY))
        copy_id = (await _row(database)).copy_id
        assert await store.kernels.remove(record.artifact_id)
        assert await store.kernels._outside().read(copy_id, 0, 1) is None
        async with database.reading() as session:
            assert (await session.scalars(select(LooseBlobRow.copy_id))).all() == []


class RotContract(_Suite):
    """One flipped bit anywhere is found by whoever meets it, and what it struck can be stored again."""

    @pytest.mark.parametrize("reader", ["get", "list", "open", "put"])
    @pytest.mark.parametrize("column", COLUMNS)
    async def test_a_flipped_bit_in_any_column_is_found(
        self, database: Database, store: UrzaStore, rot: Rot, column: str, reader: str
    ) -> None:
        payload = kernel_bytes(KEY, weight_floats=100_000)
        for share, bit in FLIPS:
            record, created = await store.kernels.put(payload)
            assert created
            value = getattr(await _row(database), column)
            if value == b"":
                value = b"\0"  # bytes where there were none
            await rot("urza_kernels", column, flipped(value, share, bit))
            if reader != "put":
                with pytest.raises(CorruptDataError, match="must match the digest of what is said of it"):
                    await self._read(store, reader, record, column)
                assert (await store.kernels.list(PageRequest())).items == ()
            again, created = await store.kernels.put(payload)
            assert (created, again.artifact_id) == (True, record.artifact_id)
            assert await content(store, record.artifact_id) == payload
            assert await store.kernels.remove(record.artifact_id)

    @pytest.mark.parametrize("column", ["artifact_id", "content_key", "blueprint_id", "key_id", "copy_id", "use_key"])
    async def test_text_that_is_no_text_any_more_is_found(
        self, database: Database, store: UrzaStore, rot: Rot, texts_may_break: bool, column: str
    ) -> None:
        if not texts_may_break:
            pytest.skip("this database takes no such text")
        payload = kernel_bytes(KEY)
        record, _ = await store.kernels.put(payload)
        await rot("urza_kernels", column, flipped(getattr(await _row(database), column), 0.5, 7))
        with pytest.raises(CorruptDataError, match="must match the digest of what is said of it"):
            await store.kernels.list(PageRequest())
        assert (await store.kernels.list(PageRequest())).items == ()
        assert (await store.kernels.put(payload))[1]
        assert await content(store, record.artifact_id) == payload

    @pytest.mark.parametrize("column", ["artifact_id", "chunk_index", "data", "crc32"])
    async def test_a_flipped_bit_in_any_column_of_a_piece_is_found(
        self, database: Database, store: UrzaStore, place: str, rot: Rot, column: str
    ) -> None:
        if place != "database":
            pytest.skip("pieces rest outside")
        payload = kernel_bytes(KEY)
        for share, bit in FLIPS:
            record, created = await store.kernels.put(payload)
            assert created
            async with database.reading() as session:
                chunk = (await session.scalars(select(KernelChunkRow))).one()
            value = chunk.index if column == "chunk_index" else getattr(chunk, column)
            await rot("urza_kernel_chunks", column, flipped(value, share, bit))
            with pytest.raises(CorruptDataError, match="piece 0 does not; it was removed"):
                await content(store, record.artifact_id)
            assert (await store.kernels.put(payload))[1]
            assert await content(store, record.artifact_id) == payload
            await store.kernels.remove(record.artifact_id)
            await store.retention.sweep()
            async with database.reading() as session:
                assert (await session.scalars(select(KernelChunkRow.index))).all() == []

    async def test_one_damaged_kernel_among_sound_ones_is_removed_alone(self, store: UrzaStore, rot: Rot) -> None:
        lost, _ = await store.kernels.put(kernel_bytes(KEY, 0))
        await rot("urza_kernels", "manifest", flipped(lost.manifest, 0.5, 3))
        sound, _ = await store.kernels.put(kernel_bytes(KEY, 1))
        with pytest.raises(CorruptDataError, match=f"kernel '{lost.artifact_id}' must match"):
            await store.kernels.list(PageRequest())
        assert (await store.kernels.list(PageRequest())).items == (sound,)

    async def test_a_kernel_that_took_the_place_of_a_damaged_one_stays(
        self, database: Database, store: UrzaStore
    ) -> None:
        payload = kernel_bytes(KEY, weight_floats=200_000)
        record, _ = await store.kernels.put(payload)
        stale = await _row(database)
        await store.kernels.remove(record.artifact_id)
        newer, created = await store.kernels.put(payload)
        assert (newer, created) == (record, True)  # even the moment is the same
        assert not await store.kernels.remove_copy(stale)
        assert await content(store, record.artifact_id) == payload

    async def test_a_kernel_replaced_while_it_is_read_is_neither_mixed_nor_removed(self, store: UrzaStore) -> None:
        payload = kernel_bytes(KEY, weight_floats=1_300_000)  # three reads: one that was sent, one ahead, one more
        record, _ = await store.kernels.put(payload)
        _, chunks = await store.kernels.open(record.artifact_id)
        got = [(await anext(chunks)).data]

        async def rest() -> None:
            got.extend([chunk.data async for chunk in chunks])

        await store.kernels.remove(record.artifact_id)
        await store.kernels.put(payload)
        with pytest.raises(NotFoundError, match="was removed or replaced while it was read"):
            await rest()
        assert payload.startswith(b"".join(got))
        assert len(b"".join(got)) < len(payload)
        assert await content(store, record.artifact_id) == payload

    async def _read(self, store: UrzaStore, reader: str, record: KernelRecord, column: str) -> None:
        if reader == "list":
            await store.kernels.list(PageRequest())
        elif column == "artifact_id":  # nobody can ask for it by its id any more
            with pytest.raises(NotFoundError):
                await store.kernels.get(artifact_id=record.artifact_id)
            await store.kernels.get(content_key=record.content_key)
        elif reader == "open":
            await store.kernels.open(record.artifact_id)
        else:
            await store.kernels.get(artifact_id=record.artifact_id)


class RetentionContract(_Suite):
    """What is referred to stays, everything else goes in its time."""

    async def test_only_what_nobody_refers_to_goes_with_age(self, store: UrzaStore, clock: Clock) -> None:
        await _active(store, 0)
        older = await _kernel(store, clock, 0, blueprint=0)
        newest = await _kernel(store, clock, 1, blueprint=0)
        stranger = await _kernel(store, clock, 2, blueprint=1)
        pinned = await _kernel(store, clock, 3, blueprint=1)
        reported = await _kernel(store, clock, 4, blueprint=1)
        assert await store.kernels.pin(pinned, actor="ann", reason="a baseline")
        clock.pass_days(80)
        await _report(store, "r1", reported)
        assert (await store.retention.sweep()).kernel_ids == ()
        clock.pass_days(11)
        young = await _kernel(store, clock, 5, blueprint=1)
        foreseen = await store.retention.preview()
        swept = await store.retention.sweep()
        assert swept.kernel_ids == foreseen.kernel_ids == (older, stranger)
        assert (swept.kernel_bytes, swept.held_bytes) == (foreseen.kernel_bytes, foreseen.held_bytes)
        assert await _kept(store) == {newest, pinned, reported, young}
        assert swept.held_bytes == sum(
            [(await store.kernels.get(artifact_id=one)).size_bytes for one in (newest, pinned, reported, young)]
        )

    async def test_a_blueprint_that_is_active_no_longer_frees_its_kernels(self, store: UrzaStore, clock: Clock) -> None:
        blueprint_id = await _active(store, 0)
        kernel = await _kernel(store, clock, 0, blueprint=0)
        clock.pass_days(91)
        assert (await store.retention.sweep()).kernel_ids == ()
        await store.blueprints.set_state(blueprint_id, BlueprintState.DEPRECATED, actor="ann", reason="slow")
        assert (await store.retention.sweep()).kernel_ids == (kernel,)

    async def test_a_report_keeps_its_kernel_for_its_time(self, store: UrzaStore, clock: Clock) -> None:
        kernel = await _kernel(store, clock, 0)
        clock.pass_days(70)
        await _report(store, "r1", kernel)
        clock.pass_days(29)
        assert (await store.retention.sweep()).kernel_ids == ()
        clock.pass_days(2)
        assert (await store.retention.sweep()).kernel_ids == (kernel,)

    async def test_a_pin_outlives_its_kernel_until_it_is_taken_off(self, store: UrzaStore, clock: Clock) -> None:
        kernel = await _kernel(store, clock, 0)
        assert await store.kernels.pin(kernel, actor="ann", reason="")
        assert not await store.kernels.pin(kernel, actor="bob", reason="")
        await store.kernels.remove(kernel)
        with pytest.raises(NotFoundError, match="artifact_id must name a stored kernel"):
            await store.kernels.pin(kernel, actor="ann", reason="")
        await _kernel(store, clock, 0)
        clock.pass_days(1_000)
        assert (await store.retention.sweep()).kernel_ids == ()
        assert await store.kernels.unpin(kernel, actor="ann", reason="")
        assert not await store.kernels.unpin(kernel, actor="ann", reason="")
        assert (await store.retention.sweep()).kernel_ids == (kernel,)

    async def test_beyond_the_bytes_the_oldest_go_first(
        self, database: Database, store: UrzaStore, clock: Clock
    ) -> None:
        kernels = [await _kernel(store, clock, number) for number in range(20)]
        await store.kernels.pin(kernels[1], actor="ann", reason="")
        sizes = [(await store.kernels.get(artifact_id=kernel)).size_bytes for kernel in kernels]
        bounded = RetentionPolicy(keep_unreferenced_days=0, max_bytes=sum(sizes[18:]) + sizes[1])
        tight = UrzaStore(database, key_ring=KEY.ring(), retention=bounded, clock=clock, blobs=store.kernels._blobs)
        assert (await tight.retention.sweep()).kernel_ids == ()  # all of them are young
        clock.pass_days(2)
        foreseen = await tight.retention.preview()
        assert await _kept(store) == set(kernels)
        swept = await tight.retention.sweep()
        assert swept.kernel_ids == foreseen.kernel_ids == (kernels[0], *kernels[2:18])
        assert swept.held_bytes == foreseen.held_bytes == bounded.max_bytes
        clock.pass_days(10_000)
        assert (await tight.retention.sweep()).kernel_ids == ()

    async def test_details_of_old_reports_go_and_their_count_stays(
        self, database: Database, store: UrzaStore, clock: Clock
    ) -> None:
        blueprint_id = "0" * 64
        old = field_report("old", blueprint_id=blueprint_id, estimate=0.5)
        await store.reports.record(old)
        clock.pass_days(150)
        await store.reports.record(field_report("new", blueprint_id=blueprint_id, estimate=0.25))
        before = await store.reports.statistics(blueprint_id)
        assert (await store.retention.sweep()).reports == 0
        clock.pass_days(51)
        assert (await store.retention.sweep()).reports == 1
        assert (await store.retention.sweep()).reports == 0
        async with database.reading() as session:
            rows = (await session.scalars(select(FieldReportRow).order_by(FieldReportRow.report_id))).all()
        assert [(row.report_id, bool(row.report)) for row in rows] == [("new", True), ("old", False)]
        assert not (await store.reports.record(old)).recorded
        assert await store.reports.statistics(blueprint_id) == before

    async def test_uploads_that_never_went_on_are_dropped(
        self, database: Database, store: UrzaStore, clock: Clock
    ) -> None:
        payload = b"x" * (3 * PIECE_BYTES)
        digest = hashlib.sha256(payload).digest()
        assert await store.uploads.keep(digest, len(payload), 0, payload[:PIECE_BYTES])
        clock.pass_days(0.9)
        assert await store.uploads.keep(digest, len(payload), PIECE_BYTES, payload[:PIECE_BYTES])
        clock.pass_days(0.9)
        assert (await store.retention.sweep()).uploads == 0
        assert await store.uploads.held_bytes(digest, len(payload)) == 2 * PIECE_BYTES
        clock.pass_days(0.2)
        assert (await store.retention.sweep()).uploads == 1
        async with database.reading() as session:
            assert (await session.scalars(select(UploadPieceRow.index))).all() == []

    async def test_copies_that_a_killed_writer_left_are_deleted(
        self, database: Database, store: UrzaStore, place: str, clock: Clock
    ) -> None:
        if place == "database":
            pytest.skip("nothing rests outside")
        blobs = store.kernels._outside()
        async with database.session() as session:
            session.add(LooseBlobRow(copy_id="a" * 32, loose_since_us=clock()))
        await blobs.write("a" * 32, b"half of a ker")
        kernel = await _kernel(store, clock, 0)
        assert (await store.retention.sweep()).blobs == 0
        clock.pass_days(0.1)
        assert (await store.retention.sweep()).blobs == 1
        assert await blobs.read("a" * 32, 0, 1) is None
        assert await content(store, kernel) == kernel_bytes(KEY, 0, blueprint=7)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"keep_unreferenced_days": -1}, "keep_unreferenced_days must be >= 0, got -1"),
            ({"max_bytes": -1}, "max_bytes must be >= 0, got -1"),
            ({"keep_reports_days": float("nan")}, "keep_reports_days must be >= 0 days, got nan"),
            ({"keep_uploads_days": 0}, "keep_uploads_days must be > 0 days, got 0"),
            ({"keep_reports_days": 5}, r"keep_reported_days must be at most keep_reports_days \(5\), got 30"),
        ],
    )
    def test_a_policy_that_breaks_a_rule_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RetentionPolicy(**changes)


class UploadStoreContract(_Suite):
    """Pieces of uploads that are not complete."""

    async def test_pieces_are_kept_in_order_and_without_gaps(self, store: UrzaStore) -> None:
        digest, size = b"d" * 32, 3 * PIECE_BYTES + 5
        pieces = [bytes([number]) * PIECE_BYTES for number in range(3)]
        assert not await store.uploads.keep(digest, size, PIECE_BYTES, pieces[1])
        for number, piece in enumerate(pieces):
            assert await store.uploads.keep(digest, size, number * PIECE_BYTES, piece)
            assert await store.uploads.held_bytes(digest, size) == (number + 1) * PIECE_BYTES
        assert not await store.uploads.keep(digest, size, PIECE_BYTES, pieces[1])
        kept = [chunk async for chunk in store.uploads.pieces(digest, size, 2 * PIECE_BYTES)]
        assert [(chunk.offset, chunk.data) for chunk in kept] == [(0, pieces[0]), (PIECE_BYTES, pieces[1])]
        assert await store.uploads.held_bytes(digest, size + 1) == 0
        assert await store.uploads.keep(digest, size, 0, pieces[0])  # begun anew
        assert await store.uploads.held_bytes(digest, size) == PIECE_BYTES

    @pytest.mark.parametrize("until", [1, PIECE_BYTES - 1, 2 * PIECE_BYTES])
    async def test_an_upload_goes_on_only_where_pieces_are(self, store: UrzaStore, until: int) -> None:
        await store.uploads.keep(b"d" * 32, 3 * PIECE_BYTES, 0, bytes(PIECE_BYTES))
        with pytest.raises(InvalidStateError, match="offset must be a multiple of 1048576 and at most 1048576"):
            await anext(aiter(store.uploads.pieces(b"d" * 32, 3 * PIECE_BYTES, until)))

    async def test_a_damaged_piece_is_found_and_the_upload_begins_anew(self, store: UrzaStore, rot: Rot) -> None:
        await store.uploads.keep(b"d" * 32, 3 * PIECE_BYTES, 0, bytes(PIECE_BYTES))
        await rot("urza_upload_pieces", "data", flipped(bytes(PIECE_BYTES), 0.5, 3))
        with pytest.raises(InvalidStateError, match="piece 0 does not; all were dropped, begin anew"):
            await anext(aiter(store.uploads.pieces(b"d" * 32, 3 * PIECE_BYTES, PIECE_BYTES)))
        assert await store.uploads.held_bytes(b"d" * 32, 3 * PIECE_BYTES) == 0

    async def test_beyond_the_bound_nothing_more_is_kept(self, database: Database) -> None:
        bounded = UrzaStore(database, limits=StoreLimits(max_upload_bytes=2 * PIECE_BYTES))
        await bounded.migrate()
        size = 4 * PIECE_BYTES
        assert await bounded.uploads.keep(b"a" * 32, size, 0, bytes(PIECE_BYTES))
        assert await bounded.uploads.keep(b"b" * 32, size, 0, bytes(PIECE_BYTES))
        assert not await bounded.uploads.keep(b"a" * 32, size, PIECE_BYTES, bytes(PIECE_BYTES))
        await bounded.uploads.drop(b"b" * 32)
        assert await bounded.uploads.keep(b"a" * 32, size, PIECE_BYTES, bytes(PIECE_BYTES))


async def _row(database: Database) -> KernelRow:
    """Give the only kernel's row as it is now."""
    async with database.reading() as session:
        return (await session.scalars(select(KernelRow))).one()


async def _active(store: UrzaStore, number: int) -> str:
    draft = BlueprintDraft(name=f"blueprint-{number}", ir=graph(number), state=BlueprintState.ACTIVE)
    return (await store.blueprints.create(draft))[0].id


async def _kernel(store: UrzaStore, clock: Clock, number: int, *, blueprint: int = 7) -> str:
    clock.now_us += 1
    record, created = await store.kernels.put(kernel_bytes(KEY, number, blueprint=blueprint))
    assert created
    return record.artifact_id


async def _report(store: UrzaStore, report_id: str, artifact_id: str) -> None:
    assert (await store.reports.record(replace(field_report(report_id), artifact_id=artifact_id))).recorded


async def _kept(store: UrzaStore) -> set[str]:
    return {record.artifact_id for record in (await store.kernels.list(PageRequest(size=500))).items}
