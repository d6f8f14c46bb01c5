"""The demo's far sides that are no webhooks: a bucket, a dataset and a topic, read as whoever owns them would.

Owns the processes of the embedded S3 and BigQuery, which start while the rest does, and what each far side is asked: in
the words of the services themselves, with nothing of the product's. Every call blocks; each far side has a thread.
"""

import gzip
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote
from xml.etree import ElementTree

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from msgspec import Raw, Struct

from dev import bigquery, process, s3, wait
from dev.demo.places import STORES, Kind
from dev.process import Condition

TABLE: Final = "events"
PARTITIONS: Final = 2
ASK_TIMEOUT_S: Final = 20.0
END_TIMEOUT_S: Final = 5.0
READ_EVERY_S: Final = 1.0
REST_FOR_WORK: Final = 5
"""A far side that takes long to read is read less often: it rests so many times as long."""
ROWS_OF: Final = timedelta(minutes=10)
"""Older rows are not read again: a demo may run all night."""
_START_TIMEOUT_S: Final = {Kind.S3: float(s3.START_TIMEOUT_S), Kind.BIGQUERY: bigquery.START_TIMEOUT_S}
# the embedded S3 wants to be told who reads, and believes it
_SOMEBODY: Final = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=owner/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=00"
}
_LIST: Final = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class FarSideError(Exception):
    """It did not start, or does not answer any more. The message is for the user."""


# What a far side that has gone, or is slow, makes of being asked.
_UNANSWERED: Final = (OSError, HTTPException, KafkaException)


class Held(Struct, frozen=True):
    """One line of an object, one row, or one record."""

    id: str
    type: str
    payload: str
    """The JSON as it lies there."""
    owner: str | None = None
    """The tenant that a row names; lines and records name none."""


class FarSide(Protocol):
    def open(self) -> None:
        """Returns when it can be written to. Raises `FarSideError`."""

    def take(self) -> Sequence[Held]:
        """What has come since the last time. A second copy of what was there has come too."""

    def close(self) -> None: ...


class _Line(Struct):
    id: str
    type: str
    payload: Raw


_line: Final = msgspec.json.Decoder(_Line).decode


def _held(line: bytes) -> Held:
    one = _line(line)
    return Held(one.id, one.type, bytes(one.payload).decode())


class Bucket:
    def __init__(self, home: Path, name: str) -> None:
        (self.port,) = wait.free_ports(1)
        self._name = name
        self._home = home
        self._proc = s3.start(home, self.port)
        self._read: set[tuple[str, str]] = set()

    def open(self) -> None:
        wait.until(
            lambda: s3.answers(self.port) or process.condition(self._proc) is Condition.GONE, _START_TIMEOUT_S[Kind.S3]
        )
        try:
            s3.make_bucket(self.port, self._name)
        except OSError as fault:
            raise FarSideError(f"S3 did not start: {fault}; {_tail(s3.log(self._home))}") from fault

    def take(self) -> Sequence[Held]:
        found: list[Held] = []
        new = [each for each in self._listed() if each not in self._read]  # one written over is new
        for key, _ in new:
            found += map(_held, gzip.decompress(self._get(f"/{quote(key)}")).splitlines())
        self._read.update(new)
        return found

    def close(self) -> None:
        process.end(self._proc, grace_s=0)

    def _listed(self) -> Sequence[tuple[str, str]]:
        """Key, and hash with time of writing, of every object."""
        found: list[tuple[str, str]] = []
        more: str | None = ""
        while more is not None:
            page = ElementTree.fromstring(
                self._get("?list-type=2" + (f"&continuation-token={quote(more, safe='')}" if more else ""))
            )
            for one in page.iter(f"{_LIST}Contents"):
                key, tag, at = (one.findtext(_LIST + name, "") for name in ("Key", "ETag", "LastModified"))
                found.append((key, f"{tag} {at}"))
            more = page.findtext(f"{_LIST}NextContinuationToken")
        return found

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(f"{s3.url(self.port)}/{self._name}{path}", headers=_SOMEBODY)
        with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as answer:
            return bytes(answer.read())


class Dataset:
    def __init__(self, home: Path, name: str) -> None:
        self.ports = wait.free_ports(2)
        self._name = name
        self._home = home
        self._proc = bigquery.start(home, *self.ports)
        self._given: Counter[Held] = Counter()

    @property
    def endpoint(self) -> str:
        return f"{bigquery.rest_url(self.ports[0])},{bigquery.grpc_address(self.ports[1])}"

    def open(self) -> None:
        rest, grpc = self.ports
        try:
            bigquery.wait_ready(self._proc, self._home, rest, grpc)
            bigquery.make_dataset(rest, bigquery.PROJECT, self._name)
        except (bigquery.BigQueryError, OSError) as fault:
            raise FarSideError(f"BigQuery did not start: {fault}") from fault

    def take(self) -> Sequence[Held]:
        rest = self.ports[0]
        if TABLE not in bigquery.tables(rest, bigquery.PROJECT, self._name):  # made with the first rows
            return []
        since = (datetime.now(UTC) - ROWS_OF).strftime("%Y-%m-%d %H:%M:%S+00")
        rows = bigquery.query(
            rest,
            bigquery.PROJECT,
            "SELECT event_id, event_type, payload, customer_external_id "
            f"FROM `{bigquery.PROJECT}.{self._name}.{TABLE}` WHERE received_at > TIMESTAMP '{since}'",
        )
        come = Counter(Held(str(row[0]), str(row[1]), str(row[2]), row[3]) for row in rows) - self._given
        self._given += come
        return list(come.elements())

    def close(self) -> None:
        process.end(self._proc, grace_s=0)


class Topic:
    """A topic on the very broker that Headgate runs on; `bootstrap` is known once that is up."""

    def __init__(self, name: str, bootstrap: str) -> None:
        self._name = name
        self._bootstrap = bootstrap
        self._consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": name, "enable.auto.commit": False, "check.crcs": True}
        )

    def open(self) -> None:
        admin = self._admin()
        try:
            admin.create_topics([NewTopic(self._name, PARTITIONS, 1)])[self._name].result(ASK_TIMEOUT_S)
        except (KafkaException, TimeoutError) as fault:
            raise FarSideError(f"the topic {self._name} was not made: {str(fault) or 'no answer'}") from fault
        self._consumer.assign([TopicPartition(self._name, number, 0) for number in range(PARTITIONS)])

    def take(self) -> Sequence[Held]:
        found: list[Held] = []
        while records := self._consumer.consume(1000, 0.2):
            for record in records:
                fault: KafkaError | None = record.error()
                if fault is not None:
                    raise KafkaException(fault)
                found.append(_held(record.value() or b""))
        return found

    def close(self) -> None:
        self._consumer.close()
        admin = self._admin()
        with suppress(KafkaException, TimeoutError):  # of a stack that has gone meanwhile
            admin.delete_topics([self._name])[self._name].result(END_TIMEOUT_S)

    def _admin(self) -> AdminClient:
        """Held until its one answer is there, and no longer: it would complain on the terminal when the broker ends."""
        return AdminClient({"bootstrap.servers": self._bootstrap})


class FarSides:
    """All of them, by tenant. `open` and `take` of each run in its thread; the rest is for one thread."""

    def __init__(self, home: Path, run: str) -> None:
        self._name = f"headgate-demo-{run}"
        self._all: dict[Kind, FarSide] = {}
        self._threads = ThreadPoolExecutor(len(STORES))
        self._opening: dict[Kind, Future[None]] = {}
        self._taking: dict[Kind, Future[tuple[Sequence[Held], float]]] = {}
        self._next: dict[Kind, float] = {}
        self._unread: dict[Kind, str] = {}
        self._home = home

    def start(self) -> None:
        """Begins with those that need nothing of the stack."""
        self.bucket = Bucket(self._home / "s3", self._name)
        self._open(Kind.S3, self.bucket)
        self.dataset = Dataset(self._home / "bigquery", self._name.replace("-", "_"))
        self._open(Kind.BIGQUERY, self.dataset)

    def start_topic(self, bootstrap: str) -> None:
        self._open(Kind.KAFKA, Topic(self._name, bootstrap))

    def _open(self, kind: Kind, far_side: FarSide) -> None:
        self._all[kind] = far_side
        self._opening[kind] = self._threads.submit(far_side.open)

    def is_open(self, kind: Kind) -> bool:
        opening = self._opening[kind]
        return opening.done() and opening.exception() is None

    def fault(self, kind: Kind) -> str | None:
        """Why it will never open, or could not be read the last time."""
        opening = self._opening[kind]
        if opening.done() and opening.exception() is not None:
            return str(opening.exception())
        return self._unread.get(kind)

    def wait_until_open(self) -> None:
        """Raises `FarSideError`."""
        for opening in self._opening.values():
            opening.result()

    def take_all(self) -> Mapping[Kind, Sequence[Held]]:
        """Asks all and waits for them. Raises `FarSideError`."""
        asked = {kind: self._threads.submit(one.take) for kind, one in self._all.items()}
        try:
            return {kind: each.result() for kind, each in asked.items()}
        except _UNANSWERED as fault:
            raise FarSideError(f"bucket, dataset or topic could not be read: {fault}") from fault

    def take_done(self) -> Mapping[Kind, Sequence[Held]]:
        """What has been read meanwhile; asks those whose turn it is, and does not wait."""
        found: dict[Kind, Sequence[Held]] = {}
        for kind, one in self._all.items():
            if (taking := self._taking.get(kind)) is not None:
                if not taking.done():
                    continue
                del self._taking[kind]
                took_s = 0.0
                self._unread.pop(kind, None)
                try:
                    found[kind], took_s = taking.result()
                except _UNANSWERED as fault:  # it may come back, and is asked again
                    self._unread[kind] = f"it could not be read: {fault}"
                self._next[kind] = time.monotonic() + max(READ_EVERY_S, REST_FOR_WORK * took_s)
            if self.is_open(kind) and time.monotonic() >= self._next.get(kind, 0.0):
                self._taking[kind] = self._threads.submit(_timed, one)
        return found

    def close(self) -> None:
        """While the broker runs. The processes end first, so that no thread waits for one."""
        for kind in (Kind.S3, Kind.BIGQUERY):
            if kind in self._all:
                self._all[kind].close()
        self._threads.shutdown(cancel_futures=True)
        if Kind.KAFKA in self._all:  # a consumer must not be closed under the thread that reads from it
            self._all[Kind.KAFKA].close()


def _timed(one: FarSide) -> tuple[Sequence[Held], float]:
    began = time.monotonic()
    return one.take(), time.monotonic() - began


def _tail(log: Path) -> str:
    return f"see {log}:\n{log.read_text(errors='replace')[-2000:]}"
