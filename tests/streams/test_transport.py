"""Faust, made safe, on a real broker: what is committed, what comes again, what never comes.

Workers are processes (`worker_process.py`) that keep a journal; the truth is the journal and the group's committed
offsets. Each safeguard has a control that shows what happens without it.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from dev import stack as embedded
from dev.stack import Stack
from streams import transport
from streams.transport import Fetch, Fetching, Hooks, SafeApp, fetch_of, safe_app

pytestmark = pytest.mark.broker

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 60.0


def eventually(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline_s = time.monotonic() + patience_s
    while not (held := condition()):
        assert time.monotonic() < deadline_s, f"never came: {what}"
        time.sleep(0.03)
    return held


class Worker:
    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log

    def journal(self, what: str) -> list[dict[str, Any]]:
        """Happenings of this process, in order."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        return [entry for line in lines if (entry := json.loads(line))["what"] == what]

    def taken(self, partition: int | None = None, generation: int | None = None) -> list[tuple[int, int]]:
        return [
            (entry["partition"], offset)
            for entry in self.journal("taken")
            if partition in (None, entry["partition"]) and generation in (None, entry.get("generation"))
            for offset in entry["offsets"]
        ]

    def settled(self) -> list[tuple[int, int]]:
        return [(entry["partition"], offset) for entry in self.journal("settled") for offset in entry["offsets"]]

    def tell(self, sign: signal.Signals) -> None:
        self.process.send_signal(sign)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


class Lab:
    """One topic, one group, and the processes that read it."""

    def __init__(self, bootstrap: str, folder: Path, partitions: int, **topic_config: str) -> None:
        tag = uuid.uuid4().hex[:10]
        self.bootstrap = bootstrap
        self.folder = folder
        self.partitions = partitions
        self.topic = f"transport-{tag}"
        self.group = f"transport.{tag}"
        self.admin = AdminClient({"bootstrap.servers": bootstrap})
        self.topic_config = topic_config
        self.make_topic()
        self.producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "message.max.bytes": 8 * 2**20})
        self._reader = Consumer({"bootstrap.servers": bootstrap, "group.id": self.group})
        self.workers: list[Worker] = []

    def make_topic(self) -> None:
        wanted = NewTopic(self.topic, self.partitions, 1, config=self.topic_config)
        for made in self.admin.create_topics([wanted]).values():
            made.result()

    def publish(self, count: int, first: int = 0) -> None:
        """Record `n` goes to partition `n % partitions`, with the value `v<n>`."""
        for number in range(first, first + count):
            self.producer.produce(self.topic, b"v%d" % number, partition=number % self.partitions)
        assert self.producer.flush(30) == 0

    def committed(self) -> list[int]:
        asked = [TopicPartition(self.topic, partition) for partition in range(self.partitions)]
        return [found.offset for found in self._reader.committed(asked, timeout=20)]

    def start(self, **options: Any) -> Worker:
        number = len(self.workers)
        log = self.folder / f"worker-{number}.log"
        wanted = {
            "bootstrap": self.bootstrap,
            "group": self.group,
            "topics": [self.topic],
            "log": str(log),
            "datadir": str(self.folder / f"faust-{number}"),
            **options,
        }
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker_process.py")), json.dumps(wanted)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=(self.folder / f"worker-{number}.out").open("w"),
            stderr=(self.folder / f"worker-{number}.err").open("w"),
            text=True,
        )
        worker = Worker(process, log)
        self.workers.append(worker)
        return worker

    def errors(self, worker: Worker) -> str:
        return worker.log.with_suffix(".err").read_text()

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        self._reader.close()


@pytest.fixture
def lab(stack: Stack, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(stack.kafka_bootstrap, tmp_path, partitions=2)
    yield made
    made.close()


@pytest.fixture
def wide(stack: Stack, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(stack.kafka_bootstrap, tmp_path, partitions=4)
    yield made
    made.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    """A stack of this test alone, to be broken."""
    try:
        yield embedded.up(tmp_path / "dev")
    finally:
        embedded.down(tmp_path / "dev")


# ------------------------------------------------------------------------------------------------- held records, kills


HELD = (0, 57)


def kill_with_a_held_record(lab: Lab, **options: Any) -> tuple[list[int], Worker]:
    """201 records a partition, one never finishes; SIGKILL; what was committed, and the worker that follows."""
    lab.publish(400)
    first = lab.start(hold=[HELD], **options)
    eventually(lambda: lab.committed()[1] == 200 and lab.committed()[0] >= 57, "a commit")
    lab.publish(2, first=400)
    eventually(lambda: lab.committed()[1] == 201, "a later commit")
    first.kill()
    committed = lab.committed()
    lab.publish(2, first=402)
    second = lab.start(**options)
    eventually(lambda: {(0, 201), (1, 201)} <= set(second.taken()), "the next records")
    return committed, second


def test_a_held_record_is_never_committed_past_and_comes_again_after_a_kill(lab: Lab) -> None:
    committed, second = kill_with_a_held_record(lab, instance_id="w1")
    assert committed == [57, 201]
    assert HELD in second.taken()
    eventually(lambda: lab.committed() == [202, 202], "the whole commit")


def test_stock_faust_commits_past_a_held_record_and_loses_it(lab: Lab) -> None:
    """The control: the same record, the same kill, Faust as it comes."""
    committed, second = kill_with_a_held_record(lab, instance_id="w1", stock=True)
    assert committed == [201, 201]
    assert HELD not in second.taken()


def test_a_drained_worker_leaves_nothing_half_done(lab: Lab) -> None:
    lab.publish(400)
    first = lab.start(work_s=0.4, max_records=20, buffer_events=2, commit_interval_s=60.0)
    eventually(lambda: len(first.taken()) >= 40, "some work")
    assert first.end() == 0
    assert [entry["whole"] for entry in first.journal("drained")] == [True]
    assert sum(max(0, offset) for offset in lab.committed()) == len(first.taken()) == len(first.settled())
    second = lab.start()
    eventually(lambda: lab.committed() == [200, 200], "the rest")
    assert Counter(first.taken() + second.taken()) == Counter((p, o) for p in range(2) for o in range(200))


def test_a_drain_that_cannot_finish_ends_at_its_deadline_and_commits_the_prefix(lab: Lab) -> None:
    lab.publish(400)
    worker = lab.start(hold=[HELD], drain_s=0.5, commit_interval_s=60.0)
    eventually(lambda: len(worker.settled()) == 399, "all others settled")
    assert worker.end() == 0
    assert [entry["whole"] for entry in worker.journal("drained")] == [False]
    assert lab.committed() == [57, 200]


# --------------------------------------------------------------------------------------------------------- rebalances


def join_while_records_are_open(wide: Lab, **options: Any) -> tuple[Worker, Worker]:
    """100 records a partition, one of each is held; only a revocation commits; then a second member joins."""
    held = [(partition, 60) for partition in range(4)]
    wide.publish(400)
    first = wide.start(hold=held, commit_interval_s=600.0, revoke_grace_s=0.2, **options)
    eventually(lambda: len(first.settled()) == 396, "all others settled")
    assert max(wide.committed()) < 0
    second = wide.start(commit_interval_s=600.0)
    eventually(lambda: second.journal("assigned") and second.taken(), "the second member's first records")
    eventually(lambda: len(first.journal("assigned")) == 2, "the first member's second assignment")
    return first, second


def test_what_was_settled_is_committed_before_a_partition_is_given_up(wide: Lab) -> None:
    first, second = join_while_records_are_open(wide)
    moved = {partition for _topic, partition in second.journal("assigned")[-1]["partitions"]}
    kept = {0, 1, 2, 3} - moved
    assert moved and kept
    assert set(wide.committed()) == {60}
    eventually(lambda: {(p, o) for p in moved for o in range(60, 100)} == set(second.taken()), "the open ones")
    # here the records behind the held one were settled already: they do not come a second time
    eventually(lambda: {(p, 60) for p in kept} == set(first.taken(generation=2)), "the held ones, again")
    wide.publish(4, first=400)
    eventually(lambda: {(p, 100) for p in range(4)} <= {*first.taken(), *second.taken()}, "new ones")
    assert all(count == 1 for (_, offset), count in Counter(second.taken()).items())


def test_without_that_commit_settled_records_come_again(wide: Lab) -> None:
    """The control: a member that is killed makes no last commit."""
    wide.publish(400)
    first = wide.start(commit_interval_s=600.0)
    eventually(lambda: len(first.settled()) == 400, "all settled")
    first.kill()
    assert max(wide.committed()) < 0
    second = wide.start()
    eventually(lambda: set(second.taken()) == set(first.taken()), "everything, again")


def test_what_settles_late_counts_for_the_next_assignment(wide: Lab) -> None:
    first, _second = join_while_records_are_open(wide)
    eventually(lambda: first.taken(generation=2), "the held ones, again")
    first.tell(signal.SIGUSR1)  # settles them under the source of the first assignment
    eventually(lambda: first.journal("released"), "the release")
    assert first.end() == 0
    kept = {partition for _topic, partition in first.journal("assigned")[-1]["partitions"]}
    assert {wide.committed()[partition] for partition in kept} == {100}


def test_a_full_queue_survives_a_rebalance(wide: Lab) -> None:
    wide.publish(2000)
    first = wide.start(stall=True, buffer_events=1, max_records=10)
    eventually(first.taken, "the first fetch")
    second = wide.start(buffer_events=1, max_records=10)
    eventually(lambda: len(first.journal("assigned")) == 2 and second.journal("assigned"), "the rebalance")
    first.tell(signal.SIGUSR1)
    eventually(lambda: wide.committed() == [500] * 4, "everything")
    seen = Counter(first.taken() + second.taken())
    assert set(seen) == {(p, o) for p in range(4) for o in range(500)}


def test_members_that_come_and_go_lose_nothing(wide: Lab) -> None:
    wide.publish(1000)
    steady = wide.start(work_s=0.02, max_records=25)
    for round_ in range(3):
        guest = wide.start(work_s=0.02, max_records=25)
        eventually(lambda guest=guest: guest.journal("assigned"), "the guest")
        wide.publish(400, first=1000 + 400 * round_)
        eventually(guest.taken, "the guest's first records")
        if round_ == 1:
            guest.kill()
        else:
            assert guest.end() == 0
    eventually(lambda: wide.committed() == [550] * 4, "everything")
    seen = {at for worker in wide.workers for at in worker.settled()}
    assert seen == {(p, o) for p in range(4) for o in range(550)}
    assert steady.end() == 0


# ------------------------------------------------------------------------------------------------------ static members


def two_members_one_killed(lab: Lab, *, static: bool) -> tuple[Worker, Worker]:
    """One of two members is killed and comes back; the other one, and the one that came back."""
    stays = lab.start(instance_id="stays" if static else None)
    eventually(lambda: stays.journal("assigned"), "the first member")
    goes = lab.start(instance_id="goes" if static else None)
    eventually(lambda: goes.journal("assigned"), "the second member")
    eventually(lambda: len(stays.journal("assigned")) == 2, "both members")
    goes.kill()
    back = lab.start(instance_id="goes" if static else None)
    eventually(lambda: back.journal("assigned"), "the one that comes back")
    lab.publish(20)
    eventually(lambda: len({*stays.taken(), *back.taken()}) == 20, "all records")
    return stays, back


def test_a_static_member_that_was_killed_comes_back_without_a_rebalance(lab: Lab) -> None:
    stays, back = two_members_one_killed(lab, static=True)
    assert back.taken() and stays.taken()
    assert len(stays.journal("revoked")) == 1  # by the second member's first coming alone


def test_a_dynamic_member_that_was_killed_makes_all_others_rebalance(lab: Lab) -> None:
    """The control for static membership."""
    stays, _back = two_members_one_killed(lab, static=False)
    eventually(lambda: len(stays.journal("revoked")) >= 2, "another rebalance")


def test_a_worker_whose_id_is_taken_ends_and_says_which(lab: Lab) -> None:
    first = lab.start(instance_id="w1")
    eventually(lambda: first.journal("assigned"), "the first one")
    second = lab.start(instance_id="w1")
    assert first.process.wait(30) == 1
    assert "'w1' is taken" in lab.errors(first)
    lab.publish(20)
    eventually(lambda: len(second.taken()) == 20, "the one that took it goes on")
    assert second.process.poll() is None
    assert len(second.journal("assigned")) == 1  # nobody took it back


def test_an_agent_that_raises_ends_the_worker_and_loses_nothing(lab: Lab) -> None:
    lab.publish(40)
    first = lab.start(raise_on=b64encode(b"v7").decode())
    assert first.process.wait(30) == 1
    assert "a bug" in lab.errors(first)
    assert lab.committed()[1] < 7
    second = lab.start()
    eventually(lambda: lab.committed() == [20, 20], "everything")
    assert {*first.settled(), *second.settled()} == {(p, o) for p in range(2) for o in range(20)}


# -------------------------------------------------------------------------------------------------- what is in the log


def test_records_of_aborted_transactions_never_come_and_markers_hold_up_nothing(lab: Lab) -> None:
    writer = Producer({"bootstrap.servers": lab.bootstrap, "transactional.id": lab.group})
    writer.init_transactions(20)
    for number in range(12):
        writer.begin_transaction()
        for partition in range(2):
            writer.produce(lab.topic, b"good" if number % 2 else b"bad", partition=partition)
        writer.flush(20)
        if number % 2:
            writer.commit_transaction(20)
        else:
            writer.abort_transaction(20)
    worker = lab.start()
    # a transaction is two offsets, its record and its marker; the last good record of each partition is 22
    eventually(lambda: lab.committed() == [23, 23], "the commit behind all the holes")
    values = [value for entry in worker.journal("taken") for value in entry["values"]]
    assert values == ["good"] * 12
    writer.begin_transaction()
    writer.produce(lab.topic, b"open", partition=0)
    writer.flush(20)
    lab.producer.produce(lab.topic, b"after", partition=0)
    lab.producer.produce(lab.topic, b"after", partition=1)
    lab.producer.flush(20)
    eventually(lambda: (1, 24) in worker.taken(), "the other partition goes on")
    assert (0, 25) not in worker.taken()
    writer.commit_transaction(20)
    eventually(lambda: {(0, 24), (0, 25)} <= set(worker.taken()), "what waited for the transaction")


def test_a_topic_that_is_made_anew_is_read_from_its_start(lab: Lab) -> None:
    lab.publish(40)
    worker = lab.start(metadata_max_age_s=1.0)
    eventually(lambda: lab.committed() == [20, 20], "the first log")
    for gone in lab.admin.delete_topics([lab.topic]).values():
        gone.result()
    eventually(lambda: lab.topic not in lab.admin.list_topics(timeout=20).topics, "the deletion")
    lab.make_topic()
    eventually(lambda: lab.topic in lab.admin.list_topics(timeout=20).topics, "the topic again")
    lab.publish(10, first=1000)
    eventually(
        lambda: {"v1000", "v1009"} <= {value for entry in worker.journal("taken") for value in entry["values"]},
        "the records of the new log",
    )
    eventually(lambda: lab.committed() == [5, 5], "their commit")


# --------------------------------------------------------------------------------------------------- broker away, ports


def test_a_broker_restart_is_ridden_out(own: Stack, tmp_path: Path) -> None:
    lab = Lab(own.kafka_bootstrap, tmp_path, partitions=2)
    try:
        worker = lab.start(instance_id="w1")
        lab.publish(100)
        eventually(lambda: lab.committed() == [50, 50], "before")
        for number in range(2):
            own.stop_kafka(kill=number == 1)
            own.start_kafka()
            lab.publish(100, first=100 * (number + 1))
        eventually(lambda: lab.committed() == [150, 150], "after", patience_s=120)
        assert set(worker.taken()) == {(p, o) for p in range(2) for o in range(150)}
        assert not worker.journal("fatal")
        assert worker.end() == 0

        # and with the broker away for good a drain still ends
        last = lab.start(instance_id="w1", hold=[(0, 150)], drain_s=1.0, commit_timeout_s=1.0)
        lab.publish(2, first=300)
        eventually(lambda: {(0, 150), (1, 150)} <= set(last.taken()), "one more")
        own.stop_kafka()
        last.process.terminate()
        eventually(lambda: last.journal("drained"), "the end of the drain")
        assert [entry["whole"] for entry in last.journal("drained")] == [False]
    finally:
        lab.close()


def test_a_worker_makes_no_topic_and_listens_on_no_port(lab: Lab) -> None:
    before = set(lab.admin.list_topics(timeout=20).topics)
    worker = lab.start()
    lab.publish(20)
    eventually(lambda: lab.committed() == [10, 10], "its work")
    listening = [at for at in psutil.Process(worker.process.pid).net_connections() if at.status == psutil.CONN_LISTEN]
    assert listening == []
    new = set(lab.admin.list_topics(timeout=20).topics) - before
    assert not {topic for topic in new if lab.group in topic or "faust" in topic or "assignor" in topic}


# ----------------------------------------------------------------------------------- the consumer, from the inside loop


@asynccontextmanager
async def reading(
    lab: Lab, take: Callable[[SafeApp, Fetch], None], hooks: Hooks = transport.NO_HOOKS, **options: Any
) -> AsyncIterator[SafeApp]:
    app = safe_app(
        group=lab.group,
        bootstrap=lab.bootstrap,
        datadir=lab.folder / "faust",
        max_record_bytes=8 * 2**20,
        commit_interval_s=0.1,
        hooks=hooks,
        **options,
    )

    @app.reads(lab.topic)
    async def agent(stream: Any) -> None:
        async for event in stream.noack().events():
            take(app, fetch_of(event))

    await app.start()
    try:
        yield app
    finally:
        await app.reader.drain(0.5)
        await app.stop()


async def soon(condition: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        if condition():
            return
        assert time.monotonic() < deadline_s, f"never came: {what}"
        await asyncio.sleep(0.02)


async def test_records_come_as_they_were_written(lab: Lab) -> None:
    large = os.urandom(2 * 2**20 + 128 * 1024)
    for config in lab.admin.incremental_alter_configs([size_of(lab.topic, 8 * 2**20)]).values():
        config.result()
    lab.producer.produce(lab.topic, None, None, partition=0)
    lab.producer.produce(lab.topic, b"v", b"k", partition=0, headers=[("a", b"1"), ("a", b"\xff"), ("b", None)])
    lab.producer.produce(lab.topic, large, b"", partition=0)
    assert lab.producer.flush(30) == 0
    got: list[Any] = []

    def take(app: SafeApp, fetch: Fetch) -> None:
        got.extend(fetch.records)
        app.reader.settled(fetch.source, [record.offset for record in fetch.records])

    async with reading(lab, take):
        await soon(lambda: len(got) == 3, "three records")
    nothing, small, big = got
    assert (nothing.key, nothing.value) == (None, None)
    assert (small.key, small.value, list(small.headers)) == (b"k", b"v", [("a", b"1"), ("a", b"\xff"), ("b", None)])
    assert (big.key, big.value) == (b"", large)
    assert lab.committed()[0] == 3


def size_of(topic: str, max_bytes: int) -> Any:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    entry = ConfigEntry("max.message.bytes", str(max_bytes), incremental_operation=AlterConfigOpType.SET)
    return ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])


async def test_nothing_is_handed_over_while_fetching_is_paused_and_membership_is_kept(lab: Lab) -> None:
    got: list[int] = []
    seen: list[str] = []
    hooks = Hooks(on_assigned=lambda whole: seen.append("assigned"), on_revoked=lambda whole: seen.append("revoked"))

    def take(app: SafeApp, fetch: Fetch) -> None:
        got.extend(record.offset for record in fetch.records)
        app.reader.settled(fetch.source, [record.offset for record in fetch.records])

    async with reading(lab, take, hooks) as app:
        await soon(lambda: len(app.reader.assigned) == 2, "the assignment")
        app.reader.pause_fetch("memory")
        app.reader.pause_fetch("broker")
        await asyncio.to_thread(lab.publish, 20)
        app.reader.resume_fetch("memory")
        # the broker's answers come in, and lie there
        await soon(lambda: sum(lag.unread for lag in app.reader.lags(0)) == 20, "the records on the broker")
        assert got == []
        assert app.reader.paused_by == {"broker"}
        app.reader.resume_fetch("broker")
        await soon(lambda: len(got) == 20, "the records")
        assert seen == ["assigned"]


async def test_lag_names_what_is_unread_what_is_open_and_since_when(lab: Lab) -> None:
    fetches: list[Fetch] = []
    async with reading(lab, lambda app, fetch: fetches.append(fetch)) as app:
        await soon(lambda: len(app.reader.assigned) == 2, "the assignment")
        before_ms = int(time.time() * 1000) - 1000
        await asyncio.to_thread(lab.publish, 20)
        await soon(lambda: app.reader.unsettled == 20, "all taken")
        now_ms = int(time.time() * 1000)
        for lag in app.reader.lags(now_ms):
            assert (lag.unread, lag.unsettled, lag.committed) == (0, 10, None)
            assert lag.oldest_at_ms is not None and before_ms <= lag.oldest_at_ms <= now_ms
        for fetch in fetches:
            app.reader.settled(fetch.source, [record.offset for record in fetch.records])
        await soon(lambda: lab.committed() == [10, 10], "the commit")
        await soon(lambda: all(lag.committed == 10 for lag in app.reader.lags(now_ms)), "its memory")
        assert {(lag.unread, lag.unsettled, lag.oldest_at_ms) for lag in app.reader.lags(now_ms)} == {(0, 0, None)}


async def test_what_waits_for_the_agent_is_bounded_in_bytes(lab: Lab) -> None:
    """Values of 10 kB, a bound of 50 kB: what the agent has not taken stays with the broker and aiokafka."""
    for number in range(200):
        lab.producer.produce(lab.topic, b"x" * 10_000, partition=number % 2)
    assert lab.producer.flush(30) == 0
    fetches: list[Fetch] = []

    def take(app: SafeApp, fetch: Fetch) -> None:
        fetches.append(fetch)
        app.reader.settled(fetch.source, [record.offset for record in fetch.records])

    bound = Fetching(buffer_bytes=50_000, max_records=5)
    waiting: list[int] = []

    async with reading(lab, take, fetching=bound) as app:
        while sum(len(fetch.records) for fetch in fetches) < 200:
            await asyncio.sleep(0)
            waiting.append(app.reader.unsettled)  # what was taken is settled
    assert 0 < max(waiting) <= 10
