"""The control reader on a real broker: caught up means all of it, changes are live, and nothing ends it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from confluent_kafka import Producer
from structlog.testing import capture_logs

from config.kafka import read_to_end
from config.provision import provision
from config.registry import Registry
from config.settings import Settings
from config.vault import MasterKeys, new_data_key
from dev import stack as embedded
from dev.stack import Stack
from schemas.control import ControlKey, ControlRecord, TenantRecord, encode_control
from schemas.ids import ExternalId, TenantRef, Vendor
from schemas.topics import base_topics
from streams.control import ControlReader

pytestmark = pytest.mark.broker

PATIENCE_S = 30.0
VENDOR = Vendor("default")


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never came: {what}"
        await asyncio.sleep(0.01)


class Plane:
    """A control plane of its own, and a writer for it that uses transactions as `apply` does."""

    def __init__(self, bootstrap: str) -> None:
        prefix = f"control-{uuid.uuid4().hex[:8]}"
        self.settings = Settings.load({"HEADGATE_KAFKA_BOOTSTRAP": bootstrap, "HEADGATE_PREFIX": prefix})
        self.topics = self.settings.topics
        self.master = MasterKeys({"k1": new_data_key()})
        self.registry = Registry(self.master, self.topics)
        self.reader = ControlReader(self.settings, self.registry)
        self._producer: Producer | None = None

    def make_topics(self) -> "Plane":
        specs = base_topics(self.topics, (), self.settings.sizes)
        kafka = self.settings.kafka.confluent()
        provision(kafka, specs, replication_factor=1, grow=frozenset(), say=lambda _: None)
        return self

    @property
    def producer(self) -> Producer:
        if self._producer is None:
            name = f"{self.topics.prefix}.apply"
            self._producer = Producer({**self.settings.kafka.confluent(), "transactional.id": name, "linger.ms": 0})
            self._producer.init_transactions(30)
        return self._producer

    def begin(self, rows: Iterable[tuple[str, bytes, bytes | None]]) -> None:
        self.producer.begin_transaction()
        for topic, key, value in rows:
            self.producer.produce(topic, key=key, value=value, partition=0)
        self.producer.flush(30)

    def commit(self, rows: Iterable[tuple[str, bytes, bytes | None]]) -> None:
        """Returns, as `apply` does, once a reader has seen it: the broker answers a commit before readers do."""
        self.producer.commit_transaction(30)
        unseen = set(rows)
        while unseen:
            for message in read_to_end(self.settings.kafka.confluent(), sorted({row[0] for row in unseen}), "test"):
                unseen.discard((message.topic(), message.key(), message.value()))

    def abort(self) -> None:
        self.producer.abort_transaction(30)

    def write(self, *rows: tuple[str, bytes, bytes | None]) -> None:
        self.begin(rows)
        self.commit(rows)

    def tenant(self, name: str, version: int = 1) -> list[tuple[str, bytes, bytes | None]]:
        """All records of a tenant without destinations."""
        ref = TenantRef(VENDOR, ExternalId(name))

        def row(topic: str, kind: str, ident: str, record: ControlRecord) -> tuple[str, bytes, bytes]:
            return topic, ControlKey(kind, ref.vendor, ref.tenant, ident).encode(), encode_control(record)

        return [
            row(self.topics.keys, "key", "1", self.master.wrap(ref, 1, new_data_key())),
            row(self.topics.control, "tenant", "", TenantRecord(ref.tenant, name, name, version, 1)),
        ]

    def version(self, name: str) -> int | None:
        return self.registry.versions.get(TenantRef(VENDOR, ExternalId(name)))


@asynccontextmanager
async def reading(plane: Plane) -> AsyncIterator[ControlReader]:
    reader = plane.reader
    await reader.start()
    try:
        yield reader
        assert reader.alive
    finally:
        await reader.stop()


async def caught_up(reader: ControlReader) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await reader.caught_up.wait()


@pytest.fixture
def plane(stack: Stack) -> Plane:
    return Plane(stack.kafka_bootstrap).make_topics()


async def test_caught_up_means_that_all_of_it_has_been_folded(plane: Plane) -> None:
    for start in range(0, 2000, 500):
        plane.write(*[row for number in range(start, start + 500) for row in plane.tenant(f"t{number}")])
    # the ends of the topics hold no record: an aborted transaction, then its marker
    plane.begin(plane.tenant("aborted"))
    plane.abort()
    async with reading(plane) as reader:
        await caught_up(reader)
        assert len(plane.registry) == 2000  # at this very moment, not a little later
        assert plane.version("aborted") is None
        assert reader.offset >= 2000


async def test_empty_topics_are_caught_up_with(plane: Plane) -> None:
    async with reading(plane) as reader:
        await caught_up(reader)
        assert len(plane.registry) == 0


async def test_a_change_is_live_by_itself(plane: Plane) -> None:
    plane.write(*plane.tenant("acme"))
    async with reading(plane) as reader:
        await caught_up(reader)
        for version in range(2, 7):
            plane.write(*plane.tenant("acme", version))
            await eventually(lambda version=version: plane.version("acme") == version, f"version {version}")  # type: ignore[misc]


async def test_an_open_transaction_is_neither_seen_nor_waited_for(plane: Plane) -> None:
    async with reading(plane) as reader:
        await caught_up(reader)
        rows = plane.tenant("acme")
        plane.begin(rows)
        async with asyncio.timeout(PATIENCE_S):
            await reader.read_to_end()
        assert plane.version("acme") is None
        plane.commit(rows)
        async with asyncio.timeout(PATIENCE_S):
            await reader.read_to_end()
        assert plane.version("acme") == 1


async def test_after_read_to_end_everything_committed_before_is_known(plane: Plane) -> None:
    async with reading(plane) as reader:
        await caught_up(reader)
        for number in range(20):
            plane.write(*plane.tenant(f"t{number}"))
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(reader.read_to_end() for _ in range(3)))
            assert plane.version(f"t{number}") == 1


async def test_read_to_end_that_asks_no_broker_would_miss_what_was_committed(plane: Plane) -> None:
    """The control: with ends that were known earlier, the answer comes before the record does."""
    async with reading(plane) as reader:
        await caught_up(reader)
        missed = 0
        for number in range(20):
            earlier = await reader._ends(reader._asked)
            plane.write(*plane.tenant(f"t{number}"))
            await reader._reach(earlier)
            missed += plane.version(f"t{number}") is None
            await reader.read_to_end()
        assert missed


async def test_records_that_cannot_be_read_do_not_end_it(plane: Plane) -> None:
    control, state = plane.topics.control, plane.topics.state
    tenant_key = ControlKey("tenant", VENDOR, ExternalId("acme"), "").encode()
    plane.write(
        (control, b"nonsense", b"{"),
        (control, tenant_key, b"[" * 50_000),
        (state, tenant_key, plane.tenant("acme")[1][2]),
        *plane.tenant("acme"),
    )
    with capture_logs() as logs:
        async with reading(plane) as reader:
            await caught_up(reader)
            assert plane.version("acme") == 1
    assert plane.registry.faults == {"key": 1, "value": 1, "misplaced": 1}
    left_out = [line for line in logs if line["event"] == "control_record_left_out"]
    assert {line["topic"] for line in left_out} == {control, state}
    assert len(left_out) == 3


async def test_missing_topics_are_waited_for_and_named(stack: Stack) -> None:
    plane = Plane(stack.kafka_bootstrap)
    with capture_logs() as logs:
        async with reading(plane) as reader:
            await eventually(lambda: any(line["event"] == "control_topics_missing" for line in logs), "the log line")
            assert not reader.caught_up.is_set()
            plane.make_topics()
            plane.write(*plane.tenant("acme"))
            await caught_up(reader)
            await reader.read_to_end()
            assert plane.version("acme") == 1
    (told,) = [line for line in logs if line["event"] == "control_topics_missing"]
    assert told["topics"] == [plane.topics.control, plane.topics.keys, plane.topics.state]


async def test_a_stopped_reader_does_not_pass_the_unread_for_the_absent(plane: Plane) -> None:
    async with reading(plane) as reader:
        await caught_up(reader)
    await reader.stop()  # twice is fine
    assert not reader.alive
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await reader.read_to_end()


async def test_broker_restarts_are_survived(tmp_path: Path) -> None:
    """From a start without a broker, over a clean and a hard restart."""
    folder = tmp_path / "dev"
    stack = embedded.up(folder)
    try:
        plane = Plane(stack.kafka_bootstrap).make_topics()
        plane.write(*plane.tenant("acme"))
        stack.stop_kafka()
        with capture_logs() as logs:
            async with reading(plane) as reader:
                await eventually(lambda: any(line["event"] == "control_reader_waits" for line in logs), "the log line")
                await asyncio.to_thread(stack.start_kafka)
                await caught_up(reader)
                assert plane.version("acme") == 1
                for version, kill in ((2, False), (3, True)):
                    await asyncio.to_thread(stack.stop_kafka, kill=kill)
                    asked = asyncio.create_task(reader.read_to_end())  # while nobody answers
                    await asyncio.to_thread(stack.start_kafka)
                    async with asyncio.timeout(PATIENCE_S):
                        await asked
                    await asyncio.to_thread(plane.write, *plane.tenant("acme", version))
                    await eventually(lambda version=version: plane.version("acme") == version, f"version {version}")  # type: ignore[misc]
    finally:
        embedded.down(folder)
