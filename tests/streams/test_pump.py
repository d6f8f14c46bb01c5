"""The retry pump: what waits in virtual time, and the consumer on a real broker through kills, rebalances and members.

Records carry their own name as value; what was handed over is what a member's log names, or what `Hands` was given.
"""

import asyncio
import json
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaPartition
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as ConfluentPartition
from confluent_kafka.admin import AdminClient, NewTopic
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec import json as msgjson

from dev.stack import Stack
from routing.policy import HEAP_MS
from streams.offsets import Tracker
from streams.pump import RECORD_OVERHEAD_BYTES, Due, Pump, PumpSource, Shelf, Slot
from streams.transport import TopicPartition
from tests.streams.pump_process import Options

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 30.0
DAY_MS = 86_400_000
T0_MS = 1_795_000_000_000

# ----------------------------------------------------------------------------------------------- what waits, by itself


class Written(Struct, frozen=True):
    """A record as the broker returns it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    key: bytes | None = None


def written(partition: int, offset: int, appended_ms: int, not_before_ms: int | None, size: int = 10) -> Written:
    headers = () if not_before_ms is None else (("hg-not-before", b"%d" % not_before_ms),)
    return Written("t", partition, offset, appended_ms, b"x" * size, headers)


class Reader:
    """Partitions as logs in virtual time, read as a consumer would: in order, from a position that may be set back."""

    tiers_s = (1.0, 5.0, 30.0, 300.0)

    def __init__(self, logs: Sequence[Sequence[Written]], *, max_bytes: int = 64 * 2**20, fetch: int = 50) -> None:
        self.logs = logs
        self.fetch = fetch
        self.shelf = Shelf(self.tiers_s, max_bytes)
        self.slots = []
        for partition in range(len(logs)):
            source = PumpSource("t", partition, 1, lambda *_: None)
            self.slots.append(Slot(TopicPartition("t", partition), source, Tracker(1)))
        self.positions = [0] * len(logs)
        self.now_ms = T0_MS
        self.due: list[tuple[int, Due]] = []  # with the time when each was handed over
        self.moved: list[tuple[int, Due]] = []
        self.most_bytes = 0
        self.rounds = 0

    def read(self) -> None:
        for slot, log in zip(self.slots, self.logs, strict=True):
            position = self.positions[slot.at.partition]
            new = [record for record in log[position : position + self.fetch] if record.timestamp <= self.now_ms]
            if slot.full or not new:
                continue
            back = self.shelf.take(slot, new, self.now_ms)
            self.positions[slot.at.partition] = new[-1].offset + 1 if back is None else back
            assert (back is not None) == slot.full

    def collect(self) -> bool:
        due, moves, freed = self.shelf.collect(self.now_ms)
        self.due += [(self.now_ms, item) for item in due]
        self.moved += [(self.now_ms, item) for item in moves]
        for item in (*due, *moves):
            self.shelf.settled(self.slots[item.source.partition], (item.offset,))
        self.most_bytes = max(self.most_bytes, self.shelf.heads_bytes + self.shelf.rests_bytes)
        return bool(due or moves or freed)

    def run(self) -> None:
        """Until every log is through. Time goes on to whatever comes next: an append, or what the shelf asks for."""
        while True:
            self.rounds += 1
            self.read()
            if self.collect():
                continue
            appends = [
                log[position].timestamp
                for log, position, slot in zip(self.logs, self.positions, self.slots, strict=True)
                if position < len(log) and not slot.full
            ]
            next_ms = min([self.shelf.next_ms(), *appends])
            if next_ms == float("inf"):
                return
            self.now_ms = max(self.now_ms, int(next_ms))


@st.composite
def logs(draw: st.DrawFn) -> list[list[Written]]:
    made = []
    for partition in range(len(Reader.tiers_s) + 1):  # one beyond the list of tiers
        at_ms, log = T0_MS, []
        for offset in range(draw(st.integers(0, 40))):
            at_ms += draw(st.integers(0, 3000))
            wait_ms = draw(st.one_of(st.integers(-1000, 70_000), st.integers(0, 2 * DAY_MS)))
            not_before_ms = None if draw(st.integers(0, 9)) == 0 else at_ms + wait_ms
            log.append(written(partition, offset, at_ms, not_before_ms, draw(st.sampled_from([10, 3000]))))
        made.append(log)
    return made


@settings(max_examples=150, deadline=None)
@given(logs(), st.integers(1, 60), st.sampled_from([64 * 2**20, 40 * RECORD_OVERHEAD_BYTES]))
def test_every_record_is_handed_over_once_never_early_and_within_the_budget(
    made: list[list[Written]], fetch: int, max_bytes: int
) -> None:
    reader = Reader(made, max_bytes=max_bytes, fetch=fetch)
    reader.run()
    handed = [(item.record.partition, item.offset) for _, item in (*reader.due, *reader.moved)]
    assert sorted(handed) == [(record.partition, record.offset) for log in made for record in log]
    for at_ms, item in reader.due:
        tier_ms = (1000, 5000, 30_000, 300_000, 1000)[item.record.partition]
        assert at_ms >= item.due_ms
        assert at_ms >= item.record.timestamp + tier_ms
        if max_bytes == 64 * 2**20:
            assert at_ms <= max(item.due_ms, item.record.timestamp + tier_ms)
    for at_ms, item in reader.moved:
        assert item.due_ms - at_ms >= 1000
        if max_bytes == 64 * 2**20:
            assert item.due_ms - at_ms > HEAP_MS
    assert reader.most_bytes <= max_bytes + fetch * len(made) * (RECORD_OVERHEAD_BYTES + 3100)


@settings(max_examples=100, deadline=None)
@given(logs())
def test_the_shelf_asks_to_be_looked_at_only_when_something_is_to_be_done(made: list[list[Written]]) -> None:
    reader = Reader(made, fetch=1000)
    reader.run()
    records = sum(len(log) for log in made)
    assert reader.rounds <= 6 * records + 10


def test_thousands_that_wait_need_one_look_each_and_no_polling() -> None:
    made = [[written(0, offset, T0_MS, T0_MS + 40_000 + offset) for offset in range(5000)], [], [], []]
    reader = Reader(made, fetch=10_000)
    reader.run()
    assert [at_ms - item.due_ms for at_ms, item in reader.due] == [0] * 5000
    assert reader.rounds < 5000 * 3


def test_a_record_a_day_ahead_delays_nothing_behind_it() -> None:
    made: list[list[Written]] = [[], [], [written(2, 0, T0_MS, T0_MS + DAY_MS)], []]
    made[2] += [written(2, offset, T0_MS + offset, T0_MS + offset + 30_000) for offset in range(1, 100)]
    reader = Reader(made)
    reader.run()
    assert [item.offset for _, item in reader.moved] == [0]
    assert [at_ms - item.due_ms for at_ms, item in reader.due] == [0] * 99


def test_what_is_far_away_is_not_kept_in_memory_but_read_again_before_its_time() -> None:
    made: list[list[Written]] = [[], [], [], [written(3, o, T0_MS + o * 60_000, T0_MS, 10**6) for o in range(60)]]
    reader = Reader(made)
    reader.run()
    assert len(reader.due) == 60
    assert reader.most_bytes < 3 * 10**6


def test_a_copy_that_waits_here_is_not_handed_over_once_the_one_in_flight_has_settled_the_record() -> None:
    made: list[list[Written]] = [[written(0, 0, T0_MS, T0_MS), written(0, 1, T0_MS, T0_MS + 5000)], [], [], []]
    reader = Reader(made)
    reader.read()
    reader.shelf.settled(reader.slots[0], (0,))
    assert reader.slots[0].committable() == 1
    reader.now_ms += 1000
    reader.collect()
    assert not reader.due
    reader.shelf.settled(reader.slots[0], (1,))  # it waits in the heap now
    assert reader.slots[0].committable() == 2
    reader.now_ms += 5000
    reader.collect()
    assert not reader.due


def test_partitions_take_turns_so_that_a_flood_in_one_does_not_hold_up_another() -> None:
    flood = [written(0, offset, T0_MS, T0_MS) for offset in range(10_000)]
    one = [written(1, 0, T0_MS - 3_990, T0_MS)]
    reader = Reader([flood, one, [], []], fetch=10_000)
    reader.read()
    reader.now_ms += 1010
    reader.collect()
    reader.collect()
    assert one[0] in [item.record for _, item in reader.due]


# -------------------------------------------------------------------------------------------------------- on the broker


class Topics:
    """Retry topics of a prefix of the test's own, one partition a tier."""

    def __init__(self, bootstrap: str, tiers_s: Sequence[float]) -> None:
        self.bootstrap = bootstrap
        self.tiers_s = list(tiers_s)
        self.prefix = f"pump-{uuid.uuid4().hex[:8]}"
        self.group = f"{self.prefix}.retry"
        self.pattern = rf"^{self.prefix}\.default\.retry\.[a-z0-9-]+$"
        self.admin = AdminClient({"bootstrap.servers": bootstrap})
        self.producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "linger.ms": 5})

    def make(self, tag: str) -> str:
        name = f"{self.prefix}.default.retry.{tag}"
        config = {"message.timestamp.type": "LogAppendTime"}
        for made in self.admin.create_topics([NewTopic(name, len(self.tiers_s), 1, config=config)]).values():
            made.result(PATIENCE_S)
        return name

    def drop(self, topic: str) -> None:
        for dropped in self.admin.delete_topics([topic]).values():
            dropped.result(PATIENCE_S)

    def put(self, topic: str, partition: int, value: str, wait_ms: float) -> None:
        not_before_ms = int(time.time() * 1000 + wait_ms)
        headers = [("hg-not-before", str(not_before_ms).encode())]
        self.producer.produce(topic, value.encode(), partition=partition, headers=headers)
        self.producer.poll(0)

    def flush(self) -> None:
        assert self.producer.flush(PATIENCE_S) == 0

    def committed(self, topic: str) -> dict[int, int]:
        reader = Consumer({"bootstrap.servers": self.bootstrap, "group.id": self.group})
        try:
            places = [ConfluentPartition(topic, partition) for partition in range(len(self.tiers_s))]
            return {place.partition: place.offset for place in reader.committed(places, PATIENCE_S)}
        finally:
            reader.close()

    def waiting(self, topic: str) -> int:
        """Records (and no transaction markers: nothing here is transactional) that are not committed."""
        reader = Consumer({"bootstrap.servers": self.bootstrap, "group.id": self.group})
        try:
            left = 0
            for partition, offset in self.committed(topic).items():
                low, high = reader.get_watermark_offsets(ConfluentPartition(topic, partition), PATIENCE_S)
                left += high - max(low, offset)
            return left
        finally:
            reader.close()


class Hands:
    """What a pump hands over, and what becomes of it."""

    def __init__(self) -> None:
        self.due: list[Due] = []
        self.moved: list[Due] = []
        self.at_ms: dict[bytes | None, float] = {}
        self.keep: Callable[[Due], bool] = lambda _: False  # what is not settled
        self.fatal: list[BaseException] = []

    async def on_due(self, items: Sequence[Due]) -> None:
        now_ms = time.time() * 1000
        for item in items:
            self.due.append(item)
            self.at_ms[item.record.value] = now_ms
            if not self.keep(item):
                item.source.settled((item.offset,))

    async def on_move(self, items: Sequence[Due]) -> None:
        for item in items:
            self.moved.append(item)
            item.source.settled((item.offset,))

    def values(self) -> list[str]:
        return [(item.record.value or b"").decode() for item in self.due]


@asynccontextmanager
async def pumping(topics: Topics, hands: Hands, **more: Any) -> AsyncIterator[Pump]:
    pump = Pump(
        connection={"bootstrap_servers": topics.bootstrap},
        group=topics.group,
        pattern=topics.pattern,
        tiers_s=topics.tiers_s,
        on_due=hands.on_due,
        on_move=hands.on_move,
        on_fatal=hands.fatal.append,
        commit_interval_s=0.1,
        **more,
    )
    await pump.start()
    try:
        yield pump
    finally:
        await pump.close()


async def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never came: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
def topics(stack: Stack) -> Topics:
    return Topics(stack.settings()["HEADGATE_KAFKA_BOOTSTRAP"], (0.2, 1.0, 2.0))


@pytest.mark.broker
async def test_records_come_when_they_are_due_and_not_earlier(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()
    async with pumping(topics, hands) as pump:
        await until(pump.assigned, "an assignment")
        for number in range(600):
            topics.put(topic, 0, f"a{number}", 300 + number % 900)
            topics.put(topic, 1, f"b{number}", 1100)
            topics.put(topic, 2, f"c{number}", 2000 + number)
        topics.flush()
        await until(lambda: len(hands.due) == 1800, "all records")
        late_ms = [hands.at_ms[item.record.value] - item.due_ms for item in hands.due]
        assert min(late_ms) >= 0
        assert max(late_ms) < 1000
        assert not hands.moved
        assert pump.held_bytes == pump.due_waiting == 0
        await until(lambda: topics.waiting(topic) == 0, "the commit of all")
    assert not hands.fatal


class ByOwnDueTime:
    """The control: the head of a partition is held until its own due time."""

    def __init__(self, topics: Topics, topic: str) -> None:
        self.handed: list[str] = []
        self._consumer = AIOKafkaConsumer(bootstrap_servers=topics.bootstrap, auto_offset_reset="earliest")
        self._places = [KafkaPartition(topic, partition) for partition in range(len(topics.tiers_s))]

    async def run(self) -> None:
        await self._consumer.start()
        try:
            self._consumer.assign(self._places)
            await asyncio.gather(*[self._one(place) for place in self._places])
        finally:
            await self._consumer.stop()

    async def _one(self, place: KafkaPartition) -> None:
        while True:
            record = await self._consumer.getone(place)
            not_before_ms = int(dict(record.headers)["hg-not-before"])
            await asyncio.sleep(max(0.0, not_before_ms / 1000 - time.time()))
            self.handed.append(record.value.decode())


@pytest.mark.broker
async def test_one_record_with_a_day_to_wait_does_not_delay_the_records_behind_it(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()
    topics.put(topic, 1, "tomorrow", DAY_MS)
    topics.flush()
    for number in range(50):
        topics.put(topic, 1, f"now{number}", 1000)
    topics.flush()
    control = ByOwnDueTime(topics, topic)
    controlling = asyncio.create_task(control.run())
    async with pumping(topics, hands):
        await until(lambda: len(hands.due) == 50, "what is behind it")
        assert [item.record.value for item in hands.moved] == [b"tomorrow"]
    assert control.handed == []  # without tiers of constant wait all fifty would still be waiting for it
    controlling.cancel()
    await asyncio.gather(controlling, return_exceptions=True)


@pytest.mark.broker
async def test_a_topic_that_is_made_while_it_runs_is_read_within_seconds(topics: Topics) -> None:
    first, hands = topics.make("a"), Hands()
    async with pumping(topics, hands) as pump:
        await until(pump.assigned, "an assignment")
        second = topics.make("b")
        topics.put(second, 0, "new", 0)
        topics.put(first, 0, "old", 0)
        topics.flush()
        await until(lambda: sorted(hands.values()) == ["new", "old"], "both", patience_s=12)


@pytest.mark.broker
async def test_a_rebalance_loses_nothing_that_waits_though_nothing_was_ever_committed(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()
    async with pumping(topics, hands) as pump:
        await until(pump.assigned, "an assignment")
        for number in range(20):
            topics.put(topic, 2, f"waits{number}", 9_000)  # its tier, then the heap
            topics.put(topic, 0, f"heap{number}", 8_000)
        topics.flush()
        await until(lambda: pump.due_waiting == 40, "all in memory")
        topics.make("b")
        await until(lambda: len(pump.assigned()) == 6, "the rebalance")
        assert not hands.due
        await until(lambda: len(hands.due) == 40, "all of them after it")
        assert len(set(hands.values())) == 40


@pytest.mark.broker
async def test_what_was_settled_is_not_handed_over_again_after_a_rebalance_and_what_is_in_flight_is(
    topics: Topics,
) -> None:
    topic, hands = topics.make("a"), Hands()
    hands.keep = lambda item: item.record.value == b"r0"
    for number in range(100):
        topics.put(topic, 0, f"r{number}", 0)
    topics.flush()
    async with pumping(topics, hands, revoke_grace_s=0.1) as pump:
        await until(lambda: len(hands.due) == 100, "all once")
        topics.make("b")
        await until(lambda: len(pump.assigned()) == 6, "the rebalance")
        await until(lambda: len(hands.due) == 101, "the one in flight again")
        topics.put(topic, 0, "last", 0)
        topics.flush()
        await until(lambda: "last" in hands.values(), "what came after")
        assert hands.values()[100:] == ["r0", "last"]
        assert topics.committed(topic)[0] <= 0  # r0 holds it up
        hands.due[0].source.settled((hands.due[0].offset,))  # told of the first copy, from before the rebalance
        await until(lambda: topics.waiting(topic) == 0, "the commit of all")


@pytest.mark.broker
async def test_control_another_process_does_not_know_what_was_settled_beyond_the_prefix(topics: Topics) -> None:
    topic, hands, later = topics.make("a"), Hands(), Hands()
    hands.keep = lambda item: item.record.value == b"r0"
    for number in range(100):
        topics.put(topic, 0, f"r{number}", 0)
    topics.flush()
    async with pumping(topics, hands):
        await until(lambda: len(hands.due) == 100, "all once")
    async with pumping(topics, later):
        await until(lambda: len(later.due) == 100, "all again")


@pytest.mark.broker
async def test_while_paused_nothing_is_handed_over_and_nothing_is_lost(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()
    async with pumping(topics, hands) as pump:
        await until(pump.assigned, "an assignment")
        pump.pause("broker")
        pump.pause("memory")
        for number in range(50):
            topics.put(topic, 0, f"r{number}", 0)
        topics.flush()
        pump.resume("broker")
        await asyncio.sleep(1)  # its tier's time is long past
        assert not hands.due
        pump.resume("memory")
        await until(lambda: len(hands.due) == 50, "all of them")


@pytest.mark.broker
async def test_a_drained_pump_has_committed_what_was_settled_and_says_whether_that_was_all(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()
    hands.keep = lambda item: item.record.value == b"r9"
    for number in range(10):
        topics.put(topic, 0, f"r{number}", 0)
    topics.put(topic, 2, "waits", 60_000)
    topics.flush()
    async with pumping(topics, hands) as pump:
        await until(lambda: len(hands.due) == 10, "what is due")
        assert not await pump.drain(0.2)
        assert topics.committed(topic)[0] == 9
        hands.due[-1].source.settled((9,))
        assert await pump.drain(5)
    assert topics.committed(topic)[0] == 10


@pytest.mark.broker
async def test_a_topic_made_anew_under_its_name_is_read_from_its_beginning(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()
    async with pumping(topics, hands) as pump:
        for number in range(5):
            topics.put(topic, 0, f"old{number}", 0)
        topics.flush()
        await until(lambda: len(hands.due) == 5, "the old ones")
        topics.drop(topic)
        await until(lambda: not pump.assigned(), "its end")
        await until(lambda: topic not in topics.admin.list_topics(timeout=5).topics, "its end at the broker")
        topics.make("a")
        for number in range(5):
            topics.put(topic, 0, f"new{number}", 0)
        topics.flush()
        await until(lambda: len(hands.due) == 10, "the new ones")
        assert sorted(hands.values()[5:]) == [f"new{number}" for number in range(5)]


@pytest.mark.broker
async def test_a_bug_of_whoever_takes_the_records_ends_the_pump_aloud(topics: Topics) -> None:
    topic, hands = topics.make("a"), Hands()

    def broken(_: Due) -> bool:
        raise RuntimeError("a bug")

    hands.keep = broken
    topics.put(topic, 0, "r", 0)
    topics.flush()
    async with pumping(topics, hands):
        await until(lambda: hands.fatal, "word of it")
        assert [str(fault) for fault in hands.fatal] == ["a bug"]


# ----------------------------------------------------------------------------------------------- several members, kills


class Members:
    """Members of the group as processes, and what their logs say they handed over."""

    def __init__(self, topics: Topics, folder: Path) -> None:
        self.topics = topics
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []
        self._number = 0

    def join(self, **more: Any) -> subprocess.Popen[bytes]:
        self._number += 1
        options = Options(
            bootstrap=self.topics.bootstrap,
            group=self.topics.group,
            pattern=self.topics.pattern,
            log=str(self.folder / f"{self._number}.log"),
            tiers_s=self.topics.tiers_s,
            **more,
        )
        command = [sys.executable, "-m", "tests.streams.pump_process", msgjson.encode(options).decode()]
        process = subprocess.Popen(command, cwd=REPOSITORY)
        self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes], sign: signal.Signals) -> int:
        process.send_signal(sign)
        self.running.remove(process)
        return process.wait(PATIENCE_S)

    def entries(self, what: str) -> list[dict[str, Any]]:
        found = []
        for log in sorted(self.folder.glob("*.log")):
            for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # a kill may leave half of one
                    entry = json.loads(line)
                    if entry["what"] == what:
                        found.append(entry)
        return found

    def handed(self) -> Counter[str]:
        return Counter(entry["value"] for entry in self.entries("due"))


@pytest.fixture
def members(topics: Topics, tmp_path: Path) -> Iterator[Members]:
    made = Members(topics, tmp_path)
    try:
        yield made
    finally:
        for process in made.running:
            process.kill()
            process.wait()


def feed(topics: Topics, topic: str, start: int, number: int) -> None:
    for place in range(start, start + number):
        topics.put(topic, place % 3, f"r{place}", (200, 1000, 2000)[place % 3] + place % 700)
    topics.flush()


@pytest.mark.broker
async def test_killed_members_lose_nothing_and_nothing_comes_early(topics: Topics, members: Members) -> None:
    topic = topics.make("a")
    topics.make("b")
    members.join(instance_id="w0-retry", work_s=0.05)
    members.join(work_s=0.05)
    sent = done = 0
    for kill in range(6):
        feed(topics, topic, sent, 400)
        sent += 400
        # killed as soon as something was committed: what was settled since then comes again
        await until(lambda done=done: sum(topics.committed(topic).values()) > done + 50, "a commit")  # type: ignore[misc]
        done = sum(topics.committed(topic).values())
        if kill % 2:
            members.end(members.running[-1], signal.SIGKILL)
            members.join(work_s=0.05)
        else:
            members.end(members.running[0], signal.SIGKILL)
            members.running.insert(0, members.join(instance_id="w0-retry", work_s=0.05))
            members.running.pop()
    await until(lambda: len(members.handed()) == sent, "every record")
    await until(lambda: topics.waiting(topic) == 0, "the commit of all")
    assert set(members.handed()) == {f"r{place}" for place in range(sent)}
    assert all(entry["at_ms"] >= entry["due_ms"] for entry in members.entries("due"))
    assert sum(members.handed().values()) <= 2 * sent


@pytest.mark.broker
async def test_members_that_join_and_leave_lose_nothing_and_hand_over_little_twice(
    topics: Topics, members: Members
) -> None:
    topic = topics.make("a")
    members.join()
    await until(lambda: members.entries("started"), "the first member")
    sent, joined = 0, 1
    for change in range(6):
        feed(topics, topic, sent, 400)
        sent += 400
        seen = len(members.handed())
        await until(lambda seen=seen: len(members.handed()) > seen + 50, "some of them")  # type: ignore[misc]
        if change % 3 < 2:
            members.join()
            joined += 1
            await until(lambda joined=joined: len(members.entries("started")) == joined, "a member")  # type: ignore[misc]
        else:
            for process in members.running[:2]:
                assert members.end(process, signal.SIGTERM) == 0
    await until(lambda: len(members.handed()) == sent, "every record")
    assert set(members.handed()) == {f"r{place}" for place in range(sent)}
    assert len({entry["pid"] for entry in members.entries("due")}) >= 3
    # settled behind one that still waited in memory: the commit had not passed it. The ledger knows them
    assert sum(members.handed().values()) <= 1.25 * sent
    assert all(entry["whole"] for entry in members.entries("stopped"))


@pytest.mark.broker
async def test_what_waits_longer_than_memory_allows_goes_round_and_still_comes_once_through_a_kill(
    topics: Topics, members: Members
) -> None:
    topic = topics.make("a")
    first = members.join(max_bytes=20 * RECORD_OVERHEAD_BYTES, instance_id="w0-retry")
    for number in range(200):
        topics.put(topic, 0, f"r{number}", 4000 + number)  # room for 15 of them in memory: the rest is sent on
    topics.flush()
    await until(lambda: members.entries("moved"), "one that is sent on")
    members.end(first, signal.SIGKILL)
    members.join(max_bytes=20 * RECORD_OVERHEAD_BYTES, instance_id="w0-retry")
    await until(lambda: len(members.handed()) == 200, "all of them")
    assert all(entry["at_ms"] >= entry["due_ms"] for entry in members.entries("due"))


@pytest.mark.broker
async def test_a_static_member_whose_id_is_taken_stops_and_says_which(topics: Topics, members: Members) -> None:
    topics.make("a")
    first = members.join(instance_id="w0-retry")
    await until(lambda: members.entries("started"), "the first")
    await asyncio.sleep(1)
    members.join(instance_id="w0-retry")
    await until(lambda: first.poll() is not None, "the end of the first")
    assert first.returncode == 1
    assert "w0-retry" in members.entries("fatal")[0]["reason"]
