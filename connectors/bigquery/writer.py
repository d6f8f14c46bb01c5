"""Exactly once: what of a batch is in which table, through failures, crashes and owners that took over.

Rows go to streams in COMMITTED mode at explicit offsets, and a stream that was ended says how many rows it holds. So
this is kept (`Batch.note`) before the first row of a batch is sent: for each table the stream and how many rows it held
before. Whoever delivers the batch again ends those streams first, which also stops an owner that stalled and still
writes; what they hold beyond is the beginning of what was sent, in order; the rest goes to new streams, noted first.
A row that was refused is noted before the others are sent again, since the order of rows is the meaning of an offset.

A stream stays open from batch to batch, as BigQuery counts the streams that are made (10,000 an hour for a project); a
batch that did not end well leaves its streams.
"""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from config.settings import BigQuerySettings
from connectors.bigquery import encode
from connectors.bigquery.classify import Fault, refused
from connectors.bigquery.encode import COLUMNS
from connectors.bigquery.options import Layout, Options, Secrets
from connectors.bigquery.storage import Appended, Key, Opened, Own, Storage
from connectors.contract import Batch, Batching, Step
from schemas.ids import DeliveryId
from schemas.outcome import Outcome, delivered

# Tables of one batch that are written at the same time.
TABLES_AT_ONCE: Final = 8
# What is left of the time when an attempt has used it up: to ask how much was stored.
GRACE_S: Final = 10.0
CHECK_TABLE: Final = "headgate_check"
ROWS_AT_ONCE: Final = 256
_TYPES: Final = {name: kind for name, kind, _ in COLUMNS}
# What each step of `check` takes.
RIGHTS: Final = {
    "table": "bigquery.tables.get",
    "create": "bigquery.tables.create",
    "write": "bigquery.tables.updateData",
}


class Noted(Struct, array_like=True):
    """What is kept of a batch. By its layout and table at that time, and `stored` (a bit for each row) and `refused`,
    the rows of each table follow; `streams` has, by table, where they go and how many rows were there before."""

    layout: Layout
    table: str
    stored: bytes
    refused: dict[int, str]
    streams: dict[str, tuple[str, int]]


_encode_noted: Final = msgspec.msgpack.Encoder().encode
_decode_noted: Final = msgspec.msgpack.Decoder(Noted).decode


class _Stream(Struct):
    """A stream that nothing is under way on, and how many rows it holds."""

    name: str
    rows: int


class _Work:
    """One batch, and what is known of each of its rows: stored, refused, or left; of the last, what hinders it."""

    def __init__(self, batch: Batch, rows: list[bytes | str], options: Options) -> None:
        self.batch = batch
        self.rows = rows
        self.stored = bytearray(len(self.rows))
        self.refused = {index: row for index, row in enumerate(self.rows) if isinstance(row, str)}
        self.answers: dict[int, bytes] = {}
        self.streams: dict[str, tuple[str, int]] = {}
        self.faults: dict[str, Fault] = {}
        self.hindrance: Fault | None = None  # why it was not learnt what a stream holds
        self.lay(options.layout, options.table)

    def lay(self, layout: Layout, table: str) -> None:
        self._layout, self._table = layout, table
        types: dict[str, str] = {}
        self.tables = [
            types.get(kind) or types.setdefault(kind, encode.table_of(layout, table, kind))
            for kind in (delivery.event.eventType for delivery in self.batch.deliveries)
        ]

    def note(self) -> bytes:
        stored = int.from_bytes(self.stored, "little")  # a byte a row, 0 or 1
        bits = bytearray((len(self.stored) + 7) // 8)
        if stored:
            for index, one in enumerate(self.stored):
                bits[index >> 3] |= one << (index & 7)
        return _encode_noted(Noted(self._layout, self._table, bytes(bits), self.refused, self.streams))

    def remember(self, noted: Noted) -> None:
        """From here on goes by the layout of that time."""
        self.stored = bytearray(noted.stored[index >> 3] >> (index & 7) & 1 for index in range(len(self.rows)))
        self.refused = noted.refused
        self.streams = noted.streams
        self.lay(noted.layout, noted.table)

    def left(self) -> dict[str, list[int]]:
        """By table, the rows that are neither stored nor refused, in order."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for index, table in enumerate(self.tables):
            if not self.stored[index] and index not in self.refused:
                found[table].append(index)
        return found

    def outcomes(self) -> dict[DeliveryId, Outcome]:
        ends: dict[DeliveryId, Outcome] = {}
        done = {table: delivered(receipt=table) for table in set(self.tables)}
        failed = {table: fault.outcome for table, fault in self.faults.items()}
        for index, delivery in enumerate(self.batch.deliveries):
            if self.stored[index]:
                ends[delivery.id] = done[self.tables[index]]
            elif index in self.refused:
                ends[delivery.id] = refused(self.refused[index], self.answers.get(index, b""))
            else:
                ends[delivery.id] = failed[self.tables[index]]
        return ends


class BigQueryConnector:
    """A stage kind. One batch at a time."""

    def __init__(self, options: Options, secrets: Secrets, settings: BigQuerySettings, batching: Batching) -> None:
        self.batching = batching
        self._options = options
        account = secrets.account
        # rather than the worker's own credentials, where those are not for tenants
        self._refused = account is None and not settings.default_credentials
        token = Key(account) if account is not None else Own()
        self._storage = Storage(settings, options.project, options.dataset, token)
        self._streams: dict[str, _Stream] = {}
        self._one = asyncio.Lock()
        self._closed = False

    async def open(self) -> None:
        """Nothing to do: the first batch opens what it needs."""

    async def close(self) -> None:
        async with self._one:
            self._closed = True
            await self._storage.close()

    async def deliver(self, batch: Batch) -> Mapping[DeliveryId, Outcome]:
        async with self._one:
            if self._closed or self._refused:
                end = Fault("closed" if self._closed else "credentials").outcome
                return {delivery.id: end for delivery in batch.deliveries}
            work = _Work(batch, await _encoded(batch), self._options)
            deadline = asyncio.get_running_loop().time() + self._options.timeout_s
            try:
                if await self._recover(work):
                    await self._store(work, deadline)
            finally:
                await self._storage.tidy()
            return work.outcomes()

    # ---------------------------------------------------------------- a batch

    async def _recover(self, work: _Work) -> bool:
        """Learns what earlier attempts have stored. False where that cannot be known now: then nothing may be sent."""
        if not work.batch.noted:
            return True
        work.remember(_decode_noted(work.batch.noted))
        for table in work.streams:
            self._streams.pop(table, None)
        await self._settle(work)
        if work.streams:
            # the others are not sent either: the batch comes again as a whole
            self._fill(work, work.tables)
            return False
        work.lay(self._options.layout, self._options.table)
        return True

    async def _settle(self, work: _Work) -> None:
        """Ends the streams of which it is not known what they hold, and asks. Those that remain have faults."""
        left = work.left()

        async def settle(table: str, stream: str, before: int) -> None:
            try:
                held = await self._storage.finish(stream, min(GRACE_S, self._options.timeout_s)) - before
            except Fault as fault:
                if fault.code in ("not_found", "stream"):
                    work.refused.update(dict.fromkeys(left[table], "stream_lost"))
                else:
                    work.hindrance = fault
                    work.faults[table] = Fault("in_doubt", fault.detail, retry_after_s=fault.retry_after_s)
                    return
            else:
                # it may hold more: rows of a batch that went after this one's
                for index in left[table][: max(0, held)]:
                    work.stored[index] = 1
            del work.streams[table]

        if work.streams:
            await _each(settle(table, *place) for table, place in list(work.streams.items()))

    async def _store(self, work: _Work, deadline: float) -> None:
        """Round by round, until all rows are stored or refused, or a table has a fault."""
        worn: set[str] = set()  # tables whose stream was tried and given up in this attempt
        noted = b""
        while (left := work.left()) and not work.faults:
            streams = await self._opened(work, left, deadline)
            if work.faults:
                break
            work.streams = {table: (stream.name, stream.rows) for table, stream in streams.items()}
            noted = work.note()
            await work.batch.note(noted)
            for table in left:
                self._streams.pop(table, None)  # until it is known again what it holds
            await self._round(work, left, streams, deadline, worn)
        if work.faults:
            self._fill(work, left)
            if noted and not work.streams:  # what is known now, the table itself may not tell later
                await work.batch.note(work.note())

    def _fill(self, work: _Work, tables: Iterable[str]) -> None:
        """Gives what hindered one table to those that were not tried because of it: they are in no doubt."""
        cause = work.hindrance or next(iter(work.faults.values()))
        for table in tables:
            work.faults.setdefault(table, cause)

    async def _opened(self, work: _Work, left: Mapping[str, Sequence[int]], deadline: float) -> dict[str, _Stream]:
        """A stream for each table; faults where there is none."""
        streams: dict[str, _Stream] = {}

        async def open_one(table: str) -> None:
            try:
                stream = self._streams.get(table)
                if stream is None:
                    stream = await self._new_stream(table, deadline, self._options.create_tables)
                    self._streams[table] = stream
                streams[table] = stream
            except Fault as fault:
                work.faults[table] = fault

        await _each(open_one(table) for table in left)
        return streams

    async def _new_stream(self, table: str, deadline: float, may_change: bool) -> _Stream:
        """Raises Fault."""
        storage = self._storage
        try:
            opened = await storage.open_stream(table, _rest_of(deadline))
        except Fault as fault:
            if fault.code != "not_found" or not may_change:
                raise
            await storage.make_table(table, _rest_of(deadline))
            opened = await storage.open_stream(table, _rest_of(deadline))
        if may_change and opened.types and not opened.types.keys() >= _TYPES.keys():
            await storage.add_columns(table, _rest_of(deadline))
            opened = await storage.open_stream(table, _rest_of(deadline))
        if opened.types:
            _hold_against(table, opened)
        return _Stream(opened.name, 0)

    async def _round(
        self,
        work: _Work,
        left: Mapping[str, Sequence[int]],
        streams: Mapping[str, _Stream],
        deadline: float,
        worn: set[str],
    ) -> None:
        """Sends to each table what is left, and learns what of it is stored."""
        ends: dict[str, Appended] = {}

        async def append(table: str) -> None:
            stream = streams[table]
            rows = [row for index in left[table] if isinstance(row := work.rows[index], bytes)]
            ends[table] = await self._storage.append(stream.name, stream.rows, rows, _rest_of(deadline))

        await _each(append(table) for table in left)
        for table, end in ends.items():
            indexes = left[table]
            if end.known:
                for index in indexes[: end.stored]:
                    work.stored[index] = 1
                del work.streams[table]
            for at, (reason, answer) in end.refused.items():
                work.refused[indexes[at]] = reason
                work.answers[indexes[at]] = answer
            if end.usable:
                self._streams[table] = _Stream(streams[table].name, streams[table].rows + end.stored)
        await self._settle(work)
        for table, end in ends.items():
            if table in work.streams:  # it is still not known, but for what was answered
                for index in left[table][: end.stored]:
                    work.stored[index] = 1
            elif end.fault is None:
                continue
            # a stream of an earlier batch may have ended since, or its table be another: once more with a new one
            elif end.fault.code in ("stream", "not_found", "schema") and table not in worn:
                worn.add(table)
            else:
                work.faults[table] = end.fault

    # ---------------------------------------------------------------- check

    async def check(self) -> Sequence[Step]:
        """Opens a stream and ends it: that asks for all rights that writing does, and writes nothing."""
        async with self._one:
            try:
                return await self._checked()
            finally:
                await self._storage.tidy()

    async def _checked(self) -> list[Step]:
        options, storage = self._options, self._storage
        deadline = asyncio.get_running_loop().time() + options.timeout_s
        steps: list[Step] = []
        name, probe = "credentials", False
        try:
            if self._refused:
                raise Fault("credentials")
            await storage.sign_in()
            steps.append(Step(name, True))
            name = "table"
            there = options.layout == "wide" and await storage.has_table(options.table, _rest_of(deadline))
            if not there and not options.create_tables:
                raise Fault("not_found", f"the table {options.table} is not there, and create_tables is off")
            steps.append(Step(name, True, "" if there else "not there yet"))
            if not there:
                name, probe = "create", True
                await storage.make_table(CHECK_TABLE, _rest_of(deadline), probe=True)
                steps.append(Step(name, True))
            name = "write"
            stream = await self._new_stream(CHECK_TABLE if probe else options.table, deadline, may_change=False)
            await storage.finish(stream.name, _rest_of(deadline))
            steps.append(Step(name, True))
        except Fault as fault:
            right = f" The right that this takes: {RIGHTS[name]}" if fault.code == "denied" and name in RIGHTS else ""
            steps.append(Step(name, False, fault.detail + right))
        if probe:
            try:
                await storage.drop_table(CHECK_TABLE, _rest_of(deadline))
            except Fault:
                pass  # a right that writing does not take; the table ends by itself within the hour
        return steps


async def _encoded(batch: Batch) -> list[bytes | str]:
    """The rows, or why there is none; with pauses, so that nothing else in this worker waits for it."""
    rows: list[bytes | str] = []
    for at in range(0, len(batch.deliveries), ROWS_AT_ONCE):
        rows += map(encode.row, batch.deliveries[at : at + ROWS_AT_ONCE])
        await asyncio.sleep(0)
    return rows


async def _each(steps: Iterable[Coroutine[None, None, None]]) -> None:
    """All of them, at least one, a few at a time."""
    first, *others = steps
    if not others:
        await first
        return
    room = asyncio.Semaphore(TABLES_AT_ONCE)

    async def one(step: Coroutine[None, None, None]) -> None:
        async with room:
            await step

    async with asyncio.TaskGroup() as group:
        for step in (first, *others):
            group.create_task(one(step))


def _hold_against(table: str, opened: Opened) -> None:
    """Raises Fault where our rows do not fit into the table's columns."""
    for column, kind in _TYPES.items():
        if column not in opened.types:
            raise Fault("schema", f"the table {table} has no column {column}; it must be one of type {kind}")
        if opened.types[column] != kind:
            raise Fault("schema", f"the column {column} of the table {table} must be of type {kind}")
    for column in opened.required:
        if column.lower() not in _TYPES:
            raise Fault("schema", f"the table {table} has a column that must be filled and is none of ours: {column}")


def _rest_of(deadline: float) -> float:
    """Seconds until then; what begins after it ends at once, by itself."""
    return max(0.1, deadline - asyncio.get_running_loop().time())
