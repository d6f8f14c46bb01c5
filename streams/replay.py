"""Replay and drop: what becomes of dead letters by an operator's word (design, section 5, Marks).

Owns which records are letters of one owner, what is sent for one, and the order of the two writes: first what is sent,
and once that is acknowledged the mark, in the letter's own partition. So a kill at any step leaves letters that are
done, and letters that are open; of what was sent and not marked the next replay sends a copy under the same job, and
the ledger drops it. All that it remembers lies in Kafka.

Runs in the process of a command, with clients of its own; a letter's delivery is the workers'.
"""

import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Final, Protocol

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from msgspec import Struct, field
from msgspec.structs import replace

from config.kafka import NO_GROUP, KafkaFault, client_config, error_of, explain, read_to_end
from config.plan import CurrentTenant, is_disabled
from config.settings import Settings
from config.vault import Unsealable, Vault
from schemas.attempt import PURPOSE_DELIVERY, AttemptRecord, decode_record
from schemas.dead_letter import (
    MARK,
    Letter,
    Mark,
    Selectors,
    mark_headers,
    matches,
    read_mark,
    tenant_letter,
    text_of,
    unrouted_letter,
)
from schemas.ids import DeliveryId, DestinationId, Tag, TenantRef, Vendor, attempt_digest, base32
from schemas.topics import RECORD_SLACK_BYTES, delivery_key, record_bytes
from schemas.wire import parked_headers, read_origin, read_parked, returned_headers, unread_of

MOST_OPEN: Final = 500
MOST_OPEN_BYTES: Final = 16 * 2**20
RECORD_OVERHEAD_BYTES: Final = 512
UNREACHABLE_AFTER_S: Final = 30.0
ASK_EVERY_S: Final = 0.2
PAUSE_S: Final = 0.5

# Why a letter is skipped
DONE: Final = "was replayed or dropped before"
DESTINATION_GONE: Final = "its destination is gone"
DESTINATION_DISABLED: Final = "its destination is disabled, since it answered 410"
TRUNCATED: Final = "it was too large to keep whole"
SHREDDED: Final = "its key was shredded"
SEALED: Final = "it does not open with this tenant's keys"
NOT_FROM_INGRESS: Final = "it did not come from ingress"
TOO_LARGE: Final = "it is larger than ingress takes"
UNREAD: Final = "another version of headgate wrote it, in a form that this one does not read; use that one"
EXPIRED: Final = "it was deleted by its topic's retention meanwhile"

Headers = Sequence[tuple[str, bytes | None]]


class Outgoing(Struct, frozen=True):
    """What is sent for a letter. `partition` -1 leaves the choice to the key."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int = -1


class Post(Protocol):
    """How letters of one topic are sent. `max_bytes` bounds a record of where they go."""

    topic: str
    max_bytes: int

    def objection(self, message: Message) -> str:
        """Why this letter cannot be sent; empty if it can."""
        ...

    def outgoing(self, message: Message, job: str) -> Outgoing:
        """What is sent for a letter to which there is no objection."""
        ...


def headers_of(message: Message) -> dict[str, bytes]:
    return {name: _bytes(value) for name, value in message.headers() or []}


def _bytes(value: str | bytes | None) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""


def letter_of(message: Message, owner: TenantRef | None) -> Letter | None:
    """The letter that a record is; None for a mark, and for what is not the owner's (None: of `dlq.unrouted`)."""
    headers = headers_of(message)
    if MARK in headers:
        return None
    partition, offset = _place(message)
    at_ms, size = message.timestamp()[1], len(message.value() or b"")
    if owner is None:
        return unrouted_letter(partition, offset, at_ms, size, message.key(), headers)
    return tenant_letter(owner, partition, offset, at_ms, size, headers.items())


def is_unread(message: Message, owner: TenantRef | None) -> bool:
    """Whether it is a letter of the owner's that another release wrote, in a form that this one does not read."""
    headers = headers_of(message)
    return owner is not None and MARK not in headers and unread_of(headers.items()) == owner


def _place(message: Message) -> tuple[int, int]:
    return message.partition() or 0, message.offset() or 0


class TenantPost:
    """The letters of one tenant. They go to its retry topic, as they are sealed."""

    def __init__(self, settings: Settings, owner: TenantRef, current: CurrentTenant, vault: Vault) -> None:
        self._owner = owner
        self._current = current
        self._vault = vault
        self._first_tier_ms = int(settings.sizes.retry_tiers_s[0] * 1000)
        self.max_bytes = record_bytes(settings.sizes.max_event_bytes)
        tag = Tag(current.record.tag)
        self.topic = settings.topics.dead_letters(owner.vendor, tag)
        self.retry = settings.topics.retry(owner.vendor, tag)

    def objection(self, message: Message) -> str:
        headers = headers_of(message)
        name = text_of(headers, "hg-destination")
        destination = self._current.destinations.get(name)
        if destination is None:
            return DESTINATION_GONE
        if is_disabled(destination, self._current.disabled.get(name)):
            return DESTINATION_DISABLED
        if "hg-truncated" in headers:
            return TRUNCATED
        # headers can be forged by who can write to the topic; the seal, bound to the tenant, cannot
        try:
            self._vault.open(PURPOSE_DELIVERY, name, text_of(headers, "hg-delivery"), message.value() or b"")
        except Unsealable as fault:
            return SHREDDED if fault.code == "shredded" else SEALED
        return ""

    def outgoing(self, message: Message, job: str) -> Outgoing:
        """A retry record that is due at once, with a schedule and a `max_age` that start anew."""
        parked = read_parked(headers_of(message).items())
        assert parked is not None, "no letter"
        now_ms = int(time.time() * 1000)
        sent = replace(
            parked,
            tenant=self._owner,
            attempt=0,
            hop=parked.hop + 1,
            parks=0,
            not_before_ms=now_ms + self._first_tier_ms,  # partition 0 is not looked at before that
            first_failed_ms=now_ms,
            replay=job,
        )
        key = delivery_key(self._owner, DestinationId(parked.destination))
        return Outgoing(self.retry, key, message.value(), parked_headers(sent), 0)


class UnroutedPost:
    """The records of `dlq.unrouted`. They go back through ingress as they came, with the position that they had."""

    def __init__(self, settings: Settings, vendor: Vendor) -> None:
        self.topic = settings.topics.unrouted(vendor)
        self.ingress = settings.topics.ingress(vendor)
        self.max_bytes = settings.sizes.max_event_bytes + RECORD_SLACK_BYTES

    def objection(self, message: Message) -> str:
        headers = [(name, _bytes(value)) for name, value in message.headers() or []]
        if any(name in ("hg-truncated", "hg-key-truncated") for name, _ in headers):
            return TRUNCATED
        if read_origin(headers, self.ingress) is None:
            return NOT_FROM_INGRESS
        size = len(message.value() or b"") + len(message.key() or b"") + RECORD_OVERHEAD_BYTES
        size += sum(len(name) + len(value) + 8 for name, value in headers)
        return TOO_LARGE if size > self.max_bytes else ""

    def outgoing(self, message: Message, job: str) -> Outgoing:
        headers = returned_headers(message.headers() or [])
        assert headers is not None, "no hg-origin"
        return Outgoing(self.ingress, message.key(), message.value(), headers)


# ---------------------------------------------------------------- which letters


class Survey(Struct):
    """What a look through the topic has found.

    `offsets` has, by partition, those that are to be sent, ascending; `skipped` counts the others that match, by the
    reason. `ended` has the replay jobs that came to a letter again.
    """

    matched: int
    offsets: dict[int, "array[int]"]
    skipped: Counter[str]
    ended: set[str]

    @property
    def open(self) -> int:
        return sum(map(len, self.offsets.values()))


def survey(
    settings: Settings,
    topic: str,
    owner: TenantRef | None,
    chosen: Selectors,
    *,
    objection: Callable[[Message], str],
    job: str,
    told: Callable[[int], None],
) -> Survey:
    """Reads the topic to its end: the owner's letters that match, and what their marks say.

    A mark follows its letter, perhaps much later, so nothing is decided before the end. `objection` says why a letter
    is to be skipped, empty if it is not. `job` is a forced replay's, else empty: a forced one heeds only its own marks,
    and leaves alone the letters that came of it. `told` hears how many records were read.
    """
    found = Survey(0, {}, Counter(), set())
    open_: defaultdict[int, array[int]] = defaultdict(partial(array, "q"))
    objected: list[tuple[int, int, str]] = []
    done: defaultdict[int, set[int]] = defaultdict(set)
    read = 0
    for message in messages(settings, topic, chosen.since_ms):
        read += 1
        told(read)
        partition, offset = _place(message)
        mark = read_mark(headers_of(message))
        if mark is not None:
            if mark.partition == partition and (not job or mark.job == job):
                done[partition].add(mark.offset)
            continue
        letter = letter_of(message, owner)
        if letter is None:
            if is_unread(message, owner):  # which destination and code it has is not known: it counts as chosen
                found.matched += 1
                objected.append((partition, offset, UNREAD))
            continue
        if letter.replay:
            found.ended.add(letter.replay)
        if (job and letter.replay == job) or not matches(letter, chosen, message.timestamp()[1]):
            continue
        found.matched += 1
        why = objection(message)
        if why:
            objected.append((partition, offset, why))
        else:
            open_[partition].append(offset)
    for partition, offset, why in objected:
        found.skipped[DONE if offset in done[partition] else why] += 1
    for partition, offsets in open_.items():
        left = array("q", [offset for offset in offsets if offset not in done[partition]])
        if len(left) < len(offsets):
            found.skipped[DONE] += len(offsets) - len(left)
        if left:
            found.offsets[partition] = left
    return found


def messages(settings: Settings, topic: str, since_ms: int | None) -> Iterator[Message]:
    """The records of a topic of letters from a time on, to its end."""

    def from_time(consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        if since_ms is None:
            return partitions
        asked = [TopicPartition(part.topic, part.partition, max(0, since_ms)) for part in partitions]
        return list(consumer.offsets_for_times(asked, timeout=10))

    return read_to_end(settings.kafka.confluent(), [topic], settings.topics.group("cli"), from_time)


def _open_letters(settings: Settings, topic: str, found: Survey) -> Iterator[Message]:
    """The letters that are to be sent, in the order of each partition; those that retention deleted do not come."""
    if not found.offsets:
        return
    next_: dict[int, int] = dict.fromkeys(found.offsets, 0)  # where each partition's list has come to
    unfinished = len(next_)

    def at(_: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        return [
            TopicPartition(part.topic, part.partition, found.offsets[part.partition][0])
            for part in partitions
            if part.partition in next_
        ]

    for message in read_to_end(settings.kafka.confluent(), [topic], settings.topics.group("cli"), at):
        partition, offset = _place(message)
        offsets, index = found.offsets[partition], next_[partition]
        while index < len(offsets) and offsets[index] < offset:  # deleted meanwhile
            index += 1
        if index < len(offsets) and offsets[index] == offset:
            next_[partition] = index + 1
            unfinished -= index + 1 == len(offsets)
            yield message
            if not unfinished:
                return


# ---------------------------------------------------------------- writing


class Scribe:
    """An idempotent producer. What is to follow a record follows once the broker has acknowledged it.

    Nothing happens but in a call of it: acknowledgements are taken in, and what follows them is done, by `turn`.
    """

    def __init__(self, kafka: Mapping[str, Any], max_bytes: int) -> None:
        self._kafka = kafka
        self._faults: list[str] = []
        self._refusal: tuple[str, KafkaError] | None = None
        self._answered: deque[Callable[[], None]] = deque()
        self._open = 0
        self._open_bytes = 0
        self._producer = Producer(
            client_config(
                {
                    **kafka,
                    "acks": "all",
                    "enable.idempotence": True,
                    "partitioner": "murmur2_random",
                    "linger.ms": 5,
                    "message.max.bytes": max_bytes,
                    "delivery.timeout.ms": int(UNREACHABLE_AFTER_S * 1000),
                },
                self._faults,
            )
        )

    def write(self, record: Outgoing, then: Callable[[Message], None]) -> None:
        """Raises `KafkaFault` once the broker has refused a record."""
        size = len(record.value or b"") + RECORD_OVERHEAD_BYTES

        def answered(error: KafkaError | None, message: Message) -> None:
            self._open -= 1
            self._open_bytes -= size
            if error is None:
                self._answered.append(partial(then, message))
            else:
                self._refusal = self._refusal or (record.topic, error)

        while True:
            try:
                self._producer.produce(
                    record.topic,
                    record.value,
                    record.key,
                    headers=list(record.headers),
                    on_delivery=answered,
                    **({} if record.partition < 0 else {"partition": record.partition}),
                )
                break
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as exception:
                raise explain(
                    error_of(exception), f"write to topic {record.topic}", self._kafka, self._faults
                ) from None
        self._open += 1
        self._open_bytes += size

    def turn(self, wait_s: float = 0.0) -> None:
        """Takes acknowledgements in and does what follows; waits for room, or for `wait_s`."""
        self._producer.poll(wait_s)
        self._follow()
        while self._open >= MOST_OPEN or self._open_bytes >= MOST_OPEN_BYTES:
            self._producer.poll(0.1)
            self._follow()

    def finish(self) -> None:
        """Until everything that was written, and what follows it, is acknowledged."""
        while self._open or self._answered:
            self._producer.poll(0.1)
            self._follow()

    def _follow(self) -> None:
        while self._answered:
            self._answered.popleft()()
        if self._refusal is not None:
            topic, error = self._refusal
            raise explain(error, f"write to topic {topic}", self._kafka, self._faults)


class Sent(Struct):
    """What a replay has sent: how many, under which jobs by delivery (if it keeps them), and the offsets after them."""

    count: int = 0
    jobs: dict[str, set[str]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)


class Replay:
    """Sends the letters of a survey, and marks each that was acknowledged."""

    def __init__(
        self,
        settings: Settings,
        post: Post,
        found: Survey,
        *,
        job_of: Callable[[int, int], str],
        rate_per_s: float,
        keep_jobs: bool,
        told: Callable[[int], None],
    ) -> None:
        """`job_of` gives the job of the letter at a partition and offset; `told` hears how many are acknowledged.

        `keep_jobs`: for who waits for their ends.
        """
        self._settings = settings
        self._post = post
        self._found = found
        self._job_of = job_of
        self._rate_per_s = rate_per_s
        self._keep_jobs = keep_jobs
        self._told = told
        self._scribe = Scribe(settings.kafka.confluent(), post.max_bytes)
        self.sent = Sent()

    def run(self) -> Sent:
        """Returns when the last letter and its mark are acknowledged; `sent` says how far it came where it raises."""
        began = time.monotonic()
        begun = 0
        for message in _open_letters(self._settings, self._post.topic, self._found):
            if self._rate_per_s:
                while (due_s := began + begun / self._rate_per_s - time.monotonic()) > 0:
                    self._scribe.turn(min(due_s, PAUSE_S))
            begun += 1
            # asked again: what is written must be what was opened
            objection = self._post.objection(message)
            if objection:
                self._found.skipped[objection] += 1
                continue
            self.send(message)
            self._scribe.turn()
        self._found.skipped[EXPIRED] += self._found.open - begun
        self._scribe.finish()
        return self.sent

    def send(self, message: Message) -> None:
        partition, offset = _place(message)
        job = self._job_of(partition, offset)
        delivery = text_of(headers_of(message), "hg-delivery")
        mark = Mark("replayed", partition, offset, job)
        then = partial(self.acknowledged, message.key(), delivery, mark)
        self._scribe.write(self._post.outgoing(message, job), then)

    def acknowledged(self, key: bytes | None, delivery: str, mark: Mark, written: Message) -> None:
        """What was sent for a letter is in its topic: from here on the letter may be marked."""
        partition, offset = _place(written)
        self.sent.count += 1
        if self._keep_jobs:
            self.sent.jobs.setdefault(delivery, set()).add(mark.job)
        self.sent.ends[partition] = max(self.sent.ends.get(partition, 0), offset + 1)
        self._scribe.write(_mark(self._post.topic, key, mark), self.marked)
        self._told(self.sent.count)

    def marked(self, written: Message) -> None:
        """The letter is done."""


def drop(settings: Settings, topic: str, found: Survey, job: str, told: Callable[[int], None]) -> int:
    """Marks the letters of a survey as dropped, without sending anything. Returns how many."""
    scribe = Scribe(settings.kafka.confluent(), record_bytes(settings.sizes.max_event_bytes))
    done = 0

    def marked(_: Message) -> None:
        nonlocal done
        done += 1
        told(done)

    for message in _open_letters(settings, topic, found):
        scribe.write(_mark(topic, message.key(), Mark("dropped", *_place(message), job)), marked)
        scribe.turn()
    scribe.finish()
    return done


def _mark(topic: str, key: bytes | None, mark: Mark) -> Outgoing:
    return Outgoing(topic, key, b"", mark_headers(mark), mark.partition)


# ---------------------------------------------------------------- until all is settled


class Ended(Struct):
    """How what a replay sent came to its end; `open` are deliveries that did not in the time there was."""

    delivered: int = 0
    dead: int = 0
    open: list[str] = []

    @property
    def count(self) -> int:
        return self.delivered + self.dead


class Watch:
    """Sees the deliveries of a tenant's replay end: delivered, in the attempts topic; dead, by a new letter.

    Make it before the survey: it reads from where the topics end then.
    """

    def __init__(self, settings: Settings, owner: TenantRef, letters: str) -> None:
        self._owner = owner
        self._kafka = settings.kafka.confluent()
        self._letters = letters
        self._key = owner.tenant.encode()
        self._faults: list[str] = []
        self._consumer = _reader(self._kafka, settings.topics.group("cli"), self._faults)
        try:
            ends = _ends(self._consumer, [settings.topics.attempts(owner.vendor), letters])
            self._consumer.assign(ends)
        except KafkaException as exception:
            raise explain(error_of(exception), "reach Kafka", self._kafka, self._faults) from None

    def close(self) -> None:
        self._consumer.close()

    def until_all_ended(
        self, jobs: Mapping[str, set[str]], ended: set[str], told: Callable[[int], None], timeout_s: float | None
    ) -> Ended:
        """`jobs` by delivery; `ended` are jobs that came to a letter again before this replay."""
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        waiting = {(delivery, job) for delivery, of_it in jobs.items() for job in of_it}
        done = Ended()
        for delivery, job in [one for one in waiting if one[1] in ended]:
            waiting.discard((delivery, job))
            done.dead += 1
        while waiting and time.monotonic() < deadline:
            told(done.count)
            for message in self._consumer.consume(1000, ASK_EVERY_S):
                error = message.error()
                if error is not None:
                    if not error.retriable() and error.code() != NO_GROUP:
                        raise explain(error, f"read topic {message.topic()}", self._kafka, self._faults)
                elif message.topic() == self._letters:
                    parked = read_parked(headers_of(message).items())
                    if parked is not None and parked.tenant == self._owner:
                        done.dead += self._end(waiting, parked.delivery, parked.replay)
                elif message.key() == self._key:
                    done.delivered += self._delivered(waiting, jobs, message.value() or b"")
        done.open = sorted({delivery for delivery, _ in waiting})
        return done

    def _delivered(self, waiting: set[tuple[str, str]], jobs: Mapping[str, set[str]], value: bytes) -> int:
        try:
            record = decode_record(value)
        except msgspec.DecodeError:  # of a newer worker's form, or nobody's
            return 0
        if not isinstance(record, AttemptRecord) or record.verdict != "delivered":
            return 0
        if record.deliveries:
            named = (entry.partition("/") for entry in record.deliveries)
            return sum([self._end(waiting, delivery, job) for delivery, _, job in named])
        for job in jobs.get(record.delivery, ()):
            if record.id == "att_" + base32(attempt_digest(DeliveryId(record.delivery), record.attempt, job)):
                return self._end(waiting, record.delivery, job)
        return 0

    @staticmethod
    def _end(waiting: set[tuple[str, str]], delivery: str, job: str) -> int:
        if (delivery, job) not in waiting:
            return 0
        waiting.discard((delivery, job))
        return 1


def until_committed(
    settings: Settings, topic: str, ends: Mapping[int, int], told: Callable[[], None], timeout_s: float | None
) -> dict[int, int]:
    """Until the workers have settled and committed ingress up to `ends`, by partition; those that are not in time."""
    deadline = inf if timeout_s is None else time.monotonic() + timeout_s
    kafka = settings.kafka.confluent()
    faults: list[str] = []
    consumer = _reader(kafka, settings.topics.group("route"), faults)
    try:
        while True:
            try:
                asked = consumer.committed([TopicPartition(topic, partition) for partition in ends], timeout=10)
            except KafkaException as exception:
                raise explain(error_of(exception), f"ask how far {topic} is settled", kafka, faults) from None
            committed = {one.partition: max(0, one.offset) for one in asked}
            left = {partition: end for partition, end in ends.items() if committed[partition] < end}
            if not left or time.monotonic() >= deadline:
                return left
            told()
            time.sleep(ASK_EVERY_S)
    finally:
        consumer.close()


def _reader(kafka: Mapping[str, Any], group: str, faults: list[str]) -> Consumer:
    return Consumer(
        client_config(
            {
                **kafka,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
            },
            faults,
        )
    )


def _ends(consumer: Consumer, topics: Sequence[str]) -> list[TopicPartition]:
    found: list[TopicPartition] = []
    for topic in topics:
        listed = consumer.list_topics(topic, timeout=10).topics[topic]
        if listed.error is not None:
            raise KafkaFault(f"topic {topic} does not exist; run `headgate apply`, which makes it")
        for partition in listed.partitions:
            at = TopicPartition(topic, partition)
            found.append(TopicPartition(topic, partition, consumer.get_watermark_offsets(at, timeout=10)[1]))
    return found
