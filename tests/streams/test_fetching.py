"""How answers of a broker are read: whole frames from any pieces, records in bulk, questions that name what changed."""

import asyncio
import gc
import io
import struct
import uuid
import weakref
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka.conn import create_conn
from aiokafka.consumer import fetcher
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import CorruptRecordException
from aiokafka.protocol.admin import ApiVersionRequest
from aiokafka.protocol.fetch import FetchRequest, FetchRequest_v11, FetchResponse_v11
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from dev.stack import Stack
from streams import fetching, transport
from streams.fetching import (
    FIRST_BUFFER_BYTES,
    KEPT_BUFFER_BYTES,
    Answer,
    Batches,
    FetchResult,
    PartitionRecords,
    Session,
    _Frames,
    _Question,
)
from streams.transport import ConsumerThread, Fetching

AT = TopicPartition("events", 3)


class Listener:
    """Stands where the connection is, and keeps a copy of what it is handed."""

    def __init__(self) -> None:
        self._reader: Any = self
        self.frames: list[bytes] = []

    def _handle_frame(self, frame: memoryview) -> None:
        self.frames.append(bytes(frame))

    def close(self, **_why: Any) -> None:
        self._reader = None


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_the_same_however_they_arrive(seed: int) -> None:
    dice = Random(seed)
    sizes = (0, 1, 40, FIRST_BUFFER_BYTES - 4, FIRST_BUFFER_BYTES, 3 * FIRST_BUFFER_BYTES, KEPT_BUFFER_BYTES + 9)
    frames = [dice.randbytes(dice.choice(sizes)) for _ in range(12)] + [b"last"]
    stream = b"".join(struct.pack(">i", len(frame)) + frame for frame in frames)
    listener = Listener()
    protocol = _Frames(listener)  # type: ignore[arg-type]
    at = 0
    while at < len(stream):
        room = protocol.get_buffer(-1)
        count = min(len(room), len(stream) - at, dice.choice((1, 3, 1000, 100_000, 10_000_000)))
        assert count > 0
        room[:count] = stream[at : at + count]
        protocol.buffer_updated(count)
        at += count
    assert listener.frames == frames


@pytest.mark.parametrize("said", [b"\x15\x03\x03\x00\x02\x02\x46", b"HTTP/1.1 400 Bad"], ids=["TLS", "HTTP"])
def test_what_is_not_kafka_ends_the_connection_and_takes_no_memory(said: bytes) -> None:
    """Read as a size, its first bytes are hundreds of megabytes: a wrong port or a missing TLS setting is enough."""
    listener = Listener()
    protocol = _Frames(listener)  # type: ignore[arg-type]
    protocol.get_buffer(-1)[: len(said)] = said
    protocol.buffer_updated(len(said))
    assert listener._reader is None
    assert len(protocol._buffer) == FIRST_BUFFER_BYTES


async def _names_its_versions(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All that a connection asks before it is used."""
    (size,) = struct.unpack(">i", await reader.readexactly(4))
    _, _, correlation = struct.unpack_from(">hhi", await reader.readexactly(size))
    writer.write(struct.pack(">iihihhh", 16, correlation, 0, 1, 18, 0, 0))
    await reader.read()
    writer.close()


async def test_a_closed_connection_is_let_go_with_its_buffer_before_the_collector_comes() -> None:
    """A worker collects rarely, and what is old as good as never."""
    async with await asyncio.start_server(_names_its_versions, "127.0.0.1", 0) as server:
        gc.disable()
        try:
            connection = await create_conn(*server.sockets[0].getsockname())
            seen = weakref.ref(connection)
            await connection.close()
            del connection
            await asyncio.sleep(0)  # the callback that told of the end is over
            assert seen() is None
        finally:
            gc.enable()


def batch(first: int, count: int, *, header: bytes = b"name", deltas: list[int] | None = None) -> bytes:
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=False, producer_id=-1, producer_epoch=-1, base_sequence=-1,
        batch_size=2**20,
    )  # fmt: skip
    for delta in deltas or range(count):
        builder.append(delta, 1000 + first + delta, b"k", b"v%d" % (first + delta), [("name", b"x")])
    made = bytes(builder.build()).replace(b"name", header)
    return struct.pack(">q", first) + made[8:]


def records_of(raw: bytes, first: int = 0, *, crc: bool = False) -> PartitionRecords:
    return PartitionRecords(AT, Batches(raw), [], first, None, None, crc, 1)


def offsets_in_pieces(records: PartitionRecords, piece: int) -> list[int]:
    taken: list[int] = []
    while True:
        found = records.take(piece)
        assert all(record.value == b"v%d" % record.offset for record in found)
        assert all((record.topic, record.partition) == AT for record in found)
        assert all(record.timestamp == 1000 + record.offset and record.key == b"k" for record in found)
        taken += [record.offset for record in found]
        if len(found) < piece:
            return taken


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 100])
def test_pieces_of_any_size_are_all_records_once(piece: int) -> None:
    raw = batch(0, 5) + batch(5, 5, deltas=[0, 2, 4]) + batch(20, 4)
    records = records_of(raw)
    assert offsets_in_pieces(records, piece) == [0, 1, 2, 3, 4, 5, 7, 9, 20, 21, 22, 23]
    assert records.next_fetch_offset == 24


@pytest.mark.parametrize("piece", [1, 2, 100])
def test_records_before_the_offset_asked_for_are_left_out(piece: int) -> None:
    assert offsets_in_pieces(records_of(batch(0, 5) + batch(5, 5), first=3), piece) == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 100])
def test_a_header_name_that_is_not_utf8_brings_nothing_twice(piece: int) -> None:
    raw = batch(0, 3) + batch(3, 3) + batch(6, 3, header=b"n\xffme") + batch(9, 3)
    assert offsets_in_pieces(records_of(raw), piece) == list(range(12))
    (strange,) = [record for record in records_of(raw).take(100) if record.offset == 7]
    assert strange.headers == (("n\\xffme", b"x"),)


def test_a_batch_that_is_damaged_is_refused() -> None:
    sound, damaged = batch(0, 3), batch(3, 3).replace(b"v4", b"v9")
    assert len(records_of(sound, crc=True).take(100)) == 3
    with pytest.raises(CorruptRecordException):
        records_of(sound + damaged, crc=True).take(100)


def asked(session: Session, offsets: dict[int, int]) -> Any:
    """The question as aiokafka's own schema reads it."""
    plain = FetchRequest(300, 1, 1000, 1, [("events", [(partition, at, 50) for partition, at in offsets.items()])])
    return FetchRequest_v11.decode(io.BytesIO(_Question(plain, session).encode()))


def test_a_question_names_only_what_is_different() -> None:
    session = Session()
    first = asked(session, {0: 10, 1: 20, 2: 30})
    assert (first.session_id, first.session_epoch) == (0, 0)
    assert [partition[0] for partition in first.topics[0][1]] == [0, 1, 2]
    session.id = 77
    same = asked(session, {0: 10, 1: 20, 2: 30})
    assert (same.session_id, same.session_epoch, same.topics) == (77, 1, [])
    moved = asked(session, {0: 11, 1: 20})
    assert (moved.session_epoch, moved.topics) == (2, [("events", [(0, -1, 11, -1, 50)])])
    forgotten = next(iter(moved.to_object()["forgotten_topics_data"]))
    assert forgotten == {"topic": "events", "partitions": [2]}
    again = asked(session, {0: 11, 1: 20, 2: 30})
    assert again.topics == [("events", [(2, -1, 30, -1, 50)])]


SESSION_UNKNOWN, EPOCH_WRONG = 70, 71


@pytest.mark.broker
@pytest.mark.parametrize("ends", [True, False], ids=["as it is", "control: it is left to the broker"])
async def test_a_session_that_an_assignment_has_left_is_ended_at_the_broker(stack: Stack, ends: bool) -> None:
    """Its answer comes when nobody waits for it. What the broker knows shows in what it says to a wrong epoch."""
    name = f"t{uuid.uuid4().hex[:12]}"
    admin = AdminClient({"bootstrap.servers": stack.kafka_bootstrap})
    admin.create_topics([NewTopic(name, 1)])[name].result()
    host, port = stack.kafka_bootstrap.split(":")
    connection = await create_conn(host, int(port))

    def question(session: tuple[int, int] | None = None) -> Any:
        if session is not None:
            connection._session = Session()
            connection._session.id, connection._session.epoch = session
        return connection.send(FetchRequest(100, 1, 1000, 1, [(name, [(0, 0, 50)])]))

    async def new_session() -> int:
        answer = await question()
        assert (answer.error_code, answer.session_id) == (0, connection._session.id)
        return int(answer.session_id)

    try:
        left = await new_session()
        asked = connection._session
        abandoned = asyncio.ensure_future(question())
        await asyncio.sleep(0)
        abandoned.cancel()
        await connection.send(ApiVersionRequest())  # answered after it
        assert connection._session is not asked
        if not ends:
            connection._session = Session()
        assert await new_session() not in (0, left)
        assert (await question((left, 1000))).error_code == (SESSION_UNKNOWN if ends else EPOCH_WRONG)
    finally:
        connection.close()


def test_an_answer_is_read_as_aiokafka_reads_it() -> None:
    topics = [
        ("events", [(0, 0, 90, 80, 5, [(7, 60), (8, 61)], -1, b"records"), (1, 3, -1, -1, -1, [], -1, b"")]),
        ("others", [(4, 0, 1, 1, 0, [], -1, b"r")]),
    ]
    encoded = struct.pack(">i", 55) + FetchResponse_v11(0, 0, 99, topics).encode()
    answer = Answer(memoryview(encoded))
    assert (answer.error_code, answer.session_id, answer.topics) == (0, 99, topics)


class Untimed(asyncio.SelectorEventLoop):
    """Its clock goes on only when all would sleep, and then to the next that wakes: a busy machine changes nothing."""

    now = 100.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        internals = cast(Any, self)
        wakes = [timer.when() for timer in internals._scheduled if not timer.cancelled()]
        if wakes and not internals._ready:
            self.now = max(self.now + 1e-6, min(wakes))  # a wait that is lost in rounding must end, too
        cast(Any, super())._run_once()


class Broker:
    """Answers questions as one does: once there is enough, else at the end of the longest wait."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._metadata_max_age_ms = 300_000
        self.cluster = SimpleNamespace(leader_for_partition=lambda _: 0)
        self.log: dict[int, bytes] = {}
        self.questions: list[list[int]] = []

    async def send(self, _node: int, question: Any) -> Any:
        asked = [partition for _, partitions in question.topics for partition, _, _ in partitions]
        self.questions.append(sorted(asked))
        if sum(len(self.log.get(partition, b"")) for partition in asked) < question._min_bytes:
            await asyncio.sleep(question._max_wait_ms / 1000)
        found = [(partition, 0, 10**6, 10**6, 0, [], -1, self.log.pop(partition, b"")) for partition in asked]
        return SimpleNamespace(API_VERSION=11, topics=[(AT.topic, found)])


async def polls_until_the_fresh_one_is_drawn() -> int:
    """How often the worker looks, while what one partition has brought lies undrawn."""
    flooded, other = TopicPartition(AT.topic, 0), TopicPartition(AT.topic, 1)
    subscriptions, broker = SubscriptionState(), Broker()
    subscriptions.assign_from_user({flooded, other})
    for partition in (flooded, other):
        state = subscriptions.subscription.assignment.state_value(partition)
        state.await_reset(0)
        state.reset_to(0)
    asking = Fetching(min_bytes=1000)
    broker.log[0] = batch(0, 1000)
    reader = fetcher.Fetcher(
        broker, subscriptions, fetch_min_bytes=asking.min_bytes, fetch_max_wait_ms=asking.max_wait_ms
    )
    consumer = SimpleNamespace(
        _fetcher=reader, _subscription=subscriptions, assignment=subscriptions.assigned_partitions
    )
    thread: Any = SimpleNamespace(
        transport=SimpleNamespace(fetching=asking), _healthy_consumer=lambda: consumer
    )  # fmt: skip
    try:
        begun = await ConsumerThread._draw(thread, transport.FETCH_WAIT_S, asking.max_records, frozenset())
        assert [*begun.records] == [flooded]
        broker.log[1] = batch(0, 1)
        for poll in range(1, 100):
            drawn = await ConsumerThread._draw(thread, transport.FULL_WAIT_S, asking.max_records, frozenset({flooded}))
            if drawn.records:
                assert [*drawn.records] == [other]
                assert flooded in reader._records  # still
                assert broker.questions[0] == [0, 1]
                assert [0] not in broker.questions
                return poll
        pytest.fail("never drawn")
    finally:
        await reader.close()


@pytest.mark.parametrize(
    "control", ["", "aiokafka waits 100 ms for what is undrawn", "the broker gathers for the others"]
)
def test_a_partition_that_lies_undrawn_keeps_no_fresh_record_of_another_one_back(
    control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if control.startswith("aiokafka"):
        monkeypatch.delattr(FetchResult, "calculate_backoff")
    elif control:
        monkeypatch.setattr(transport, "BEHIND_MAX_WAIT_MS", Fetching().max_wait_ms)
    with asyncio.Runner(loop_factory=Untimed) as runner:
        clock = cast(Untimed, runner.get_loop()).time
        monkeypatch.setattr(fetcher, "time", SimpleNamespace(monotonic=clock, time=clock))
        monkeypatch.setattr(fetching, "monotonic", clock)
        polls = runner.run(polls_until_the_fresh_one_is_drawn())
    assert (polls == 1) is not bool(control)
