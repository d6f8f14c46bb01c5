"""One partition of a stage topic during one assignment: what of it is open, under way and done, and what is kept.

Pure of Kafka and of the clock: `streams/stage.py` reads for it, and writes what it keeps.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from connectors.contract import NotOwned
from routing.batches import Boundaries
from schemas.ids import Tag, Vendor
from schemas.staged import BatchRecord, CursorRecord, pack_offsets, read_place, unpack_offsets
from schemas.topics import Topics
from streams.batch import Record, StagedBatch
from streams.cursor import Kept

BatchKey: TypeAlias = tuple[bytes, int]  # its destination, its first offset


class Gathering(Struct, gc=False):
    """An open batch. Its records are kept while there is room for them; else they are read again once it is whole."""

    records: list[Record] | None
    size: int
    skip: list[int]
    digest: Any


class Way(Struct, gc=False):
    """How far one destination has come in one partition.

    `seen`: by log, each offset there that a record of this destination was read from, and that record's own offset.
    `floors`: by log, below which everything has been seen, as its cursor says.
    """

    last: int
    floors: dict[str, int]
    seen: dict[str, dict[int, int]]
    closed: deque["ClosedBatch"]  # in the order of the log, until what is before them is done


class ClosedBatch(Struct, gc=False):
    batch: StagedBatch
    floors: dict[str, int]  # as they were known when it was closed
    done: bool = False


class Reader(Protocol):
    """What a slot asks of the reader around it."""

    topics: Topics

    def manifest(self, slot: "Slot", message: Any) -> None:
        """A manifest came by before its time, which is now."""
        ...

    def changed(self) -> None:
        """There is something to be kept."""
        ...

    async def written(self) -> bool:
        """Writes it at once; False where it was refused."""
        ...

    async def read_range(self, topic: str, batch: StagedBatch) -> list[Record]: ...


class Slot:
    """One partition of a stage topic during one assignment; the source of its batches' flights."""

    def __init__(self, stage: Reader, topic: str, partition: int, vendor: Vendor) -> None:
        self._stage = stage
        self.topic = topic
        self.partition = partition
        self.vendor = vendor
        self.cursor_topic = stage.topics.stage_cursor(vendor, Tag(topic.rpartition(".")[2]))
        self.log = ""  # set once loaded
        self.gone = False
        self.ready = False
        self.position = -1
        self.committed = -1
        self.floors: dict[str, int] = {}  # as the log has told in this assignment
        self.ways: dict[bytes, Way] = {}
        self.gathering: dict[bytes, Gathering] = {}
        self.boundaries: Boundaries[bytes] = Boundaries({})
        self.batches: dict[BatchKey, BatchRecord] = {}
        self.items: dict[int, StagedBatch | None] = {}  # what holds up the commit, by its offset
        self.active: dict[BatchKey, StagedBatch] = {}
        self.early: dict[BatchKey, Any] = {}  # manifests that came by before their batch was settled here
        self.dirty: set[bytes] = set()
        self.dirty_batches: set[BatchKey] = set()
        self.ticked_at = 0.0
        self.behind = True  # the end of the partition is not reached: others bring the time

    def take_over(self, kept: Kept, name: str) -> None:
        self.log = name
        for of, cursor in kept.cursors.items():
            if cursor.log != name:  # the topic was made anew under its name
                continue
            floors = {place: floor for place, (floor, _) in cursor.seen.items()}
            seen = {place: dict.fromkeys(unpack_offsets(packed), -1) for place, (_, packed) in cursor.seen.items()}
            self.ways[of] = Way(cursor.last, floors, seen, deque())
        self.batches = {key: batch for key, batch in kept.batches.items() if batch.log == name}
        self.dirty_batches = set(kept.batches) - set(self.batches)
        self.boundaries = Boundaries({of: way.last for of, way in self.ways.items()})
        self.ready = True

    def way(self, of: bytes) -> Way:
        found = self.ways.get(of)
        if found is None:
            found = self.ways[of] = Way(-1, {}, {}, deque())
        return found

    def learn(self, place: bytes) -> tuple[str, int] | None:
        """What a record says of the log that it came from; its place there."""
        try:
            name, offset, floor = read_place(place)
        except ValueError:
            return None
        if floor > self.floors.get(name, 0):
            self.floors[name] = floor
        return name, offset

    def is_first(self, way: Way, place: bytes, at: int) -> bool:
        """Whether a record is the first that was staged from its place. What a crash has read again is not."""
        found = self.learn(place)
        if found is None:
            return True
        name, offset = found
        seen = way.seen.setdefault(name, {})
        if offset < self.floors.get(name, 0) or offset < way.floors.get(name, 0) or offset in seen:
            return False
        seen[offset] = at
        return True

    # ---------------------------------------------------------------- what batches ask of it

    def settled(self, offsets: Sequence[int]) -> None:
        """A `Source`: batches, and records that were ended by themselves."""
        if self.gone:
            return
        for offset in offsets:
            batch = self.items.pop(offset, None)
            if batch is not None:
                self._done(batch)
                early = self.early.pop((batch.of, batch.span.first), None)
                if early is not None:
                    del self.items[early.offset()]
                    self._stage.manifest(self, early)
        self._stage.changed()

    def _done(self, batch: StagedBatch) -> None:
        key = batch.of, batch.span.first
        if self.active.get(key) is batch:
            del self.active[key]
        flying = batch.flying
        ended = batch if flying is None or flying.batch is None else flying.batch
        again = flying is not None and flying.end == "again"
        if again:
            self._keep(batch, ended, ended.turn + 1)
        way = self.way(batch.of)
        for closed in way.closed:
            if closed.batch is batch:
                closed.done = True
                break
        self.pass_by(way)
        if again:
            return
        if batch.span.last > way.last:  # not forgotten before that: whoever begins at the cursor forms it again
            self._keep(batch, ended, ended.turn, over=True)
        elif self.batches.pop(key, None) is not None:
            self.dirty_batches.add(key)

    def pass_by(self, way: Way) -> None:
        """The cursor goes on over all batches that are done."""
        while way.closed and way.closed[0].done:
            closed = way.closed.popleft()
            of, span = closed.batch.of, closed.batch.span
            way.last = span.last
            way.floors = closed.floors
            for place, floor in closed.floors.items():
                seen = way.seen.get(place)
                if seen is not None:
                    way.seen[place] = {offset: at for offset, at in seen.items() if offset >= floor}
            self.dirty.add(of)
            known = self.batches.get((of, span.first))
            if known is not None and known.over:
                del self.batches[of, span.first]
                self.dirty_batches.add((of, span.first))

    def _keep(self, batch: StagedBatch, ended: StagedBatch, turn: int, *, over: bool = False) -> None:
        """`ended`: whose end was this batch's. It may be of an earlier assignment, and know less of what was noted."""
        key = batch.of, batch.span.first
        known = self.batches.get(key)
        record = self._record(batch, turn)
        self.batches[key] = replace(
            record,
            unsure=batch.unsure or ended.unsure,
            noted=record.noted if known is None else known.noted,
            over=over,
        )
        self.dirty_batches.add(key)

    def _record(self, batch: StagedBatch, turn: int) -> BatchRecord:
        return BatchRecord(batch.span.last, batch.count, self.log, turn, batch.unsure, tuple(batch.skip), batch.noted)

    async def note(self, batch: StagedBatch, noted: bytes) -> None:
        key = batch.of, batch.span.first
        if not self.gone:
            self.batches[key] = replace(self._record(batch, batch.turn), noted=noted)
            self.dirty_batches.add(key)
        written = False
        while not written and not self.gone:
            written = await self._stage.written()
        if self.gone:  # then nothing of it was in what has been written since
            raise NotOwned

    async def read_again(self, batch: StagedBatch) -> list[Record]:
        return await self._stage.read_range(self.topic, batch)

    # ---------------------------------------------------------------- what is kept

    def cursor(self, of: bytes) -> CursorRecord:
        way = self.ways[of]
        seen: dict[str, tuple[int, str]] = {}
        for place, offsets in way.seen.items():
            floor = way.floors.get(place, 0)
            before = [offset for offset, at in offsets.items() if at <= way.last and offset >= floor]
            if before or floor:
                seen[place] = (floor, pack_offsets(before))
        return CursorRecord(way.last, self.log, seen)

    def committable(self) -> int:
        """The offset below which nothing is needed any more."""
        return min(min(self.items, default=self.position), self.boundaries.oldest(self.position))
