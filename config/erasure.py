"""Watches the bytes of old keys leave `headgate.keys`, and helps them out.

What a tombstone or a newer record replaces stays in the log until the broker compacts the segment that holds it, and it
compacts only what is not being appended to. A segment rolls on an append that comes after its time: on a quiet topic,
never. So this writes ticks, and reads the topic until nothing is left of what was to go (design, section 8; ADR 0013).
"""

from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from msgspec import Struct

from config.kafka import KafkaFault, client_config, error_of, explain, read_to_end
from config.provision import topic_settings
from schemas.topics import COMPACTION_MS, Topics

CLEANER_S: Final = 15.0  # log.cleaner.backoff.ms, Kafka's default: how often a broker looks for something to compact
FILE_DELETE_MS: Final = 60_000  # file.delete.delay.ms, Kafka's default
SAY_EVERY_S: Final = 30.0
TICK_TIMEOUT_S: Final = 30.0


class Pace(Struct, frozen=True):
    """How fast a compacted topic can forget.

    `roll_s`: a segment's time. `expected_s`: from the tombstone until nothing of the value can be read, and
    `longest_s`: when something must be wrong. `disk_s`: how long a file that was compacted stays on the disk.
    """

    roll_s: float
    expected_s: float
    longest_s: float
    disk_s: float

    @property
    def look_every_s(self) -> float:
        return min(CLEANER_S, max(0.25, self.roll_s / 4))


def pace_of(kafka: Mapping[str, Any], topics: Topics) -> Pace:
    """By the topic's own settings. Raises `KafkaFault`."""
    found = topic_settings(kafka, topics.keys)
    roll_ms = min(int(found.get(name, COMPACTION_MS)) for name in ("segment.ms", "max.compaction.lag.ms"))
    expected_s = roll_ms / 1000 + 2 * CLEANER_S
    disk_s = int(found.get("file.delete.delay.ms", FILE_DELETE_MS)) / 1000
    return Pace(roll_ms / 1000, expected_s, 3 * expected_s + 60, disk_s)


def erase(
    kafka: Mapping[str, Any],
    topics: Topics,
    tick: bytes,
    counts: Callable[[bytes, bytes], bool],
    pace: Pace,
    say: Callable[[str], None],
) -> None:
    """Returns once no record of `headgate.keys` is left for which `counts(key, value)` holds.

    It may be stopped at any time, and begun again: it knows nothing but what the topic holds. `tick` is the key of
    the tombstones that it writes. Raises `KafkaFault`, also where the broker does not compact in a multiple of the time
    that its settings promise.
    """
    started = said = monotonic()
    tick_at = started + pace.roll_s + 0.5  # the segment that holds the tombstone is no older than the tombstone
    while left := remaining(kafka, topics, counts):
        now = monotonic()
        if now > started + pace.longest_s:
            raise KafkaFault(
                f"{left} record{'s' if left > 1 else ''} that should be gone can still be read in topic {topics.keys} "
                f"after {now - started:.0f} s: the broker does not compact it. Check log.cleaner.enable of the "
                "brokers, and cleanup.policy, segment.ms and max.compaction.lag.ms of the topic; then run this again"
            )
        if now >= tick_at:
            _tick(kafka, topics, tick)
            tick_at = now + pace.roll_s + 0.5
        if now - said >= SAY_EVERY_S:
            said = now
            rest_s = started + pace.expected_s - now
            soon = f"about {duration(rest_s)} to go" if rest_s > 0 else "the broker should compact it any moment"
            say(f"still in topic {topics.keys}: {left} record{'s' if left > 1 else ''}; {soon}")
        sleep(pace.look_every_s)


def remaining(kafka: Mapping[str, Any], topics: Topics, counts: Callable[[bytes, bytes], bool]) -> int:
    """How many records of `headgate.keys` there are for which `counts(key, value)` holds, overwritten ones too."""
    return sum(counts(key, value) for key, value in _values(kafka, topics))


def masters_in(kafka: Mapping[str, Any], topics: Topics, master_of: Callable[[bytes], str | None]) -> frozenset[str]:
    """The master keys that are needed to read the topic, of any vendor: those of overwritten records too."""
    return frozenset(name for _, value in _values(kafka, topics) if (name := master_of(value)) is not None)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _values(kafka: Mapping[str, Any], topics: Topics) -> list[tuple[bytes, bytes]]:
    """All that lies in the topic, of transactions that ended in nothing too."""
    found = []
    for message in read_to_end(kafka, [topics.keys], topics.group("cli"), isolation="read_uncommitted"):
        key, value = message.key(), message.value()
        if key is not None and value is not None:
            found.append((key, value))
    return found


def _tick(kafka: Mapping[str, Any], topics: Topics, key: bytes) -> None:
    """Outside of the vendor's transactions: it changes nothing, and must not fence whoever changes something."""
    faults: list[str] = []
    refused: list[KafkaError] = []

    def acknowledged(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            refused.append(error)

    doing = f"write to topic {topics.keys}"
    try:
        producer = Producer(client_config({**kafka, "acks": "all", "partitioner": "murmur2_random"}, faults))
        producer.produce(topics.keys, key=key, value=None, partition=0, on_delivery=acknowledged)
        unsent = producer.flush(TICK_TIMEOUT_S)
    except KafkaException as exception:
        raise explain(error_of(exception), doing, kafka, faults) from None
    if refused or unsent:
        raise explain(refused[0] if refused else KafkaError(KafkaError._TIMED_OUT), doing, kafka, faults)
