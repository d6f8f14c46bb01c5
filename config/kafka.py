"""Kafka for commands: faults as sentences that name a remedy, and reading a topic to its end.

For what runs once and answers a person. Workers have clients of their own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Final, Literal

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

CONNECT_TIMEOUT_S: Final = 10.0
LOOK_S: Final = 1.0
STALL_TIMEOUT_S: Final = 30.0

# Not of logging's tree, so that nothing which sets that up (a worker's `configure_logs`) makes it heard
_UNHEARD: Final = logging.Logger("headgate.librdkafka")
_UNHEARD.addHandler(logging.NullHandler())

_UNREACHABLE: Final = frozenset(
    {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT}
)
_SECURITY: Final = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED})
ANONYMOUS: Final = "User:ANONYMOUS"
NO_GROUP: Final = KafkaError.GROUP_AUTHORIZATION_FAILED
"""librdkafka looks for the group of every consumer; one that joins none may do without the right to."""
DENIED: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)


class KafkaFault(Exception):
    """Kafka did not do what a command needs. The text is for a person."""


class Denied(KafkaFault):
    """The user has not the right to do it. What it lacks in all is `config/rights.py`'s to say."""


def client_config(kafka: Mapping[str, Any], faults: list[str] | None = None) -> dict[str, Any]:
    """A client's configuration that keeps librdkafka's log off the terminal; what it complains of goes to `faults`."""
    config = {**kafka, "logger": _UNHEARD, "socket.connection.setup.timeout.ms": 5000}
    if faults is not None:
        config["error_cb"] = lambda error: faults.append(error.str())
    return config


def explain(error: KafkaError, doing: str, kafka: Mapping[str, Any], faults: Sequence[str] = ()) -> KafkaFault:
    """`doing` completes "cannot …", such as "write to topic headgate.control"."""
    where = kafka.get("bootstrap.servers", "")
    telling = [fault for fault in faults if "brokers are down" not in fault] or faults
    last = f" ({telling[-1]})" if telling else ""
    code = error.code()
    if code in DENIED:
        return Denied(f"cannot {doing}: the broker does not allow it to {principal_of(kafka)} ({error.name()})")
    if code in _SECURITY or _insecure(faults):
        return KafkaFault(
            f"cannot {doing}: no secure connection to {where} as {principal_of(kafka)}: {error.str()}{last}; "
            "check the HEADGATE_KAFKA_SECURITY_PROTOCOL, HEADGATE_KAFKA_SASL_… and HEADGATE_KAFKA_CA_FILE settings"
        )
    if code in _UNREACHABLE:
        plain = ", and HEADGATE_KAFKA_SECURITY_PROTOCOL: it is PLAINTEXT" if principal_of(kafka) == ANONYMOUS else ""
        return KafkaFault(f"cannot {doing}: no broker answers at {where}{last}; check HEADGATE_KAFKA_BOOTSTRAP{plain}")
    return KafkaFault(f"cannot {doing}: {error.str() or error.name()} ({error.name()})")


def _insecure(faults: Sequence[str]) -> bool:
    return any("SSL" in fault or "SASL" in fault for fault in faults)


def principal_of(kafka: Mapping[str, Any]) -> str:
    """The user as brokers and ACLs name it; of a certificate only its brokers know how they name it."""
    if "sasl.username" in kafka:
        return f"User:{kafka['sasl.username']}"
    return ANONYMOUS if "ssl.certificate.location" not in kafka else "the client certificate's user"


def error_of(exception: KafkaException) -> KafkaError:
    error: KafkaError = exception.args[0]
    return error


def connected_admin(kafka: Mapping[str, Any]) -> tuple[AdminClient, dict[str, int]]:
    """An admin client that has reached the broker, and the partitions of each topic that this user may see.

    Raises `KafkaFault`: within 10 s where nobody answers, at once where a password or a certificate is not taken.
    """
    faults: list[str] = []
    admin = AdminClient(client_config(kafka, faults))
    deadline = monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            listed = admin.list_topics(timeout=LOOK_S)
        except KafkaException as exception:
            admin.poll(0)  # hands over what the client complained of
            if monotonic() < deadline and error_of(exception).code() in _UNREACHABLE and not _insecure(faults):
                continue
            raise explain(error_of(exception), "reach Kafka", kafka, faults) from None
        return admin, {name: len(topic.partitions) for name, topic in listed.topics.items() if topic.error is None}


def refuse_hidden(kafka: Mapping[str, Any], names: Sequence[str]) -> None:
    """Topics that are not listed do not exist, or may not be seen by this user: raises `Denied` for one of these."""
    if not names:
        return
    admin = AdminClient(client_config(kafka))
    for name, future in admin.describe_topics(TopicCollection(list(names)), request_timeout=CONNECT_TIMEOUT_S).items():
        try:
            future.result()
        except KafkaException as exception:
            if error_of(exception).code() in DENIED:
                raise explain(error_of(exception), f"see topic {name}", kafka) from None


def read_to_end(
    kafka: Mapping[str, Any],
    topics: Sequence[str],
    group: str,
    starts: Callable[[Consumer, list[TopicPartition]], list[TopicPartition]] = lambda _, partitions: partitions,
    *,
    isolation: Literal["read_committed", "read_uncommitted"] = "read_committed",
    total: Callable[[int], None] | None = None,
) -> Iterator[Message]:
    """Every committed record of the topics, from the earliest to the end; topics that do not exist are empty.
    Those that this user may not see are not: that is `Denied`.

    Read uncommitted also has what a transaction wrote that ended in nothing, for whoever asks what lies on the disk.
    With `total`, which is told how many offsets that are, the end is where it was at the start, however much is written
    meanwhile.

    Records of a partition come in its order. No group is joined and nothing is committed: `group` only names the
    reader. `starts` may move the partitions' first offsets, and leave some out. Raises `KafkaFault`, also where nothing
    comes for 30 s.
    """
    faults: list[str] = []
    consumer = Consumer(
        client_config(
            {
                **kafka,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "isolation.level": isolation,
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 50,
                "fetch.error.backoff.ms": 50,
            },
            faults,
        )
    )
    try:
        try:
            listed = consumer.list_topics(timeout=CONNECT_TIMEOUT_S).topics
            refuse_hidden(kafka, [name for name in topics if name not in listed])
            partitions = [
                TopicPartition(name, partition, 0)
                for name in topics
                if name in listed and listed[name].error is None
                for partition in listed[name].partitions
            ]
            if not partitions:
                return
            assigned = starts(consumer, partitions)
            ends: dict[tuple[str, int], int] = {}
            if total is not None:
                offsets = 0
                for part in assigned:
                    first, end = consumer.get_watermark_offsets(part, CONNECT_TIMEOUT_S)
                    ends[part.topic, part.partition] = end
                    offsets += 0 if part.offset < 0 else max(0, end - max(first, part.offset))
                total(offsets)
            consumer.assign(assigned)
        except KafkaException as exception:
            consumer.poll(0)  # hands over what the client complained of
            raise explain(error_of(exception), "reach Kafka", kafka, faults) from None
        yield from _until_end(consumer, {(p.topic, p.partition) for p in assigned}, ends, kafka, faults)
    finally:
        consumer.close()


def _until_end(
    consumer: Consumer,
    open_ends: set[tuple[str, int]],
    ends: Mapping[tuple[str, int], int],
    kafka: Mapping[str, Any],
    faults: list[str],
) -> Iterator[Message]:
    deadline = monotonic() + STALL_TIMEOUT_S
    while open_ends:
        first = consumer.poll(0.2)
        if first is None:
            if monotonic() > deadline:
                names = ", ".join(sorted({topic for topic, _ in open_ends}))
                last = f" ({faults[-1]})" if faults else ""
                raise KafkaFault(
                    f"cannot read topic {names} to its end: nothing came for {STALL_TIMEOUT_S:g} s{last}; "
                    "check HEADGATE_KAFKA_BOOTSTRAP and the brokers"
                )
            continue
        for message in (first, *consumer.consume(1000, 0)):
            error = message.error()
            if error is None:
                at = (message.topic() or "", message.partition() or 0)
                end = ends.get(at)
                if end is None:
                    yield message
                    continue
                offset = message.offset() or 0
                if offset < end:
                    yield message
                if offset + 1 >= end and at in open_ends:  # an end that is a transaction's mark shows as EOF below
                    open_ends.discard(at)
                    consumer.pause([TopicPartition(*at)])
            elif error.code() == KafkaError._PARTITION_EOF:
                open_ends.discard((message.topic(), message.partition()))
            elif not error.retriable() and error.code() not in _UNREACHABLE | {NO_GROUP}:
                raise explain(error, f"read topic {message.topic()}", kafka, faults)
        deadline = monotonic() + STALL_TIMEOUT_S  # from here on: what a reader does between two of them is its own time
