"""One batch of a stage kind while this worker has it: its range of the log, its records, how an attempt of it ended.

A batch flies as one (`streams/flight.py`): it waits in its destination's lane, is started, parked and settled there
like a delivery. What is in it is opened only for an attempt, or for its dead letters; what there was no room for is
read again from the log.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import structlog
from msgspec import Struct

from config.vault import Unsealable
from connectors.contract import Batch, Connector, Span
from connectors.registry import KINDS
from schemas.attempt import PURPOSE_DELIVERY
from schemas.dead_letter import UNKNOWN_OUTCOME
from schemas.delivery import Delivery
from schemas.event import correlation_id, from_canonical
from schemas.ids import DeliveryId, EventId
from schemas.outcome import Outcome, delivered, retry
from schemas.staged import read_staged
from schemas.wire import Manifest, Parked
from streams.runner import Done, deliver

if TYPE_CHECKING:
    from streams.compiled import CompiledTenant
    from streams.flight import Flight

log = structlog.get_logger()

OPENED_AT_ONCE: Final = 100  # some 0.6 ms of the loop: others go on in between
NOT_THE_BATCH: Final = retry("platform", "connector_error", "its range of the log is not what it was")


class Record(Struct, frozen=True, gc=False):
    """A staged delivery as it was read."""

    offset: int
    headers: Mapping[str, bytes]
    value: bytes


def digest_of(records: Iterable[Record]) -> str:
    """Tells a batch from any other: of the deliveries in it, in their order."""
    found = blake2b(digest_size=16)
    for record in records:
        found.update(record.headers.get("hg-delivery", b""))
    return found.hexdigest()


class Opened(Struct, gc=False):
    """What a batch holds: deliveries, their values as they are sealed, the records that do not open, and whether its
    range of the log is still what it was."""

    deliveries: list[Delivery]
    sealed: dict[DeliveryId, bytes]
    unsealable: list[Record]
    whole: bool = True


class Dead(Struct, frozen=True, gc=False):
    """Why a delivery will not be tried again."""

    code: str
    fault: str
    detail: str


class Keeper(Protocol):
    """The partition that a batch belongs to, during one assignment."""

    async def note(self, batch: "StagedBatch", noted: bytes) -> None:
        """Raises NotOwned once the partition is another worker's."""
        ...

    async def read_again(self, batch: "StagedBatch") -> list[Record]: ...


class StagedBatch:
    """`of` is its destination as the stage's records name it; `item` the offset that its partition's commit waits at:
    its first record's, or that of its manifest."""

    __slots__ = (
        "_keeper",
        "_noted",
        "_task",
        "count",
        "digest",
        "flying",
        "item",
        "of",
        "opened",
        "records",
        "refused",
        "sent",
        "skip",
        "span",
        "turn",
        "unsure",
    )

    def __init__(
        self,
        keeper: Keeper,
        of: bytes,
        span: Span,
        *,
        item: int,
        count: int,
        digest: str,
        records: list[Record] | None,
        skip: Sequence[int] = (),
        turn: int = 0,
        unsure: bool = False,
        noted: bytes = b"",
    ) -> None:
        self._keeper = keeper
        self._noted = noted
        self._task: asyncio.Task[None] | None = None
        self.of = of
        self.span = span
        self.item = item
        self.count = count
        self.digest = digest
        self.records = records
        self.skip = skip
        self.turn = turn
        self.unsure = unsure
        self.sent: tuple[tuple[DeliveryId, str], ...] = ()  # by an attempt: deliveries and their replay jobs
        self.refused: Mapping[DeliveryId, Outcome] = {}  # of them, by themselves
        self.opened: Opened | None = None
        self.flying: Flight | None = None  # whose end is this batch's: its own flight, or the one that it joined

    @property
    def noted(self) -> bytes:
        return self._noted

    def manifest(self) -> Manifest:
        """Of its next turn."""
        span = self.span
        return Manifest(span.partition, span.first, span.last, self.count, self.digest, self.turn + 1)

    def parked(self) -> None:
        """It leaves this worker's memory: a manifest stands for it from now on."""
        self.records = self.opened = None

    # ---------------------------------------------------------------- an attempt

    def start(self, connector: Connector, flight: "Flight", at_ms: int, done: Done) -> None:
        """Begins an attempt; `done` is called once, with the outcome that stands for all of the batch."""
        self._task = asyncio.get_running_loop().create_task(self._attempt(connector, flight, at_ms, done))
        self._task.add_done_callback(_ended)

    async def _attempt(self, connector: Connector, flight: "Flight", at_ms: int, done: Done) -> None:
        opened = await self.open(flight.lane.owner.newest())
        if not opened.whole:
            done(NOT_THE_BATCH)
            return
        if not opened.deliveries:
            done(delivered())
            return
        delivery = flight.delivery
        batch = Batch(
            delivery.tenant,
            delivery.destination,
            at_ms,
            self.span,
            tuple(opened.deliveries),
            self._noted,
            self._note,
        )
        self.sent = tuple([(one.id, one.replay) for one in opened.deliveries])
        outcomes = await deliver(connector, batch)
        done(self._judged(outcomes, KINDS[flight.lane.record.type].unsure))

    async def open(self, tenant: "CompiledTenant") -> Opened:
        """Opens what it holds, once, a slice at a time. What is shredded is dropped, and counted."""
        if self.opened is not None:
            return self.opened
        records, whole = self.records, True
        if records is None:
            records = await self._keeper.read_again(self)
            found = digest_of(records)
            whole = (len(records), found) == (self.count, self.digest)
            if not whole:
                log.error("batch_changed", vendor=tenant.ref.vendor, span=str(self.span), records=len(records))
        opened = Opened([], {}, [], whole)
        for start in range(0, len(records), OPENED_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            for record in records[start : start + OPENED_AT_ONCE]:
                self._open_one(tenant, record, opened)
        self.opened = opened
        return opened

    def buried(self, flight: "Flight", opened: Opened, attempt: int, dead: "Dead") -> list[tuple[Parked, bytes]]:
        """What stands in the dead letters of its deliveries: of those that were refused, or, where it is dead as a
        whole, of all; with their sealed values."""
        whole = flight.end == "dead"
        if self.unsure:
            detail = f"it is not known whether the destination holds it; last: {dead.code}. {dead.detail}"
            dead = Dead(UNKNOWN_OUTCOME, "destination", detail)
        buried: list[tuple[Parked, bytes]] = []
        for delivery in opened.deliveries:
            refused = self.refused.get(delivery.id)
            if refused is None and not whole:
                continue
            why = dead if refused is None else Dead(refused.code, refused.fault, refused.detail)
            parked = Parked(
                tenant=delivery.tenant,
                destination=delivery.destination,
                delivery=delivery.id,
                event=EventId(delivery.event.eventId),
                event_type=delivery.event.eventType,
                attempt=attempt,
                hop=delivery.hop + 1,
                parks=0,
                not_before_ms=0,
                origin=delivery.origin,
                error=why.code,
                fault=why.fault,
                detail=why.detail,
                first_failed_ms=flight.delivery.first_failed_ms or flight.ended_ms,
                replay=delivery.replay,
            )
            buried.append((parked, opened.sealed[delivery.id]))
        return buried

    def _open_one(self, tenant: "CompiledTenant", record: Record, opened: Opened) -> None:
        staged = read_staged(record.headers)
        if staged is None or staged.tenant != tenant.ref or staged.destination.encode() != self.of.rpartition(b"/")[2]:
            opened.unsealable.append(record)
            return
        try:
            event = from_canonical(
                tenant.vault.open(PURPOSE_DELIVERY, staged.destination, staged.delivery, record.value)
            )
        except Unsealable as fault:
            if fault.code == "shredded":
                tenant.dropped("shredded")
            else:
                opened.unsealable.append(record)
            return
        except msgspec.DecodeError:
            opened.unsealable.append(record)
            return
        opened.sealed[staged.delivery] = record.value
        opened.deliveries.append(
            Delivery(
                tenant=staged.tenant,
                destination=staged.destination,
                id=staged.delivery,
                event=event,
                origin=staged.origin,
                appended_ms=staged.received_ms,
                size=len(record.value),
                correlation=correlation_id(event),
                trigger="replay" if staged.replay else "event",
                attempt=staged.attempt,
                hop=staged.hop,
                replay=staged.replay,
            )
        )

    async def _note(self, noted: bytes) -> None:
        await self._keeper.note(self, noted)
        self._noted = noted

    def _judged(self, outcomes: Mapping[DeliveryId, Outcome], unsure: Set[str]) -> Outcome:
        """A batch is tried again as a whole; what is refused of it counts once nothing is to be tried again."""
        again = [outcome for outcome in outcomes.values() if outcome.verdict == "retry"]
        if again:
            self.unsure = self.unsure or any(outcome.code in unsure for outcome in again)
            self.opened = None
            return max(again, key=lambda outcome: outcome.retry_after_s)
        self.refused = {ident: outcome for ident, outcome in outcomes.items() if outcome.verdict == "reject"}
        well = next((outcome for outcome in outcomes.values() if outcome.verdict == "delivered"), None)
        return well or next(iter(outcomes.values()))


def _ended(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.result()  # a bug ends the worker (`app.py`): nobody else would end the attempt
