"""The control plane's pen: reads what the compacted topics hold and writes a change as one Kafka transaction.

Owns that an apply, a rotation or a shredding is whole or not at all, and that of two at a time one wins (ADR 0007).
"""

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from config.acls import transactional_id
from config.kafka import KafkaFault, client_config, connected_admin, error_of, explain, read_to_end
from config.plan import Current, Write, current_state
from schemas.ids import Vendor
from schemas.topics import Topics

TRANSACTION_TIMEOUT_S: Final = 30.0
# A change of another vendor that was killed within its transaction holds readers of these topics back until a broker
# ends it: that looks for such ones every 10 s (transaction.abort.timed.out.transaction.cleanup.interval.ms).
SEEN_TIMEOUT_S: Final = TRANSACTION_TIMEOUT_S + 30.0

# what is told of records that were not sent since another was refused
_PURGED: Final = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})
_FENCED: Final = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})


class Fenced(Exception):
    """Another writer took this vendor's control plane over; nothing of this one was written."""


def read_current(kafka: Mapping[str, Any], topics: Topics, vendor: Vendor) -> Current:
    """What the topics hold of one vendor, read committed. Raises `KafkaFault`."""
    names = (topics.control, topics.keys, topics.state)
    try:
        return current_state(vendor, _records(kafka, topics, names))
    except msgspec.DecodeError as fault:
        raise KafkaFault(
            f"topic {topics.control}, {topics.keys} or {topics.state} holds a record that this version cannot read "
            f"({fault}); use the version of Headgate that wrote it, or a newer one"
        ) from None


def _records(kafka: Mapping[str, Any], topics: Topics, names: Sequence[str]) -> Iterator[tuple[bytes, bytes | None]]:
    for message in read_to_end(kafka, names, topics.group("cli")):
        key = message.key()
        if key is not None:
            yield key, message.value()


class Writer:
    """The right to write one vendor's part of the control plane, from `with` on until another writer takes it.

    Take it before reading the current state: what is read then cannot be changed by another writer that this one does
    not notice. `command` is what to run again if this one fails. Raises `Fenced` where another has taken it,
    `KafkaFault` where Kafka does not serve.
    """

    def __init__(
        self, kafka: Mapping[str, Any], topics: Topics, vendor: Vendor, command: str = "headgate apply"
    ) -> None:
        self._command = command
        self._kafka = kafka
        self._topics = topics
        self._vendor = vendor
        self._faults: list[str] = []
        self._producer: Producer | None = None

    def __enter__(self) -> "Writer":
        connected_admin(self._kafka)  # says within 10 s that no broker answers; a producer would wait on
        producer = Producer(
            client_config(
                {
                    **self._kafka,
                    "transactional.id": transactional_id(self._topics, self._vendor),
                    "transaction.timeout.ms": int(TRANSACTION_TIMEOUT_S * 1000),
                    "acks": "all",
                    "linger.ms": 20,
                    "compression.type": "zstd",
                    "partitioner": "murmur2_random",
                },
                self._faults,
            )
        )
        try:
            producer.init_transactions(TRANSACTION_TIMEOUT_S)
        except KafkaException as exception:
            raise self._fault(exception, f"take the control plane of vendor {self._vendor} over") from None
        self._producer = producer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._producer = None

    def current(self) -> Current:
        return read_current(self._kafka, self._topics, self._vendor)

    def write(self, writes: Sequence[Write], max_bytes: int) -> None:
        """Writes all or nothing, and returns once a read-committed reader has seen the last record in every topic.

        `max_bytes` bounds one record, as the topics do.
        """
        if not writes:
            return
        producer = self._producer
        assert producer is not None, "the writer is used outside its `with`"
        names = {"control": self._topics.control, "keys": self._topics.keys, "state": self._topics.state}
        last: dict[str, int] = {}
        refused: list[KafkaError] = []

        def acknowledged(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                refused.append(error)
            else:
                last[message.topic()] = max(last.get(message.topic(), -1), message.offset())

        largest = max(writes, key=lambda write: len(write.value or b""))
        if len(largest.value or b"") > max_bytes:
            raise KafkaFault(f"the record {largest.key.decode()} has more than {max_bytes} bytes; make it smaller")
        try:
            producer.begin_transaction()
            for write in writes:
                self._produce(producer, names[write.topic], write, acknowledged)
            self._commit(producer)
        except KafkaException as exception:
            causes = [error for error in refused if error.code() not in _PURGED]
            fault = self._fault(causes[0] if causes else exception, "write the configuration")
            self._abort(producer)
            raise fault from None
        self._wait_until_seen(last)

    def _produce(self, producer: Producer, topic: str, write: Write, acknowledged: Any) -> None:
        while True:
            try:
                producer.produce(topic, key=write.key, value=write.value, partition=0, on_delivery=acknowledged)
                return
            except BufferError:
                producer.poll(0.1)

    def _commit(self, producer: Producer) -> None:
        """Asks again while the answer is outstanding: whether it was committed must not stay open."""
        deadline = monotonic() + TRANSACTION_TIMEOUT_S
        while True:
            try:
                producer.commit_transaction(max(0.1, deadline - monotonic()))
                return
            except KafkaException as exception:
                error = error_of(exception)
                if error.code() in _FENCED or error.txn_requires_abort():
                    raise
                if not error.retriable() or monotonic() > deadline:
                    raise KafkaFault(
                        f"the broker did not say whether the change was committed ({error.str()}); "
                        f"run `{self._command}` again: it goes on from what the topics hold then"
                    ) from None

    def _abort(self, producer: Producer) -> None:
        try:
            producer.abort_transaction(TRANSACTION_TIMEOUT_S)
        except KafkaException:
            pass  # fenced, or the broker is away: the transaction ends by its timeout, uncommitted

    def _fault(self, cause: KafkaException | KafkaError, doing: str) -> Exception:
        error = error_of(cause) if isinstance(cause, KafkaException) else cause
        if error.code() in _FENCED:
            return Fenced(
                f"another change of vendor {self._vendor} by `headgate` began after this one and goes first; "
                f"nothing of this one was written: run `{self._command}` again once the other has ended"
            )
        return explain(error, doing, self._kafka, self._faults)

    def _wait_until_seen(self, last: Mapping[str, int]) -> None:
        consumer = Consumer(
            client_config(
                {
                    **self._kafka,
                    "group.id": self._topics.group("cli"),
                    "enable.auto.commit": False,
                    "isolation.level": "read_committed",
                    "fetch.wait.max.ms": 20,
                }
            )
        )
        try:
            consumer.assign([TopicPartition(topic, 0, offset) for topic, offset in last.items()])
            missing = dict(last)
            deadline = monotonic() + SEEN_TIMEOUT_S
            while missing:
                message = consumer.poll(0.2)
                if message is not None and message.error() is None:
                    if message.offset() >= missing.get(message.topic(), message.offset() + 1):
                        del missing[message.topic()]
                elif monotonic() > deadline:
                    raise KafkaFault(
                        "the configuration is committed, but was not seen in "
                        f"{', '.join(sorted(missing))} within {SEEN_TIMEOUT_S:g} s; check the brokers"
                    )
        finally:
            consumer.close()
