"""aiokafka's fetching, made cheap: what is fetched is copied once, what has not changed is not asked for again.

Owns the way of an answer from the socket to the records, for every aiokafka consumer of the process: importing this
module puts its classes in the place of aiokafka's own. Who asks when, and what becomes of the records, is as before.

* `Connection` reads an answer into one buffer of its own. (asyncio's stream reader copies each answer three more
  times, and every copy of a megabyte is fresh memory: those page faults were half of the cost of an event.)
* `Session` is Kafka's incremental fetch (KIP-227): the broker keeps what was asked for, a question names only what is
  different, and the answer only partitions with news. A consumer of hundreds of silent partitions, the retry pump,
  would otherwise write and read all of them several times a second, in Python.
* `PartitionRecords` makes records in bulk, not one by one through a generator and a dataclass of eleven fields.
"""

from __future__ import annotations

import asyncio
import weakref
from itertools import chain, islice
from struct import Struct as Layout
from time import monotonic
from typing import Any, Final

import aiokafka.conn as conn
import aiokafka.consumer.fetcher as fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.protocol.api import Request, RequestStruct
from aiokafka.protocol.fetch import FetchRequest, FetchRequest_v11, FetchResponse_v11
from msgspec import Struct

from streams.strange_headers import lenient_batches

FIRST_BUFFER_BYTES: Final = 64 * 1024
KEPT_BUFFER_BYTES: Final = 4 * 2**20 + 64 * 1024  # the largest usual answer (`Fetching.max_bytes`) and what frames it
MOST_ANSWER_BYTES: Final = 256 * 2**20  # far above any answer; what other protocols say reads as 352 MB (TLS) and more
SIZE_BYTES: Final = 4
LAST_EPOCH: Final = 2**31 - 1
PARTITION_RECORDS: Final = 100  # drawn of one partition at a time: the others have their turn
UNDRAWN_S: Final = 0.005  # above 0, so that what many partitions have comes in one answer
READ_COMMITTED: Final = fetcher.READ_COMMITTED

_Compiled: Any = fetcher.MemoryRecords


# ------------------------------------------------------------------------------------------------------- the question

_ASK: Final = Layout(">iiiibii")  # replica, longest wait, least bytes, most bytes, isolation, session, epoch
_COUNT: Final = Layout(">i")
_LENGTH: Final = Layout(">h")
_ASKED: Final = Layout(">iiqqi")  # partition, leader epoch, offset, start of the log, most bytes
_ANSWER: Final = Layout(">ihii")  # throttle, error, session, topics
_PARTITION: Final = Layout(">ihqqqi")  # partition, error, high water mark, last stable, start of the log, aborted
_ABORTED: Final = Layout(">qq")
_REPLICA_AND_SIZE: Final = Layout(">ii")


class Session:
    """What one broker knows of what one connection asks for. Made by a full question; ended by an error.

    A question changes what the broker knows when it is sent, whether anyone still waits for the answer or not.
    """

    __slots__ = ("ends", "epoch", "id", "known")

    def __init__(self, ends: int = 0) -> None:
        self.ends = ends  # an earlier one, which the broker forgets when the first question names it
        self.id = 0  # given by the broker; it stays 0 where the broker has no room for a session
        self.epoch = 0
        self.known: dict[tuple[str, int], tuple[int, int]] = {}  # offset and most bytes

    def difference(
        self, topics: list[tuple[str, list[tuple[int, int, int]]]]
    ) -> tuple[dict[str, list[tuple[int, int, int]]], dict[str, list[int]]]:
        """What to tell the broker: partitions that are new or read from elsewhere, and those to be forgotten."""
        known = self.known
        wanted: dict[tuple[str, int], tuple[int, int]] = {}
        changed: dict[str, list[tuple[int, int, int]]] = {}
        for topic, partitions in topics:
            for asked in partitions:
                at = (topic, asked[0])
                wanted[at] = place = asked[1:]
                if known.get(at) != place:
                    changed.setdefault(topic, []).append(asked)
        forgotten: dict[str, list[int]] = {}
        for topic, partition in known.keys() - wanted.keys():
            forgotten.setdefault(topic, []).append(partition)
        self.known = wanted
        return changed, forgotten


class _Question(RequestStruct):  # type: ignore[misc]  # aiokafka is untyped
    """A fetch request of version 11, written for a session."""

    API_KEY = FetchRequest_v11.API_KEY
    API_VERSION = FetchRequest_v11.API_VERSION
    RESPONSE_TYPE = FetchResponse_v11
    SCHEMA = FetchRequest_v11.SCHEMA

    def __init__(self, plain: Any, session: Session) -> None:
        self.session = session
        changed, forgotten = session.difference(plain._topics)
        parts = [
            _ASK.pack(
                -1, plain._max_wait_ms, plain._min_bytes, plain._max_bytes, plain._isolation_level,
                session.id or session.ends, session.epoch,
            ),
            _COUNT.pack(len(changed)),
        ]  # fmt: skip
        for topic, asked in changed.items():
            parts += (_string(topic), _COUNT.pack(len(asked)))
            parts += [_ASKED.pack(partition, -1, offset, -1, most) for partition, offset, most in asked]
        parts.append(_COUNT.pack(len(forgotten)))
        for topic, partitions in forgotten.items():
            parts += (_string(topic), _COUNT.pack(len(partitions)))
            parts += [_COUNT.pack(partition) for partition in partitions]
        parts.append(_string(plain._rack_id))
        self._encoded = b"".join(parts)
        session.epoch = session.epoch + 1 if session.epoch < LAST_EPOCH else 1

    def encode(self) -> bytes:
        return self._encoded

    def __repr__(self) -> str:
        return f"<fetch, session {self.session.id}, {len(self._encoded)} bytes>"


def _string(text: str) -> bytes:
    encoded = text.encode()
    return _LENGTH.pack(len(encoded)) + encoded


class _SessionFetch(Request[_Question]):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = FetchRequest.API_KEY

    def __init__(self, plain: Any, session: Session) -> None:
        self._plain = plain
        self._session = session

    def build(self, request_struct_class: type[_Question]) -> _Question:
        return request_struct_class(self._plain, self._session)


# --------------------------------------------------------------------------------------------------------- the answer


class Answer:
    """A fetch response, as much of it as aiokafka's fetcher looks at."""

    API_KEY = FetchResponse_v11.API_KEY
    API_VERSION = FetchResponse_v11.API_VERSION

    def __init__(self, frame: memoryview) -> None:
        """`frame` is not kept: what it holds is copied."""
        _, self.error_code, self.session_id, topics = _ANSWER.unpack_from(frame, SIZE_BYTES)  # behind the correlation
        self.topics: list[tuple[str, list[tuple[Any, ...]]]] = []
        at = SIZE_BYTES + _ANSWER.size
        for _ in range(topics):
            (length,) = _LENGTH.unpack_from(frame, at)
            at += _LENGTH.size
            topic = str(frame[at : at + length], "utf-8")
            at += length
            (count,) = _COUNT.unpack_from(frame, at)
            at += _COUNT.size
            partitions = []
            for _ in range(count):
                partition, error, high, stable, start, aborts = _PARTITION.unpack_from(frame, at)
                at += _PARTITION.size
                aborted = []
                for _ in range(aborts):  # -1 where there is no list
                    aborted.append(_ABORTED.unpack_from(frame, at))
                    at += _ABORTED.size
                replica, size = _REPLICA_AND_SIZE.unpack_from(frame, at)
                at += _REPLICA_AND_SIZE.size
                records = bytes(frame[at : at + size]) if size > 0 else b""
                at += len(records)
                partitions.append((partition, error, high, stable, start, aborted, replica, records))
            self.topics.append((topic, partitions))


class _Frames(asyncio.BufferedProtocol):
    """The receiving side of a connection: whole answers, each a view of the one buffer, good until it returns."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._buffer = bytearray(FIRST_BUFFER_BYTES)
        self._filled = 0
        self._ended = False

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        buffer, filled, at = self._buffer, self._filled, 0
        size = 0
        while filled - at >= SIZE_BYTES:
            size = SIZE_BYTES + int.from_bytes(buffer[at : at + SIZE_BYTES], "big")
            if size > MOST_ANSWER_BYTES:
                conn.log.error("%s answers, but not as Kafka does: is TLS on at one end only?", self._connection)
                self._connection.close(reason=conn.CloseReason.CONNECTION_BROKEN, exc=ValueError(f"{size} bytes"))
                return
            if filled - at < size:
                break
            try:
                self._connection._handle_frame(memoryview(buffer)[at + SIZE_BYTES : at + size])
            except Exception as fault:
                conn.log.exception("Unexpected exception in AIOKafkaConnection")
                self._connection.close(reason=conn.CloseReason.CONNECTION_BROKEN, exc=fault)
                return
            if self._connection._reader is None:
                return  # it was closed
            at += size
            size = 0
        rest = filled - at
        if size > len(buffer) or (not rest and len(buffer) > KEPT_BUFFER_BYTES):
            self._buffer = bytearray(max(size, FIRST_BUFFER_BYTES))
            self._buffer[:rest] = memoryview(buffer)[at:filled]
        elif at and rest:
            buffer[:rest] = buffer[at:filled]
        self._filled = rest

    def at_eof(self) -> bool:
        return self._ended

    def eof_received(self) -> None:
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._connection._lost(exc)


class Connection(conn.AIOKafkaConnection):  # type: ignore[misc]  # aiokafka is untyped
    """aiokafka's connection to one broker, with buffered frames and a session for its fetches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._session = Session()

    async def connect(self) -> Any:
        loop = self._loop
        self._closed_fut = loop.create_future()
        tls = self._ssl_context if self._security_protocol in ("SSL", "SASL_SSL") else None
        frames = _Frames(self)
        async with asyncio.timeout(self._request_timeout):
            transport, _ = await loop.create_connection(lambda: frames, self.host, self.port, ssl=tls)
        # the few methods that aiokafka calls of a stream's reader and writer
        self._reader, self._writer = frames, transport
        self._protocol: Any = frames
        self._read_task = loop.create_future()  # nothing is to be cancelled
        self._read_task.set_result(None)
        if self._max_idle_ms is not None:
            self._idle_handle = loop.call_soon(self._idle_check, weakref.ref(self))
        try:
            await self._do_version_lookup()
            if self._security_protocol in ("SASL_SSL", "SASL_PLAINTEXT"):
                await self._do_sasl_handshake()
        except BaseException:
            self.close()
            raise
        return self._reader, self._writer

    def send(self, request: Any, expect_response: bool = True) -> Any:
        if type(request) is FetchRequest and self._versions[FetchRequest.API_KEY][1] >= _Question.API_VERSION:
            if not self._session.id:
                self._session = Session(self._session.ends)
            request = _SessionFetch(request, self._session)
        return super().send(request, expect_response)

    def _handle_frame(self, frame: memoryview) -> None:
        correlation_id, request, waiting = self._requests[0]
        if type(request) is not _Question:
            super()._handle_frame(bytes(frame))
            return
        if _COUNT.unpack_from(frame)[0] != correlation_id:
            self.close(reason=conn.CloseReason.OUT_OF_SYNC)
            return
        answer = Answer(frame)
        session = request.session
        if answer.error_code or waiting.done():  # the broker dropped the session; or another assignment begins
            if session is self._session:
                self._session = Session(0 if answer.error_code else answer.session_id)
        elif not session.id:
            session.id, session.ends = answer.session_id, 0
        if not waiting.done():
            waiting.set_result(answer)
        self._last_action = monotonic()
        self._requests.popleft()

    def _lost(self, fault: Exception | None) -> None:
        if self._reader is not None:
            self.close(reason=conn.CloseReason.CONNECTION_BROKEN, exc=fault or EOFError())
        if not self._closed_fut.done():
            self._closed_fut.set_result(None)
        self._protocol = None  # it holds this: a buffer of megabytes must not wait for the collector


# -------------------------------------------------------------------------------------------------------- the records


class FetchedRecord(Struct, gc=False):
    """What is used of a record. A record without a key has `key` None, a tombstone `value` None."""

    topic: str
    partition: int
    offset: int
    timestamp: int  # ms; append time or create time, as the topic is set
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


class Batches(_Compiled):  # type: ignore[misc]
    """The compiled reader of a fetch, which keeps at hand what it reads."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.raw = raw


class PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]  # aiokafka is untyped
    """The records of a fetch of one partition, some at a time."""

    def __init__(self, tp: Any, records: Batches, aborted: Any, *more: Any) -> None:
        super().__init__(tp, records, aborted, *more)
        self._records_iterator = None  # aiokafka's own way to read them
        self.next_fetch_offset: int
        self._aborted_transactions: list[tuple[int, int]]
        self._aborted_producers: set[int]
        self._batch: Any = None  # not wholly read
        self._again = (records.raw, list(self._aborted_transactions))

    def __next__(self) -> FetchedRecord:
        found = self.take(1)
        if not found:
            raise StopIteration
        return found[0]

    def take(self, most: int) -> list[FetchedRecord]:
        """The next records, `most` at most; fewer only at the end of what was fetched. Raises KafkaError."""
        taken: list[FetchedRecord] = []
        while len(taken) < most:
            if self._batch is None:
                self._batch = self._next_batch()
                if self._batch is None:
                    break
                self._reading = chain(self._batch)  # a batch may be begun once only
            asked = most - len(taken)
            try:
                found = list(islice(self._reading, asked))
            except UnicodeDecodeError:
                self._begin_again()
                continue
            topic, partition = self._tp
            first = self.next_fetch_offset  # a batch is fetched whole: what lies before it was not asked for
            taken += [
                FetchedRecord(
                    topic, partition, offset, record.timestamp, record.key, record.value, tuple(record.headers)
                )
                for record in found
                if (offset := record.offset) >= first
            ]
            if len(found) < asked:
                self._pass(self._batch)
                self._batch = None
            elif taken:
                self.next_fetch_offset = max(first, taken[-1].offset + 1)
        return taken

    def _next_batch(self) -> Any:
        """The next batch whose records count: no marker, and nothing of a transaction that was aborted."""
        batches = self._records
        while batches.has_next():
            batch = batches.next_batch()
            if self._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"Invalid CRC - {self._tp}")
            if self._isolation_level == READ_COMMITTED and batch.producer_id is not None:
                self._consume_aborted_up_to(batch.base_offset)
                if batch.is_control_batch and self._contains_abort_marker(batch):
                    self._aborted_producers.discard(batch.producer_id)
                if batch.is_transactional and batch.producer_id in self._aborted_producers:
                    self._pass(batch)
                    continue
            if batch.is_control_batch:
                self._pass(batch)
                continue
            return batch
        return None

    def _pass(self, batch: Any) -> None:
        """Goes on behind a batch: also where compaction has taken its last records. Never back, on a second reading."""
        self.next_fetch_offset = max(self.next_fetch_offset, batch.next_offset)

    def _begin_again(self) -> None:
        """A header's name is not UTF-8: all is read again, and what `next_fetch_offset` has passed is left out."""
        raw, aborted = self._again
        self._records = lenient_batches(raw)
        self._aborted_transactions = list(aborted)
        self._aborted_producers = set()
        self._batch = None


class FetchResult(fetcher.FetchResult):  # type: ignore[misc]  # aiokafka is untyped
    """Hands on the records of a fetch in bulk."""

    def calculate_backoff(self) -> float:
        """How long what is not drawn yet keeps the broker from being asked for other partitions (aiokafka: 100 ms)."""
        return float(max(0.0, self._created + UNDRAWN_S - monotonic()))

    def getall(self, max_records: int | None = None) -> list[FetchedRecord]:
        if not self.check_assignment(self._topic_partition) or not self.has_more():
            return []
        most = min(max_records, PARTITION_RECORDS) if max_records is not None else LAST_EPOCH
        records: PartitionRecords = self._partition_records
        found = records.take(most)
        self._update_position()
        if len(found) < most:
            self._partition_records: Any = None
        return found


REPLACED: Final[tuple[tuple[Any, str, Any, Any], ...]] = (  # where, the name, aiokafka's, ours
    (conn, "AIOKafkaConnection", conn.AIOKafkaConnection, Connection),
    (fetcher, "MemoryRecords", fetcher.MemoryRecords, Batches),
    (fetcher, "PartitionRecords", fetcher.PartitionRecords, PartitionRecords),
    (fetcher, "FetchResult", fetcher.FetchResult, FetchResult),
)
for _module, _name, _theirs, _ours in REPLACED:
    setattr(_module, _name, _ours)
