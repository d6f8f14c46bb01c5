"""A real worker that kills itself (SIGKILL) where one named event passes one named point of its way.

`python -m tests.chaos.killed_worker POINT EVENT_ID` is `headgate worker`, with public methods wrapped to look on. What
is wrapped does what it always did; at the point, for that event, the process is gone. Where two writes are under way at
the same time and either may be first, the point holds one of them back, so that the crash lies between them. Redis may
take its time (`patient_worker.py`). With `apart` as a third argument no record joins another one of its delivery.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from streams.flight import Flight
from streams.ingress import Router
from streams.lanes import Lanes
from streams.ledger import DONE, Answers, Ledger
from streams.outbox import Letter, Outbox
from streams.pump import Due, Pump, PumpSource
from streams.retry import Retries
from streams.settle import Settle
from streams.transport import Consumer, Fetch, TopicPartition
from tests import patient_worker


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Victim:
    """The event at which this process dies, and what is learnt of it on its way."""

    def __init__(self, event_id: str) -> None:
        self.id = event_id
        self.mark = f'"eventId":"{event_id}"'.encode()
        self.places: set[tuple[str, int, int]] = set()  # topic, partition, offset of its records
        self.keys: set[str] = set()  # its deliveries in the ledger

    def is_in(self, value: bytes | None) -> bool:
        return self.mark in (value or b"")

    def is_of(self, letter: Letter) -> bool:
        return ("hg-event", self.id.encode()) in letter.headers or self.is_in(letter.value)

    def watch_ends(self) -> None:
        """Learns the victim's ledger keys from the first end of an attempt."""
        ended = Settle.ended

        def look(settle: Settle, flight: Flight) -> None:
            if flight.delivery.event.eventId == self.id:
                self.keys.add(flight.ledger_key)
            ended(settle, flight)

        Settle.ended = look  # type: ignore[method-assign]

    def watch_fetches(self, on_fetch: Callable[[], None] = lambda: None) -> None:
        """Learns where the victim's record lies."""
        take = Router.take

        def look(router: Router, fetch: Fetch) -> None:
            for record in fetch.records:
                if self.is_in(record.value):
                    self.places.add((fetch.source.topic, record.partition, record.offset))
                    on_fetch()
            take(router, fetch)

        Router.take = look  # type: ignore[method-assign]

    def watch_commits(self, on_commit: Callable[[], None]) -> None:
        """Hears of the commits that have passed the victim's record."""
        self.watch_fetches()
        commit = Consumer.commit

        async def look(consumer: Consumer, *args: Any, **kwargs: Any) -> bool:
            done = await commit(consumer, *args, **kwargs)
            passed = {(lag.topic, lag.partition): lag.committed or 0 for lag in consumer.lags(int(time.time() * 1000))}
            if any(passed.get((topic, partition), 0) > offset for topic, partition, offset in self.places):
                on_commit()
            return done

        Consumer.commit = look  # type: ignore[method-assign]


def fetched(victim: Victim) -> None:
    """Fetched, before it is routed."""
    victim.watch_fetches(die)


def claimed(victim: Victim) -> None:
    """Claimed for its position in Redis, before it is in a lane."""
    victim.watch_fetches()
    ask = Ledger.ask

    async def look(
        ledger: Ledger, events: Sequence[str], positions: Sequence[str], keys: Sequence[str], hops: Sequence[int]
    ) -> Answers | None:
        answers = await ask(ledger, events, positions, keys, hops)
        ends = tuple(f"-{partition}-{offset}" for _, partition, offset in victim.places)
        if ends and any(position.endswith(ends) for position in positions):
            die()
        return answers

    Ledger.ask = look  # type: ignore[method-assign]


def answered(victim: Victim, trigger: str = "event") -> None:
    """The POST is answered, before it is settled."""
    ended = Settle.ended

    def look(settle: Settle, flight: Flight) -> None:
        if flight.delivery.event.eventId == victim.id and flight.delivery.trigger == trigger:
            die()
        ended(settle, flight)

    Settle.ended = look  # type: ignore[method-assign]


def retry_answered(victim: Victim) -> None:
    """The POST of a retry is answered, before it is settled."""
    answered(victim, "retry")


def delivered_told(victim: Victim) -> None:
    """The ledger knows that it is delivered; its attempt record is not written. The two go out at the same time."""
    victim.watch_ends()
    write_batch, tell = Outbox.write_batch, Ledger.tell
    never = asyncio.Event()

    async def hold(outbox: Outbox, topic: str, keys: Sequence[str], values: Sequence[bytes]) -> None:
        if any(victim.is_in(value) and b'"kind":"attempt"' in value for value in values):
            await never.wait()
        await write_batch(outbox, topic, keys, values)

    async def look(ledger: Ledger, keys: Sequence[str], values: Sequence[str]) -> bool:
        told = await tell(ledger, keys, values)
        if victim.keys & set(keys):
            die()
        return told

    Outbox.write_batch = hold  # type: ignore[method-assign]
    Ledger.tell = look  # type: ignore[method-assign]


def recorded(victim: Victim) -> None:
    """Its attempt record is acknowledged; the ledger knows nothing of it yet."""
    victim.watch_ends()
    write_batch, tell = Outbox.write_batch, Ledger.tell
    never = asyncio.Event()

    async def look(outbox: Outbox, topic: str, keys: Sequence[str], values: Sequence[bytes]) -> None:
        await write_batch(outbox, topic, keys, values)
        if any(victim.is_in(value) and b'"kind":"attempt"' in value for value in values):
            die()

    async def hold(ledger: Ledger, keys: Sequence[str], values: Sequence[str]) -> bool:
        if victim.keys & set(keys):
            await never.wait()
        return await tell(ledger, keys, values)

    Outbox.write_batch = look  # type: ignore[method-assign]
    Ledger.tell = hold  # type: ignore[method-assign]


def hop_told(victim: Victim) -> None:
    """The ledger knows that what replaces it is acknowledged; its source is not acknowledged yet."""
    victim.watch_ends()
    tell = Ledger.tell

    async def look(ledger: Ledger, keys: Sequence[str], values: Sequence[str]) -> bool:
        told = await tell(ledger, keys, values)
        if any(key in victim.keys and value != DONE for key, value in zip(keys, values, strict=True)):
            die()
        return told

    Ledger.tell = look  # type: ignore[method-assign]


def retry_recorded(victim: Victim) -> None:
    """Its retry record and its attempt record are acknowledged; the ledger knows nothing of them yet."""
    recorded(victim)


def dead_told(victim: Victim) -> None:
    """The ledger knows that its dead letter is acknowledged; its source is not acknowledged yet."""
    hop_told(victim)


def event_recorded(victim: Victim) -> None:
    """Its own record is acknowledged, and it goes nowhere: its source is not acknowledged yet."""
    write_batch = Outbox.write_batch

    async def look(outbox: Outbox, topic: str, keys: Sequence[str], values: Sequence[bytes]) -> None:
        await write_batch(outbox, topic, keys, values)
        if any(victim.is_in(value) and b'"kind":"event"' in value for value in values):
            die()

    Outbox.write_batch = look  # type: ignore[method-assign]


def acknowledged(victim: Victim) -> None:
    """Its source is acknowledged in this process, its offset is not committed."""
    victim.watch_fetches()
    settled = Consumer.settled

    def look(consumer: Consumer, source: Any, offsets: Any) -> None:
        settled(consumer, source, offsets)
        if any((source.topic, source.partition, offset) in victim.places for offset in offsets):
            die()

    Consumer.settled = look  # type: ignore[method-assign]


def committed(victim: Victim) -> None:
    """Its offset is committed."""
    victim.watch_commits(die)


def _written(victim: Victim, where: str) -> None:
    """A letter of it to a topic with `where` in its name is acknowledged by the broker, nothing after that is done."""
    write = Outbox.write

    def look(outbox: Outbox, letter: Letter) -> None:
        if victim.is_of(letter) and where in letter.topic:
            letter.done = lambda *_: die()
        write(outbox, letter)

    Outbox.write = look  # type: ignore[method-assign]


def retry_written(victim: Victim) -> None:
    """Its retry record is acknowledged, before its attempt record is written."""
    _written(victim, ".retry.")


def dead_written(victim: Victim) -> None:
    """Its dead letter is acknowledged, before its attempt record is written."""
    _written(victim, ".dlq.")


def unrouted_written(victim: Victim) -> None:
    """It is acknowledged in the unrouted topic, before its source is acknowledged."""
    _written(victim, ".dlq.unrouted")


def disabled_written(victim: Victim) -> None:
    """The record that disables its destination is acknowledged."""
    write = Outbox.write

    def look(outbox: Outbox, letter: Letter) -> None:
        if letter.topic.endswith(".state"):
            letter.done = lambda *_: die()
        write(outbox, letter)

    Outbox.write = look  # type: ignore[method-assign]


def disabled_held(victim: Victim) -> None:
    """Its dead letter is acknowledged; the record that disables its destination is not written."""
    write = Outbox.write

    def look(outbox: Outbox, letter: Letter) -> None:
        if letter.topic.endswith(".state"):
            return
        if victim.is_of(letter):
            letter.done = lambda *_: die()
        write(outbox, letter)

    Outbox.write = look  # type: ignore[method-assign]


def _is_victims(victim: Victim, due: Due) -> bool:
    return ("hg-event", victim.id.encode()) in due.record.headers


def retry_due(victim: Victim) -> None:
    """The pump has handed its retry record over; nothing is done with it."""
    due = Retries.due

    async def look(retries: Retries, records: Sequence[Due]) -> None:
        if any(_is_victims(victim, record) for record in records):
            die()
        await due(retries, records)

    Retries.due = look  # type: ignore[method-assign]


def retry_acknowledged(victim: Victim) -> None:
    """Its retry record is settled in the pump, and not committed; its ingress record is."""
    due, settled = Retries.due, PumpSource.settled
    passed = asyncio.Event()
    victim.watch_commits(passed.set)

    async def note(retries: Retries, records: Sequence[Due]) -> None:
        for one in records:
            if _is_victims(victim, one):
                await passed.wait()
                victim.places.add((one.source.topic, one.source.partition, one.offset))
        await due(retries, records)

    def look(source: PumpSource, offsets: Sequence[int]) -> None:
        settled(source, offsets)
        if any((source.topic, source.partition, offset) in victim.places for offset in offsets):
            die()

    Retries.due = note  # type: ignore[method-assign]
    PumpSource.settled = look  # type: ignore[method-assign]


def retry_committed(victim: Victim) -> None:
    """The offset of its retry record is committed."""
    due, commit = Retries.due, Pump._commit
    places: set[tuple[TopicPartition, int]] = set()

    async def note(retries: Retries, records: Sequence[Due]) -> None:
        for one in records:
            if _is_victims(victim, one):
                places.add((TopicPartition(one.source.topic, one.source.partition), one.offset))
        await due(retries, records)

    async def look(pump: Pump) -> bool:
        done = await commit(pump)
        passed = pump.committed()
        if any(passed.get(at, 0) > offset for at, offset in places):
            die()
        return done

    Retries.due = note  # type: ignore[method-assign]
    Pump._commit = look  # type: ignore[method-assign]


def moved(victim: Victim) -> None:
    """Its retry record is acknowledged in the tier of the rest, before the one that it replaces is settled."""
    relay = Settle.relay

    def look(settle: Settle, letter: Letter, source: Any, offset: int, *more: Any) -> None:
        relay(settle, letter, source, offset, *more)
        if victim.is_of(letter):
            letter.done = lambda *_: die()

    Settle.relay = look  # type: ignore[method-assign]


POINTS: Final[dict[str, Callable[[Victim], None]]] = {
    point.__name__: point
    for point in (
        fetched,
        claimed,
        answered,
        delivered_told,
        recorded,
        acknowledged,
        committed,
        retry_written,
        retry_recorded,
        hop_told,
        retry_due,
        retry_answered,
        retry_acknowledged,
        retry_committed,
        moved,
        dead_written,
        dead_told,
        disabled_written,
        disabled_held,
        event_recorded,
        unrouted_written,
    )
}


def apart() -> None:
    """A record joins none of its delivery that is in flight, but itself when it is read again (design, 3, rule 8)."""
    admit = Lanes.admit

    def look(lanes: Lanes, flight: Flight, now: float) -> None:
        flight.key += f"/{flight.delivery.hop}/{flight.offset}"
        admit(lanes, flight, now)

    Lanes.admit = look  # type: ignore[method-assign]


def main() -> None:
    point, event_id, *how = sys.argv[1:]
    POINTS[point](Victim(event_id))
    if how == ["apart"]:
        apart()
    patient_worker.main()


if __name__ == "__main__":
    main()
