"""One deployment of Headgate in a test: its own prefix on the session's Kafka and Redis, an inbox, and real workers.

Workers are processes of the real command. What a test asserts it reads from the far side (`inbox`), from the topics
(`read`), from the committed offsets (`committed`) or from `/metrics`.
"""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from cli.apply import Applied, apply_document
from config.settings import Settings
from dev.inbox import Inbox
from dev.stack import Stack
from schemas.ids import Tag, Vendor

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0


class Read(msgspec.Struct, frozen=True):
    """One record of a topic."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]
    timestamp_ms: int


async def eventually(holds: Callable[[], T | bool | None], what: str, timeout_s: float = DEADLINE_S) -> T:
    """Polls until `holds()` is true, and returns what it gave."""
    end = time.monotonic() + timeout_s
    while True:
        found = await asyncio.to_thread(holds)
        if found:
            return found  # type: ignore[return-value]
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Worker:
    """A `headgate worker` process."""

    def __init__(self, env: Mapping[str, str], log: Path, command: Sequence[str]) -> None:
        self.port = int(env["HEADGATE_HTTP_PORT"])
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True
            )

    def get(self, path: str) -> tuple[int, str]:
        """Status 0: no answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as fault:
            return fault.code, fault.read().decode()
        except OSError:
            return 0, ""

    async def ready(self) -> "Worker":
        def is_ready() -> bool:
            assert self.process.poll() is None, f"the worker ended:\n{self.log.read_text()[-4000:]}"
            return self.get("/readyz")[0] == 200

        await eventually(is_ready, "the worker is ready")
        return self

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels. Counters by their full name, such as `…_total`."""
        total = 0.0
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.process.kill()
        self.process.wait(10)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def terminate(self, timeout_s: float = 35.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended(timeout_s)

    async def ended(self, timeout_s: float = 35.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)


class Deployment:
    """Use `Deployment.on(stack)`; the `deployment` fixture does."""

    def __init__(self, stack: Stack, inbox: Inbox, folder: Path, env: Mapping[str, str]) -> None:
        self.stack = stack
        self.inbox = inbox
        self.folder = folder
        self.prefix = f"t{secrets.token_hex(4)}"
        self.env = {
            **stack.settings(),
            "HEADGATE_PREFIX": self.prefix,
            "HEADGATE_EGRESS_ALLOW": "127.0.0.0/8,::1/128",
            "HEADGATE_INGRESS_PARTITIONS": "4",
            "HEADGATE_LOG_FORMAT": "json",
            **env,
        }
        self.workers: list[Worker] = []
        self._producer: Producer | None = None

    @classmethod
    @asynccontextmanager
    async def on(cls, stack: Stack, **env: str) -> "AsyncIterator[Deployment]":
        """`env` are further HEADGATE_ settings."""
        with TemporaryDirectory() as folder:
            async with Inbox() as inbox:
                deployment = cls(stack, inbox, Path(folder), env)
                try:
                    yield deployment
                finally:
                    for worker in deployment.workers:
                        if worker.process.poll() is None:
                            worker.kill()

    @property
    def settings(self) -> Settings:
        return Settings.load(self.env)

    # ---------------------------------------------------------------- doing

    async def apply(self, document: Mapping[str, Any] | str, *, prune: bool = False) -> Applied:
        """A configuration as YAML text or as a dict (JSON is YAML)."""
        text = document if isinstance(document, str) else msgspec.json.encode(document).decode()
        return await asyncio.to_thread(apply_document, self.settings, text, prune=prune)

    def webhook(self, path: str, **more: Any) -> dict[str, Any]:
        """A destination `hook` at `/path` of the inbox; `more` are its further fields (retry, limits, id)."""
        return {"id": "hook", "type": "webhook", "options": {"url": self.inbox.url(f"/{path}")}, **more}

    def tenant(self, external_id: str, path: str | None = None, **more: Any) -> dict[str, Any]:
        """A tenant whose every event goes to one webhook, at `path` of the inbox (its id by default)."""
        return {
            "externalId": external_id,
            "destinations": [self.webhook(path or external_id, **more)],
            "routes": [{"id": "all", "match": {"types": ["*"]}, "to": ["hook"]}],
        }

    def launch(self, name: str = "w0", command: Sequence[str] = (), **env: str) -> Worker:
        """Starts a worker without waiting. `env` are further settings, without their HEADGATE_."""
        settings = {
            **self.env,
            "HEADGATE_WORKER_ID": name,
            "HEADGATE_HTTP_PORT": str(free_port()),
            **{f"HEADGATE_{key}": value for key, value in env.items()},
        }
        made = Worker(settings, self.folder / f"{name}.log", command or (sys.executable, "-m", "cli.main", "worker"))
        self.workers.append(made)
        return made

    async def worker(self, name: str = "w0", **env: str) -> Worker:
        """Starts a worker and waits until it is ready."""
        return await self.launch(name, **env).ready()

    async def publish(
        self,
        events: Sequence[tuple[str | bytes | None, Mapping[str, Any] | bytes]],
        vendor: str = "default",
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """(key, event) records to ingress; returns once all are acknowledged."""
        topic = self.settings.topics.ingress(Vendor(vendor))
        await asyncio.to_thread(self._publish, topic, events, headers)

    def _publish(self, topic: str, events: Sequence[tuple[Any, Any]], headers: Sequence[tuple[str, bytes]]) -> None:
        producer = self._producer
        if producer is None:
            settings = {"acks": "all", "linger.ms": 2, "partitioner": "murmur2_random", "message.max.bytes": 64 << 20}
            producer = self._producer = Producer({**self.settings.kafka.confluent(), **settings})
        failed: list[Any] = []

        def report(error: Any, _message: Any) -> None:
            if error is not None:
                failed.append(error)

        for key, event in events:
            value = event if isinstance(event, bytes) else msgspec.json.encode(event)
            while True:
                try:
                    producer.produce(topic, value, key, headers=list(headers), on_delivery=report)
                    break
                except BufferError:
                    producer.poll(0.05)
        producer.flush(60)
        assert not failed, failed

    # ---------------------------------------------------------------- looking

    def read(self, topic: str) -> list[Read]:
        """Everything in a topic that is committed; nothing if there is no such topic."""
        consumer = Consumer(
            {
                **self.settings.kafka.confluent(),
                "group.id": f"{self.prefix}.test",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 20,  # or each end of a topic is told half a second late
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
            }
        )
        try:
            found = consumer.list_topics(topic, timeout=10).topics[topic]
            if found.error is not None:
                return []
            partitions = [TopicPartition(topic, number, 0) for number in found.partitions]
            consumer.assign(partitions)
            records: list[Read] = []
            open_ = len(partitions)
            while open_:
                message = consumer.poll(10)
                assert message is not None, f"{topic} cannot be read"
                if message.error() is not None:
                    open_ -= 1
                    continue
                headers = dict(message.headers() or ())
                records.append(
                    Read(
                        topic,
                        message.partition() or 0,
                        message.offset() or 0,
                        message.key(),  # type: ignore[arg-type]
                        message.value(),
                        headers,  # type: ignore[arg-type]
                        message.timestamp()[1],
                    )
                )
            return records
        finally:
            consumer.close()

    def dead_letters(self, tag: str, vendor: str = "default") -> list[Read]:
        """The letters, without their marks."""
        found = self.read(self.settings.topics.dead_letters(Vendor(vendor), Tag(tag)))
        return [one for one in found if "hg-mark" not in one.headers]

    def retries(self, tag: str, vendor: str = "default") -> list[Read]:
        return self.read(self.settings.topics.retry(Vendor(vendor), Tag(tag)))

    def unrouted(self, vendor: str = "default") -> list[Read]:
        return self.read(self.settings.topics.unrouted(Vendor(vendor)))

    def attempts(self, vendor: str = "default") -> list[dict[str, Any]]:
        """The attempts topic, decoded: kinds `attempt` and `event`."""
        return [msgspec.json.decode(r.value or b"{}") for r in self.read(self.settings.topics.attempts(Vendor(vendor)))]

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Committed offset by partition, -1 for none; `group` is route or retry."""
        consumer = Consumer({**self.settings.kafka.confluent(), "group.id": f"{self.prefix}.{group}"})
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            asked = consumer.committed([TopicPartition(topic, number) for number in partitions], timeout=10)
            return {one.partition: max(-1, one.offset) for one in asked}
        finally:
            consumer.close()

    def ends(self, topic: str) -> dict[int, int]:
        """The end offset by partition."""
        consumer = Consumer({**self.settings.kafka.confluent(), "group.id": f"{self.prefix}.test"})
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            return {n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=10)[1] for n in partitions}
        finally:
            consumer.close()

    async def known_to(self, worker: Worker) -> None:
        """Waits until the worker has read all that was applied: `apply` asks a reader of its own."""
        end = (await asyncio.to_thread(self.read, self.settings.topics.control))[-1].offset + 1
        await eventually(lambda: worker.metric("headgate_control_offset") >= end, "the worker knows what was applied")

    async def all_committed(self, vendor: str = "default") -> None:
        """Waits until everything in ingress is settled and committed."""
        topic = self.settings.topics.ingress(Vendor(vendor))

        def done() -> bool:
            ends = self.ends(topic)
            committed = self.committed("route", topic)
            return all(committed[n] >= end or end == 0 for n, end in ends.items())

        await eventually(done, "ingress is committed to its end")


def milliseconds(at: str) -> float:
    """Since the epoch, of a time as records of the attempts topic have it."""
    return datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp() * 1000


def event(event_id: str, event_type: str = "invoice.paid", **more: Any) -> dict[str, Any]:
    """An event with a small payload."""
    return {"eventId": event_id, "eventType": event_type, "payload": {"total": 12}, **more}
