"""The producer of one destination: which records go together, and what each one's end is. And how many are live.

A producer is idempotent: each batch has a place in the sequence of its partition, one is on its way to a partition at a
time, and what may have been stored is sent again as it was until the attempt's deadline, so the broker can tell. What
is certain not to be stored gives its place back; what is still open at the deadline takes the producer's id with it.
This is why aiokafka's own producer does not do: it tries again without an end, and loses the sequence over a refused
batch (ADR 0018).
"""

import asyncio
import functools
import ssl
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from aiokafka.protocol.produce import ProduceRequest
from msgspec import Struct

from connectors.contract import place_of
from connectors.egress import Egress
from connectors.http.tls import client_context
from connectors.kafka.classify import DUPLICATE, EVENT, Fault, fault_of
from connectors.kafka.cluster import Cluster, Place, Reach
from connectors.kafka.encode import MAX_BATCH_BYTES, RECORD_OVERHEAD, Record, batch
from schemas.outcome import Outcome, delivered
from schemas.topics import partition_of

LINGER_S: Final = 0.1
BACKOFF_S: Final = 0.1
TICK_S: Final = 0.1
IDLE_S: Final = 60.0
MAX_LIVE: Final = 512
LOOKED_FOR_S: Final = 300.0
MAX_THROTTLE_S: Final = 5.0
_ALL_IN_SYNC: Final = -1
_SEQUENCES: Final = 1 << 31


class Batch(Struct, eq=False):
    """Records that go together. `content` is made with its place in the sequence, when it goes for the first time."""

    partition: "Partition"
    records: list[Record]
    content: bytes = b""
    producer: tuple[int, int] = (0, 0)
    sequence: int = 0
    uncertain: Fault | None = None  # why it may have been stored, or not
    over: bool = False


class Partition:
    __slots__ = ("flying", "max_bytes", "number", "pending", "pending_bytes", "ready", "sequence")

    def __init__(self, number: int) -> None:
        self.number = number
        self.pending: list[Record] = []
        self.pending_bytes = 0
        self.ready: list[Batch] = []
        self.flying: Batch | None = None
        self.sequence = 0
        self.max_bytes = MAX_BATCH_BYTES  # less where its topic takes less


class Producer:
    """Live from the first record until it has been idle for a while."""

    def __init__(self, pool: "Producers", reach: Reach, codec: int) -> None:
        self._pool = pool
        self._reach = reach
        self._codec = codec
        self._loop = asyncio.get_running_loop()
        self._cluster = Cluster(reach)
        self._unanswered: dict[Record, Batch | None] = {}  # in the order of their deadlines
        self._waiting: list[Record] = []  # until the partitions are known
        self._partitions: list[Partition] = []
        self._pending: dict[Partition, None] = {}
        self._ready: dict[Partition, None] = {}
        self._busy: set[Place] = set()  # one request at a time to each broker
        self._id: tuple[int, int] | None = None
        self._spread = 0  # where records without a key go
        self._looked_at = 0.0
        self._stale = True
        self._looking = False
        self._lingering: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def idle(self) -> bool:
        return not self._unanswered

    def send(self, record: Record) -> None:
        """`record.done` is called once, from the event loop, never from inside `send`, by its deadline and a tick."""
        if self._closed or (self.idle and not self._pool.enter(self)):
            refusal = Fault("closed" if self._closed else "no_resources").outcome
            self._loop.call_soon(record.done, refusal)
            return
        self._unanswered[record] = None
        if self._partitions:
            self._place(record)
        else:
            self._waiting.append(record)
            self._look()

    def hurry(self) -> None:
        """What lingers goes now."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingered()

    async def close(self) -> None:
        self._closed = True
        self.hurry()
        if self._unanswered:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)
        self._pool.leave(self)

    # ---------------------------------------------------------------- gathering

    def _place(self, record: Record) -> None:
        """Into its partition: that of its key; without one, the same for all until a batch of it is cut."""
        key = record.key
        number = self._spread if key is None else partition_of(key, len(self._partitions))
        partition = self._partitions[number]
        weight = len(record.value) + RECORD_OVERHEAD
        if partition.pending and partition.pending_bytes + weight > partition.max_bytes:
            self._cut(partition)
            self._pump()
        partition.pending.append(record)
        partition.pending_bytes += weight
        self._pending[partition] = None
        if self._lingering is None:
            self._lingering = self._loop.call_later(LINGER_S, self._lingered)

    def _lingered(self) -> None:
        self._lingering = None
        for partition in list(self._pending):
            self._cut(partition)
        self._pump()

    def _cut(self, partition: Partition) -> None:
        del self._pending[partition]
        records = [record for record in partition.pending if record in self._unanswered]
        partition.pending, partition.pending_bytes = [], 0
        if records:
            self._queue(Batch(partition, records))
        if partition.number == self._spread:
            count = len(self._partitions)
            after = ((partition.number + step) % count for step in range(1, count))
            self._spread = next((number for number in after if self._cluster.leaders[number] is not None), 0)

    def _queue(self, one: Batch, *, first: bool = False) -> None:
        for record in one.records:
            self._unanswered[record] = one
        ready = one.partition.ready
        ready.insert(0 if first else len(ready), one)
        self._ready[one.partition] = None

    # ---------------------------------------------------------------- finding the cluster

    def _look(self) -> None:
        if not self._looking:
            self._looking = True
            self._run(self._find())

    async def _find(self) -> None:
        """Who leads, and an id where there is none. What is ready goes on, or ends where it certainly may."""
        try:
            await self._cluster.look()
            if self._id is None:
                self._id = await self._cluster.producer_id()
                for partition in self._partitions:
                    partition.sequence = 0
        except Fault as fault:
            self._looking = False
            self._not_found(fault)
            return
        self._looking = self._stale = False
        self._looked_at = self._loop.time()
        leaders = self._cluster.leaders
        for gone in self._partitions[len(leaders) :]:
            if gone in self._pending:
                self._cut(gone)
            self._give_up(gone, Fault("unavailable"), uncertain_too=True)
        del self._partitions[len(leaders) :]
        self._partitions += map(Partition, range(len(self._partitions), len(leaders)))
        self._spread %= len(leaders)
        for partition in list(self._ready):
            if self._leader(partition) is None:
                self._give_up(partition, Fault("unavailable"))
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            if record in self._unanswered:
                self._place(record)
        if self._closed:
            self.hurry()
        self._pump()

    def _not_found(self, fault: Fault) -> None:
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            self._finish(record, fault.outcome)
        for partition in list(self._ready):
            self._give_up(partition, fault)
        if self._ready and self._again is None:
            self._again = self._loop.call_later(BACKOFF_S, self._look_again)

    def _give_up(self, partition: Partition, fault: Fault, *, uncertain_too: bool = False) -> None:
        """Ends what is ready there, but for what may be stored: that is to be asked about until its deadline."""
        kept = [one for one in partition.ready if one.uncertain is not None and not uncertain_too]
        ended = [one for one in partition.ready if one not in kept]
        partition.ready = kept
        if not kept:
            self._ready.pop(partition, None)
        for one in ended:
            self._end(one, fault)

    # ---------------------------------------------------------------- sending

    def _pump(self) -> None:
        """Sends what is ready to every broker that has nothing on its way."""
        if not self._ready:
            return
        if self._stale or self._id is None:
            self._look()
            return
        by_leader: dict[Place, list[Batch]] = {}
        lost = False
        for partition in list(self._ready):
            leader = self._leader(partition)
            if leader is None:
                lost = True
            elif leader not in self._busy and partition.flying is None:
                one = partition.flying = partition.ready.pop(0)
                if not partition.ready:
                    del self._ready[partition]
                by_leader.setdefault(leader, []).append(one)
        for place, batches in by_leader.items():
            self._busy.add(place)
            self._run(self._produce(place, batches, self._id))
        if lost and self._again is None:
            self._again = self._loop.call_later(BACKOFF_S, self._look_again)

    def _look_again(self) -> None:
        self._again = None
        self._stale = True
        self._pump()

    def _leader(self, partition: Partition) -> Place | None:
        leaders = self._cluster.leaders
        return leaders[partition.number] if partition.number < len(leaders) else None

    async def _produce(self, place: Place, batches: Sequence[Batch], producer: tuple[int, int]) -> None:
        for one in batches:
            if not one.content:
                partition = one.partition
                one.producer, one.sequence = producer, partition.sequence
                one.content = batch(one.records, self._codec, *producer, one.sequence)
                partition.sequence = (one.sequence + len(one.records)) % _SEQUENCES
        topic = self._reach.topic
        timeout_ms = int(self._reach.timeout_s * 1000)
        parts = [(one.partition.number, one.content) for one in batches]
        pause_s = 0.0
        ends: dict[int, tuple[int, int]] = {}
        missing = Fault("protocol", uncertain=True, step="write")
        try:
            answer = await self._cluster.ask(
                place, ProduceRequest(None, _ALL_IN_SYNC, timeout_ms, [(topic, parts)]), "write"
            )
            ends = ends_of(answer, topic)
            pause_s = min(answer.throttle_time_ms / 1000, MAX_THROTTLE_S)
        except Fault as fault:
            missing = fault
            self._stale = True
        for one in batches:
            end = ends.get(one.partition.number)
            one.partition.flying = None
            if one.over:
                continue
            if end is not None and end[0] in (0, DUPLICATE):
                self._stored(one, -1 if end[0] else end[1])
            else:
                self._failed(one, missing if end is None else fault_of(end[0]))
                pause_s = max(pause_s, BACKOFF_S)
        if pause_s:
            self._loop.call_later(pause_s, self._free, place)
        else:
            self._free(place)

    def _free(self, place: Place) -> None:
        self._busy.discard(place)
        self._pump()

    def _stored(self, one: Batch, offset: int) -> None:
        number = one.partition.number
        for position, record in enumerate(one.records):
            # a broker that has seen the batch before, but no longer knows where, says -1
            receipt = f"{number}/{offset + position}" if offset >= 0 else f"{number}/"
            self._finish(record, delivered(receipt=receipt))

    def _failed(self, one: Batch, fault: Fault) -> None:
        if fault.moved:
            self._stale = True
        if fault.uncertain:
            one.uncertain = fault
        if (fault.moved or one.uncertain is not None) and fault.code not in EVENT and fault.code != "sequence":
            self._queue(one, first=True)
            return
        if fault.code == "sequence":
            self._id = None
        elif one.producer == self._id:
            one.partition.sequence = one.sequence
        if fault.code in EVENT and len(one.records) > 1:
            self._halve(one, fault)
        else:
            self._end(one, fault)

    def _halve(self, one: Batch, fault: Fault) -> None:
        """A batch is refused as a whole: its halves tell which event is at fault, or what size the topic takes."""
        middle = len(one.records) // 2
        if fault.code == "too_large":
            size = sum(len(record.value) + RECORD_OVERHEAD for record in one.records)
            one.partition.max_bytes = min(one.partition.max_bytes, max(size // 2, 1))
        for records in (one.records[middle:], one.records[:middle]):
            self._queue(Batch(one.partition, records), first=True)

    # ---------------------------------------------------------------- ends

    def _end(self, one: Batch, fault: Fault) -> None:
        one.over = True
        for record in one.records:
            self._finish(record, fault.outcome)

    def _finish(self, record: Record, outcome: Outcome) -> None:
        if record not in self._unanswered:
            return
        del self._unanswered[record]
        if not self._unanswered:
            self._pool.rested(self)
            if self._drained is not None and not self._drained.done():
                self._drained.set_result(None)
        record.done(outcome)

    def tick(self, now: float) -> None:
        """Ends what has reached its deadline."""
        while self._unanswered:
            record, one = next(iter(self._unanswered.items()))
            if record.deadline > now:
                break
            if one is None:
                self._finish(record, Fault("timeout").outcome)
            else:
                self._late(one)
        if now - self._looked_at > LOOKED_FOR_S:
            self._stale = True

    def _late(self, one: Batch) -> None:
        partition = one.partition
        if partition.flying is one:
            leader = self._leader(partition)
            if leader is not None:
                self._cluster.hang_up(leader)
        else:
            partition.ready.remove(one)
            if not partition.ready:
                del self._ready[partition]
        if one.content and one.producer == self._id:
            self._id = None  # whether its place in the sequence is taken is not known
        self._end(one, one.uncertain or Fault("timeout"))

    def abort(self, fault: Fault) -> None:
        """Ends everything at once."""
        for record in list(self._unanswered):
            self._finish(record, fault.outcome)

    def rest(self) -> None:
        """Gives up all connections, and all that it knows of its cluster. It must be idle."""
        for task in self._tasks:
            task.cancel()
        self._cluster.close()
        self._cluster = Cluster(self._reach)
        self._waiting.clear()
        self._partitions.clear()
        self._pending.clear()
        self._ready.clear()
        self._busy.clear()
        self._id = None
        self._stale, self._looking = True, False
        for timer in (self._lingering, self._again):
            if timer is not None:
                timer.cancel()
        self._lingering = self._again = None

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ran)

    def _ran(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled() or (bug := task.exception()) is None:
            return
        self._loop.call_exception_handler({"message": f"connector bug: {type(bug).__name__} at {place_of(bug)}"})
        self.abort(Fault("connector_error"))
        self._pool.leave(self)


class Producers:
    """The live producers behind a door: at most so many, each with a connection to every leader of its topic.

    One that is idle goes after a while, or when another needs its place. Where all are busy, who comes has to wait for
    its next attempt.
    """

    def __init__(self, egress: Egress, *, max_live: int = MAX_LIVE, idle_s: float = IDLE_S) -> None:
        self.ca_file = egress.ca_file
        self._max_live = max_live
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._live: dict[Producer, float] = {}  # idle since; those that were used last come last
        self._ticking: asyncio.TimerHandle | None = None

    @functools.cached_property
    def shared_context(self) -> ssl.SSLContext:
        """For all who have neither an authority nor a certificate of their own: it takes 900 KB."""
        return client_context(self.ca_file, alpn=())

    @property
    def live(self) -> int:
        return len(self._live)

    def enter(self, producer: Producer) -> bool:
        """Whether it may go to work."""
        if producer not in self._live and len(self._live) >= self._max_live:
            idle = next((one for one in self._live if one.idle), None)
            if idle is None:
                return False
            self.leave(idle)
        self.rested(producer)
        if self._ticking is None:
            self._ticking = self._loop.call_later(TICK_S, self._tick)
        return True

    def rested(self, producer: Producer) -> None:
        self._live.pop(producer, None)
        self._live[producer] = self._loop.time()

    def leave(self, producer: Producer) -> None:
        if self._live.pop(producer, None) is not None:
            producer.rest()

    def close(self) -> None:
        """What is under way ends with `closed`."""
        for producer in list(self._live):
            producer.abort(Fault("closed"))
            self.leave(producer)
        if self._ticking is not None:
            self._ticking.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        for producer in list(self._live):
            producer.tick(now)
        for producer, since in list(self._live.items()):
            if producer.idle and now - since > self._idle_s:
                self.leave(producer)
        self._ticking = self._loop.call_later(TICK_S, self._tick) if self._live else None


def ends_of(answer: Any, topic: str) -> dict[int, tuple[int, int]]:
    """Of a produce request's answer: by partition, the error, and the first record's offset where there is none."""
    ends: dict[int, tuple[int, int]] = {}
    for name, partitions in answer.topics or ():
        if name == topic:
            ends.update({number: (error, offset) for number, error, offset, *_ in partitions or ()})
    return ends
