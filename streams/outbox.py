"""The durable writer: everything a worker writes to Kafka, and the moment each thing is acknowledged.

Owns the producers. Two kinds of writing go through two of them: batches of attempt records, confirmed together when the
queue is empty and no error was reported (no callback a record); and single records (parked, dead, unrouted), each
confirmed by its own delivery report, so that one tenant's missing topic holds up nobody's attempts.

Produce never gives up by itself (`message.timeout.ms=0`). A fatal producer is replaced and all that was not
acknowledged is written again. What the broker refuses for its size is written as a stub. The caller learns of nothing
but success, or of a topic that is not there.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import confluent_kafka
import structlog
from confluent_kafka import KafkaError, KafkaException
from msgspec import Struct

from schemas.wire import stub

log = structlog.get_logger()

POLL_S: Final = 0.002
# what the producer knows beforehand, and what can change: the record waits, as one that the broker has refused
WAITS: Final = frozenset(
    {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}
)
MISSING_TOPIC: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})
AGAIN_S: Final = 0.2
MOST_AGAIN_S: Final = 2.0
SAY_EVERY_REFUSALS: Final = 100
# The broker refuses a batch as a whole: a record is made a stub only after it was refused in other company too.
TRIES_WHOLE: Final = 3
TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})

RawHeaders = Sequence[tuple[str, bytes | None]]


class Letter(Struct):
    """One record to be written. `partition` -1 leaves the choice to the key.

    `done(letter, False)`: there is no such topic. `done` must not hold the letter itself: such a ring, with all its
    bytes, stays until the collector comes by, which in a worker is seldom.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: RawHeaders
    done: Callable[["Letter", bool], None]
    partition: int = -1
    is_stub: bool = False
    refusals: int = 0

    def size(self) -> int:
        return len(self.key or b"") + len(self.value or b"") + 512


def producer_settings(kafka: Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
    return {
        **kafka,
        "enable.idempotence": True,
        "acks": "all",
        "message.timeout.ms": 0,
        "linger.ms": 2,
        "batch.size": 1 << 20,
        "message.max.bytes": max_bytes,
        "queue.buffering.max.messages": 500_000,
        "queue.buffering.max.kbytes": 512 * 1024,
        "compression.type": "lz4",
        "partitioner": "murmur2_random",
        "topic.metadata.propagation.max.ms": 3000,
        "log_level": 2,
    }


class Outbox:
    """Writes, and says when the broker has acknowledged. All calls come from the event loop's thread."""

    def __init__(self, kafka: Mapping[str, Any], max_bytes: int) -> None:
        self._settings = producer_settings(kafka, max_bytes)
        self._max_bytes = max_bytes
        self._fatal: set[Literal["batches", "letters"]] = set()
        self._batches = self._make_batches()
        self._letters = self._make_letters()
        self._batch_failed: list[tuple[str, bytes | None, bytes]] = []
        self._open: dict[int, Letter] = {}
        self._next = 0
        self._generation = 0
        self._letter_bytes = 0
        self._batch_bytes = 0
        self._waiting_since: float | None = None
        self._last_ack = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._poller: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def _make_batches(self) -> confluent_kafka.Producer:
        self._fatal.discard("batches")
        more = {"delivery.report.only.error": True, "on_delivery": self._batch_report}
        return confluent_kafka.Producer({**self._settings, **more})

    def _make_letters(self) -> confluent_kafka.Producer:
        """Sealed values do not compress."""
        self._fatal.discard("letters")
        return confluent_kafka.Producer({**self._settings, "compression.type": "none"})

    def _serve(self, which: Literal["batches", "letters"]) -> None:
        """Serves delivery reports. A fatal error comes out of `poll` (the library does not tell `error_cb` of it)."""
        try:
            (self._batches if which == "batches" else self._letters).poll(0)
        except KafkaException as fault:
            if not fault.args[0].fatal():
                raise
            self._fatal.add(which)

    # ---------------------------------------------------------------- how far behind the broker is

    @property
    def unacknowledged_bytes(self) -> int:
        return self._letter_bytes + self._batch_bytes

    @property
    def unacknowledged_letter_bytes(self) -> int:
        return self._letter_bytes

    @property
    def held_bytes(self) -> int:
        """What is not acknowledged lies here and, as a copy, in the producer's queue."""
        return 2 * (self._letter_bytes + self._batch_bytes)

    def unacknowledged_for_s(self) -> float:
        """How long something has waited without any acknowledgement; 0 when nothing waits."""
        if not self._open and not self._batch_bytes:
            return 0.0
        return time.monotonic() - self._last_ack

    def _began(self) -> None:
        if not self._open and not self._batch_bytes:
            self._last_ack = time.monotonic()

    # ---------------------------------------------------------------- batches

    async def write_batch(self, topic: str, keys: Sequence[str], values: Sequence[bytes]) -> None:
        """Returns once the broker has acknowledged all of it. One batch at a time."""
        self._began()
        self._batch_bytes = sum(map(len, values))
        try:
            todo: list[tuple[str, bytes | None, bytes]] = []
            await self._produce_all(topic, keys, values)
            while True:
                if await self._emptied():
                    todo, self._batch_failed = self._batch_failed, []
                    if not todo:
                        break
                else:  # a fatal producer: a new one, and all of it again (attempt ids make a repeat harmless)
                    await self._produce_all(topic, keys, values)
                    continue
                await asyncio.sleep(0.5)
                for again, key, value in todo:
                    await self._produce_one(again, key, value)
            self._last_ack = time.monotonic()
        finally:
            self._batch_bytes = 0

    async def _produce_all(self, topic: str, keys: Sequence[str], values: Sequence[bytes]) -> None:
        messages = [{"value": value, "key": key} for key, value in zip(keys, values, strict=True)]
        taken = self._batches.produce_batch(topic, messages)
        if taken < len(messages):  # queue full, or one too large: the slow way for what is left
            for message in messages:
                if message.get("_error") is not None:
                    await self._produce_one(
                        topic,
                        str(message["key"]).encode(),
                        bytes(message["value"]),  # type: ignore[arg-type]
                    )

    async def _produce_one(self, topic: str, key: bytes | None, value: bytes) -> None:
        while True:
            try:
                self._batches.produce(topic, value, key)
                return
            except BufferError:
                self._serve("batches")
                await asyncio.sleep(POLL_S)
            except KafkaException as fault:
                if fault.args[0].code() in TOO_LARGE:
                    log.error("attempt_record_too_large", bytes=len(value))
                    return
                if fault.args[0].code() in WAITS:
                    self._batch_error(fault.args[0], topic, key, value)
                    return
                if fault.args[0].code() != KafkaError._FATAL:
                    raise
                self._fatal.add("batches")
                return  # `_emptied` tells, and all of the batch is written again

    async def _emptied(self) -> bool:
        """True once nothing waits in the batch producer; False where it had a fatal error and was replaced."""
        while True:
            self._serve("batches")
            if "batches" in self._fatal:  # asked first: the queue of one that takes nothing is empty too
                log.error("producer_replaced", which="batches")
                self._batches = self._make_batches()
                self._batch_failed = []
                return False
            if not len(self._batches):
                return True
            await asyncio.sleep(POLL_S)

    def _batch_report(self, error: KafkaError | None, message: Any) -> None:
        if error is not None and error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            self._batch_error(error, message.topic(), message.key(), message.value())

    def _batch_error(self, error: KafkaError, topic: str, key: bytes | None, value: bytes) -> None:
        if not self._batch_failed:  # the rest of the batch has the same to say
            log.error("produce_refused", topic=topic, error=error.name())
        if error.code() not in TOO_LARGE:
            self._batch_failed.append((topic, key, value))

    # ---------------------------------------------------------------- single records

    def write(self, letter: Letter) -> None:
        """Writes one record; `letter.done` is called from the event loop once the broker has answered for it."""
        self._began()
        self._next += 1
        number = self._next
        self._open[number] = letter
        self._letter_bytes += letter.size()
        self._idle.clear()
        self._send(number, letter)
        if self._poller is None:
            self._poller = self._loop.call_later(POLL_S, self._poll)

    def _send(self, number: int, letter: Letter) -> None:
        generation = self._generation

        def report(error: KafkaError | None, _message: Any) -> None:
            if generation == self._generation:
                self._answered(number, error)

        more = {} if letter.partition < 0 else {"partition": letter.partition}
        for _ in range(2):
            try:
                self._letters.produce(
                    letter.topic, letter.value, letter.key, headers=list(letter.headers), on_delivery=report, **more
                )
                return
            except BufferError:
                break
            except KafkaException as fault:
                code = fault.args[0].code()
                if code in TOO_LARGE and not letter.is_stub:
                    self._make_stub(letter)
                    continue
                if code in MISSING_TOPIC:
                    self._loop.call_soon(self._answered, number, fault.args[0])
                    return
                break
        self._loop.call_later(AGAIN_S, self._again, number, generation)

    def _again(self, number: int, generation: int) -> None:
        letter = self._open.get(number)
        if letter is not None and generation == self._generation:  # a new producer was given all that is open
            self._send(number, letter)

    def _make_stub(self, letter: Letter) -> None:
        log.error("record_too_large", topic=letter.topic, bytes=len(letter.value or b""))
        self._letter_bytes -= letter.size()
        letter.key, letter.value, letter.headers = stub(letter.key, letter.value, letter.headers)
        letter.is_stub = True
        self._letter_bytes += letter.size()

    def _answered(self, number: int, error: KafkaError | None) -> None:
        letter = self._open.get(number)
        if letter is None:
            return
        self._last_ack = time.monotonic()  # a refusal is an answer too: one record's must not look like a broker away
        if error is not None and error.code() not in MISSING_TOPIC:
            letter.refusals += 1
            if letter.refusals % SAY_EVERY_REFUSALS == 1:
                log.error("produce_refused", topic=letter.topic, error=error.name())
            if error.code() in TOO_LARGE and not letter.is_stub and letter.refusals > TRIES_WHOLE:
                self._make_stub(letter)
            wait_s = AGAIN_S * (1 + random.random() * letter.refusals)  # apart from what it was in a batch with
            self._loop.call_later(min(wait_s, MOST_AGAIN_S), self._again, number, self._generation)
            return
        del self._open[number]
        self._letter_bytes -= letter.size()
        if not self._open:
            self._idle.set()
        letter.done(letter, error is None)

    def _poll(self) -> None:
        self._poller = None
        self._serve("letters")
        if "letters" in self._fatal:
            log.error("producer_replaced", which="letters", unacknowledged=len(self._open))
            self._generation += 1
            self._letters = self._make_letters()
            for number, letter in list(self._open.items()):
                self._send(number, letter)
        if self._open and self._poller is None:  # `done` may have written more, and begun to poll for it
            self._poller = self._loop.call_later(POLL_S, self._poll)

    async def flushed(self, timeout_s: float) -> bool:
        """Waits until no single record is unacknowledged; False at the time limit."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
