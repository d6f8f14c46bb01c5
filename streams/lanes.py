"""Lanes: where a delivery waits, is started, and ends. One a destination, made when it is first needed.

Deliveries of stage kinds only pass through on their way into the stage; they come back as batches, and a batch waits,
is started and ends as a delivery does.

Owns the bounds of waiting (design, section 3, rules 1 and 5 to 8): the queue, the in-flight cap, the rate, the breaker,
the fair share of the worker's IN_FLIGHT and of its memory. What has no room is parked, never waited for. Plain
synchronous code, driven by `admit`, by the ends of attempts and by a tick of 100 ms: no task or timer a delivery.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from msgspec import Struct
from pydantic import ValidationError

from config.registry import Destination, open_secrets
from config.secret_fields import assemble
from connectors.contract import Batching, Connector, Direct, Feed, Spec
from connectors.egress import Egress
from connectors.registry import KINDS
from routing.breaker import Breaker
from routing.filters import compile_text
from routing.pace import Pace
from routing.share import SLOW_S, Seat, Share, SharedRate
from schemas.control import DestinationRecord
from schemas.ids import DestinationId
from schemas.outcome import Outcome
from schemas.staged import limits_header
from streams.flight import Flight
from streams.metrics import Meter, Metrics
from streams.runner import NOT_CONNECTED, connected, start_direct

if TYPE_CHECKING:
    from streams.compiled import CompiledTenant
    from streams.settle import Settle

log = structlog.get_logger()

TICK_S: Final = 0.1
QUEUE_AGE_S: Final = 5.0  # nothing waits longer in a lane (rule 5)
# A process that did not run for so long may have lost its session (10 s after its last heartbeat, one each 3 s)
STOPPED_S: Final = 5.0
QUEUE_BOUND: Final = 4096
# In lanes that keep up a second's worth of this worker's work may wait: beyond, the worker itself is the bottleneck and
# fetches less. By its own pace, so that one that gets little CPU does not park what it could not start in 5 s; and no
# more than the processor's cache holds: what lies longer between routing and sending is fetched from memory again.
MOST_QUEUED: Final = 1000
LEAST_QUEUED: Final = 300
PACE_WEIGHT: Final = 0.1  # of the last tick, in the moving average of ended attempts a second
ENOUGH_QUEUED_SHARE: Final = 0.25  # the same in bytes, as a part of the memory budget
RELIEF_SHARE: Final = 0.75  # of the budget: what stays here beyond it parks before the fetch has to wait
UNREAD_BATCHING: Final = Batching(max_events=1000, max_bytes=2**20, linger_s=60.0, max_in_flight=1, timeout_s=25.0)
CLOSING_STATUSES: Final = frozenset({429, 503})


class LaneSettings(Struct, frozen=True):
    in_flight: int
    memory_budget_bytes: int
    flying_budget_bytes: int


class Lane:
    """One destination of one tenant, in this worker."""

    __slots__ = (
        "backlog",
        "bound",
        "breaker",
        "closed_until",
        "connector",
        "destination",
        "disabled",
        "id",
        "in_flight",
        "limits",
        "meter",
        "owner",
        "pace",
        "queue",
        "queued_bytes",
        "rate",
        "ready",
        "record",
        "removed",
        "seat",
        "secrets_until_ms",
        "staged",
    )

    def __init__(self, owner: "CompiledTenant", destination: Destination, meter: Meter) -> None:
        self.owner = owner
        self.destination = destination
        self.record = destination.record
        self.id = DestinationId(destination.record.id)
        self.meter = meter
        self.queue: deque[Flight] = deque()
        self.queued_bytes = 0
        self.seat = Seat()  # what it has in flight
        self.ready = False  # in the ring, or waiting for its rate
        self.bound = QUEUE_BOUND
        self.backlog = 0  # parked by this worker for want of room, less those that came back
        self.pace = Pace()
        self.closed_until = 0.0
        self.breaker = Breaker()
        self.connector: Connector | None = None
        self.secrets_until_ms = 0
        self.staged = False  # its deliveries go into the stage, and come here as batches
        self.limits = b""  # of its batches, as its records in the stage carry them
        self.in_flight = 0
        self.removed = False
        self.rate: SharedRate | None = None
        self.configure(owner, destination)

    def configure(self, owner: "CompiledTenant", destination: Destination) -> Connector | None:
        """Takes on a new configuration; returns the connector that it replaces, for the caller to close."""
        old = self.connector if self.connector is not None and destination.record != self.record else None
        if old is not None:
            self.connector = None
        self.owner = owner
        self.destination = destination
        if (bytes(destination.record.options), destination.record.secrets) != (
            bytes(self.record.options),
            self.record.secrets,
        ):  # what another place, or other credentials, were answered says nothing of these
            self.breaker = Breaker()
            self.closed_until = 0.0
        self.record = destination.record
        self.disabled = destination.disabled
        self.in_flight = self.record.limits.in_flight
        spec = KINDS.get(self.record.type)
        self.staged = spec is not None and spec.feed is Feed.STAGE
        if self.staged:
            assert spec is not None
            batching = _batching(spec, self.record)
            self.limits = limits_header(int(batching.linger_s * 1000), batching.max_events, batching.max_bytes)
            self.in_flight = min(self.in_flight, batching.max_in_flight)
        rate = self.record.limits.rate_per_s
        if self.rate is None or self.rate.per_s != rate:
            self.rate = SharedRate(rate) if rate else None
        return old


def _options(spec: Spec[Any, Any], record: DestinationRecord) -> Any:
    """Raises ValidationError for those of another release."""
    return spec.options.model_validate(json.loads(bytes(record.options)))


def _batching(spec: Spec[Any, Any], record: DestinationRecord) -> Batching:
    """How large its batches get. Options that this release does not read are another's: it delivers them."""
    assert spec.batching is not None
    try:
        return spec.batching(_options(spec, record))
    except ValidationError:
        return UNREAD_BATCHING


class Lanes:
    """All lanes of a worker. `admit` takes deliveries; `settle` is told how each one ended."""

    def __init__(self, settings: LaneSettings, egress: Egress, metrics: Metrics) -> None:
        self._settings = settings
        self._egress = egress
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._share = Share(settings.in_flight, settings.flying_budget_bytes)
        self._flights: dict[str, Flight] = {}
        self._ring: deque[Lane] = deque()
        self._rated: list[Lane] = []  # ready, but their rate lets nothing through before the next tick
        self._leasing: dict[Lane, None] = {}  # that have used their rate, or tried to, since leases were last asked for
        self._denied: deque[Lane] = deque()  # ready, nothing in flight, and the share lets them start nothing now
        self._waiting: dict[Lane, None] = {}  # lanes with a queue
        self._lingering: dict[Lane, None] = {}  # that have started something, which may wait to be sent with more
        self._young: dict[int, Flight] = {}  # in the order of their start, until they end or are slow
        self._lanes: dict[Lane, None] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._kicked = False
        self._ticked = 0.0
        self._pace = 0.0
        self._ended_since = 0
        self._enough_queued = LEAST_QUEUED
        self._timer: asyncio.TimerHandle | None = None
        self._held_for: set[str] = set()
        self._draining = False
        self.queued = 0
        self._backed_up = 0  # of them, in lanes that do not keep up
        self._keeping_up_bytes = 0  # waiting in the others
        self.held_bytes = 0
        self.other_held_bytes: Callable[[], int] = lambda: 0
        self._relief_bytes = int(settings.memory_budget_bytes * RELIEF_SHARE)
        self.room = asyncio.Event()
        self.room.set()
        self._settle: Settle

    def start(self, settle: "Settle") -> None:
        self._settle = settle
        self._ticked = time.monotonic()
        self._timer = self._loop.call_later(TICK_S, self._tick)

    # ---------------------------------------------------------------- configuration

    def lane(self, owner: "CompiledTenant", destination: Destination) -> Lane:
        meter = self._metrics.meter(owner.ref, owner.tag, destination.record.type)
        lane = Lane(owner, destination, meter)
        self._lanes[lane] = None
        return lane

    def reconfigure(self, lane: Lane, owner: "CompiledTenant", destination: Destination | None) -> None:
        """The tenant's configuration changed. None: the destination is gone; what waits becomes dead letters."""
        if destination is None:
            lane.owner = owner
            lane.removed = True
            self._close(lane.connector)
            lane.connector = None
            self._lanes.pop(lane, None)
            self._lingering.pop(lane, None)
        else:
            self._close(lane.configure(owner, destination))
        if lane.removed or lane.disabled or lane.record.held:
            for flight in self._take_all(lane):
                self._turn_away(flight)

    def _close(self, connector: Connector | None) -> None:
        if connector is not None:
            task = self._loop.create_task(connector.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # ---------------------------------------------------------------- admission

    def admit(self, flight: Flight, now: float) -> None:
        """Takes a delivery on: into its lane's queue, to the retry topic, or to the copy that is in flight already.

        `now` is the monotonic clock.
        """
        flying = self._flights.get(flight.key)
        if flying is not None and (not flying.end or flight.delivery.hop <= flying.delivery.hop):
            self._join(flying, flight)
            return
        self.hold(flight)
        lane = flight.lane
        if lane.staged and flight.batch is None and not lane.removed and not lane.disabled:
            self._settle.stage(flight)
            return
        if lane.removed or lane.disabled or lane.record.held or self._draining:
            self._turn_away(flight)
            return
        if lane.closed_until > now:
            self._settle.park(flight, "retry_after", _wall_ms(lane.closed_until - now))
            return
        if not lane.breaker.allows(now):
            self._settle.park(flight, "breaker", _wall_ms(lane.breaker.open_until - now))
            return
        queue = lane.queue
        if not queue:
            self._waiting[lane] = None
            if lane.pace.behind and lane.pace.rested(now):
                lane.pace.behind = False  # it has caught up since the last tick
                lane.bound = QUEUE_BOUND
        elif len(queue) >= lane.bound:
            self._park_for_room(flight, now)
            return
        flight.queued_at = now
        queue.append(flight)
        lane.queued_bytes += flight.weight
        self.queued += 1
        if lane.pace.behind:
            self._backed_up += 1
        else:
            self._keeping_up_bytes += flight.weight
        if not lane.ready:
            lane.ready = True
            self._ring.append(lane)
        if self.held_bytes > self._relief_bytes:
            self._relieve()

    def _join(self, flying: Flight, copy: Flight) -> None:
        """The end of what flies here is the end of its copy too. After a crash a delivery may be written on twice, and
        one copy of it have come further than the other: what follows counts on from there, or it would be stale."""
        if flying.joined is None:
            flying.joined = []
        flying.joined.append((copy.source, copy.offset))
        if copy.batch is not None and flying.batch is not None:
            copy.batch.flying = flying
            flying.batch.turn = max(flying.batch.turn, copy.batch.turn)  # or its manifest would be one that is over
        known, newer = flying.delivery, copy.delivery
        if newer.hop > known.hop:
            known.hop, known.attempt, known.parks = newer.hop, newer.attempt, newer.parks
            known.first_failed_ms = newer.first_failed_ms

    def hold(self, flight: Flight) -> None:
        """Counts a delivery among what this worker has, until `release`."""
        flying = self._flights.get(flight.key)
        if flying is None or flying.delivery.hop < flight.delivery.hop:  # a stale one must not hide it from its copies
            self._flights[flight.key] = flight
        shared = flight.shared
        if shared is not None:
            shared.holders += 1
            if shared.holders > 1:
                return
        self.held_bytes += flight.delivery.size

    def release(self, settled: Sequence[Flight]) -> None:
        """Nothing of these is held any more."""
        flights = self._flights
        for flight in settled:
            if flights.get(flight.key) is flight:
                del flights[flight.key]
            shared = flight.shared
            if shared is not None:
                shared.holders -= 1
                if shared.holders:
                    continue
            self.held_bytes -= flight.delivery.size

    def _turn_away(self, flight: Flight) -> None:
        """No attempt: the destination takes nothing now, or never will."""
        lane = flight.lane
        if lane.removed:
            self._settle.dead(flight, "destination_removed", "", "the destination was removed from the configuration")
        elif lane.disabled:
            detail = "the destination answered 410 and is disabled until its options change or it is enabled"
            self._settle.dead(flight, "destination_disabled", "destination", detail)
        elif lane.record.held:
            self._settle.park(flight, "suspended")
        else:
            self._settle.park(flight, "draining")

    def _park_for_room(self, flight: Flight, now: float) -> None:
        """Its own reason ends when what is parked has gone through at the destination's recent pace."""
        lane = flight.lane
        lane.pace.full_at = now
        lane.backlog += 1
        until_ms = _wall_ms(lane.pace.through_s(lane.backlog))
        self._settle.park(flight, "lane_full" if lane.rate is None else "rate", until_ms)

    def came_back(self, lane: Lane) -> None:
        """A parked delivery of the lane is due again."""
        if lane.backlog:
            lane.backlog -= 1

    def _take_all(self, lane: Lane) -> list[Flight]:
        flights = list(lane.queue)
        lane.queue.clear()
        self.queued -= len(flights)
        if lane.pace.behind:
            self._backed_up -= len(flights)
        else:
            self._keeping_up_bytes -= lane.queued_bytes
        lane.queued_bytes = 0
        lane.pace.behind = False
        lane.bound = QUEUE_BOUND
        self._waiting.pop(lane, None)
        return flights

    def _take_head(self, lane: Lane) -> Flight:
        flight = lane.queue.popleft()
        self.queued -= 1
        if lane.pace.behind:
            self._backed_up -= 1
        else:
            self._keeping_up_bytes -= flight.weight
        lane.queued_bytes -= flight.weight
        if not lane.queue:
            self._waiting.pop(lane, None)
        return flight

    def _relieve(self) -> None:
        """Where too much stays in lanes: the one that holds most parks what it has not started (rule 7).

        What is on its way out already does not count: parking more would only put more into memory.
        """
        while self._waiting and self.held_bytes - self._settle.leaving_bytes > self._relief_bytes:
            fullest = max(self._waiting, key=lambda lane: lane.queued_bytes)
            for flight in self._take_all(fullest):
                self._settle.park(flight, "memory")

    def leasing(self) -> list[Lane]:
        """The lanes with a rate that have used it, or tried to, since the last call."""
        lanes = [lane for lane in self._leasing if lane.rate is not None and not lane.removed]
        self._leasing.clear()
        return lanes

    def leased(self) -> None:
        """Rates may let more through than before."""
        self._ring.extend(self._rated)
        self._rated.clear()
        self.pump()

    # ---------------------------------------------------------------- starting attempts

    def pump(self) -> None:
        """Starts what may start: round robin over the lanes that wait."""
        if self._held_for:
            return
        ring, share = self._ring, self._share
        now = time.monotonic()
        if now - self._ticked > STOPPED_S:
            self._stopped(now)
        at_ms = int(time.time() * 1000)
        while ring and share.has_room():
            lane = ring.popleft()
            queue, seat = lane.queue, lane.seat
            in_flight = lane.in_flight
            if not queue or seat.in_flight >= in_flight:
                lane.ready = False
                if queue:
                    self._hurry(lane)
                continue
            if not share.may_start(seat, queue[0].delivery.size):
                if seat.in_flight:
                    lane.ready = False  # the end of one of its own brings it back
                    self._hurry(lane)
                else:
                    self._denied.append(lane)
                continue
            if lane.rate is not None:
                self._leasing[lane] = None
                if not lane.rate.take(now):
                    self._rated.append(lane)
                    continue
            if not lane.breaker.take(now):
                lane.ready = False
                until_ms = _wall_ms(lane.breaker.open_until - now)
                for flight in self._take_all(lane):
                    self._settle.park(flight, "breaker", until_ms)
                continue
            self._start(lane, self._take_head(lane), now, at_ms)
            if queue and seat.in_flight < in_flight:
                ring.append(lane)
            else:
                lane.ready = False
                if queue:
                    self._hurry(lane)
        if ring:  # no room before something ends
            for lane in list(self._lingering):
                self._hurry(lane)

    def _hurry(self, lane: Lane) -> None:
        """It can start nothing more for now, so nothing comes that what lingers could be sent with."""
        if lane in self._lingering:
            del self._lingering[lane]
            if lane.connector is not None:
                cast(Direct, lane.connector).hurry()

    def _start(self, lane: Lane, flight: Flight, now: float, at_ms: int) -> None:
        size = flight.delivery.size
        self._share.started(lane.seat, size)
        self.held_bytes += size  # the request is a copy
        flight.started_at = now
        flight.version = lane.record.version
        self._young[id(flight)] = flight
        if lane.connector is None or (lane.secrets_until_ms and at_ms >= lane.secrets_until_ms):
            self._close(lane.connector)
            lane.connector = connected(flight.delivery, partial(self._connect, lane, at_ms))
        done = partial(self._ended, flight)
        if lane.connector is None:
            self._loop.call_soon(done, NOT_CONNECTED)
        elif flight.batch is not None:
            flight.batch.start(lane.connector, flight, at_ms, done)
        else:
            start_direct(cast(Direct, lane.connector), flight.delivery, at_ms, done)
            if lane.connector.batching.linger_s:
                self._lingering[lane] = None

    def _connect(self, lane: Lane, at_ms: int) -> Connector:
        spec = KINDS[lane.record.type]
        opened = open_secrets(lane.owner.tenant, lane.destination, at_ms)
        ends = [s.until_ms for live in lane.record.secrets.values() for s in live if s.until_ms > at_ms]
        lane.secrets_until_ms = min(ends, default=0)
        options = _options(spec, lane.record)
        secrets = spec.secrets.model_validate(assemble(opened))
        also = frozenset(lane.record.retry.also)
        expressions = {name: compile_text(text).text for name, text in spec.expressions(options).items()}
        return spec.connect(lane.owner.ref, lane.id, options, secrets, self._egress, also, expressions)

    def _ended(self, flight: Flight, outcome: Outcome) -> None:
        """The one end of an attempt, called by the connector from the event loop."""
        now = time.monotonic()
        lane = flight.lane
        if not flight.slow:
            del self._young[id(flight)]
        self._share.finished(lane.seat, flight.slow, flight.delivery.size)
        self.held_bytes -= flight.delivery.size
        lane.pace.completed(now)
        self._ended_since += 1
        flight.outcome = outcome
        flight.duration_s = now - flight.started_at
        flight.ended_ms = int(time.time() * 1000)
        if outcome.fault == "destination" and flight.version == lane.record.version:
            lane.breaker.record(now, False)
            if outcome.retry_after_s and outcome.status in CLOSING_STATUSES:
                self._close_until(lane, now + outcome.retry_after_s)
            if outcome.code == "gone" and not lane.disabled:
                lane.disabled = True
                for waiting in self._take_all(lane):
                    self._turn_away(waiting)
        elif outcome.fault:
            lane.breaker.unmoved()
        else:
            lane.breaker.record(now, True)
        self._settle.ended(flight)
        if lane.queue and not lane.ready:
            lane.ready = True
            self._ring.append(lane)
        if self._denied:
            self._ring.append(self._denied.popleft())
        if not self._kicked:
            self._kicked = True
            self._loop.call_soon(self._kick)

    def _close_until(self, lane: Lane, until: float) -> None:
        """429 or 503 with Retry-After: nothing more goes there before its end."""
        lane.closed_until = max(lane.closed_until, until)
        own_ms = _wall_ms(lane.closed_until - time.monotonic())
        for flight in self._take_all(lane):
            self._settle.park(flight, "retry_after", own_ms)

    def _kick(self) -> None:
        self._kicked = False
        self.pump()
        if self.has_room():
            self.room.set()

    # ---------------------------------------------------------------- the tick

    def _stopped(self, now: float) -> None:
        """This process did not run for a while, and others may have got its partitions and sent what waits here.

        So it parks: when it is due the ledger is asked whether it is still to be sent.
        """
        self._ticked = now
        log.warning("worker_stood_still", queued=self.queued)
        for lane in list(self._waiting):
            for flight in self._take_all(lane):
                self._settle.park(flight, "stalled")

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked > STOPPED_S:
            self._stopped(now)
        pace = self._ended_since / max(now - self._ticked, TICK_S / 2)
        self._ended_since = 0
        self._pace += PACE_WEIGHT * (pace - self._pace)
        self._enough_queued = min(MOST_QUEUED, max(LEAST_QUEUED, int(self._pace)))
        last_tick = self._ticked
        stalled = now - last_tick > 2 * TICK_S  # this process did not run: what waited meanwhile tells nothing
        self._ticked = now
        aged: list[Flight] = []
        for flight in self._young.values():
            if flight.started_at > now - SLOW_S:
                break
            aged.append(flight)
        for flight in aged:
            del self._young[id(flight)]
            flight.slow = True
            self._share.aged(flight.lane.seat, flight.delivery.size)
        if not stalled:
            pressed = not self.has_room()
            for lane in list(self._waiting):
                self._age(lane, now, last_tick, pressed)
        self._relieve()
        for waiting in (self._rated, self._denied):
            self._ring.extend(waiting)
            waiting.clear()
        self.pump()
        if self.has_room():
            self.room.set()
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _age(self, lane: Lane, now: float, last_tick: float, pressed: bool) -> None:
        """Parks what has waited 5 s, and notes whether the lane keeps up."""
        queue = lane.queue
        if self._held_for:
            return
        while queue and queue[0].queued_at < now - QUEUE_AGE_S:
            self._park_for_room(self._take_head(lane), now)
        seat, pace = lane.seat, lane.pace
        was_behind = pace.behind
        at_its_limits = seat.slow > 0 or seat.in_flight >= lane.in_flight or lane.rate is not None
        waited_s = now - queue[0].queued_at if queue else 0.0
        pace.look(now, last_tick, len(queue), waited_s, at_its_limits=at_its_limits, pressed=pressed)
        lane.bound = pace.bound(QUEUE_BOUND)
        if pace.behind != was_behind:
            self._backed_up += len(queue) if pace.behind else -len(queue)
            self._keeping_up_bytes += -lane.queued_bytes if pace.behind else lane.queued_bytes

    def has_room(self) -> bool:
        """Whether the worker should take in more: not while it is itself, rather than a destination, that is behind."""
        budget = self._settings.memory_budget_bytes
        return (
            self.queued - self._backed_up < self._enough_queued
            and self._keeping_up_bytes < budget * ENOUGH_QUEUED_SHARE
            and (self.held_bytes + self.other_held_bytes() < budget or not self.held_bytes)
            and not self._held_for
        )

    def note_room(self) -> None:
        """Called after admissions: whoever feeds the lanes waits on `room`."""
        if not self.has_room():
            self.room.clear()

    # ---------------------------------------------------------------- holding and draining

    def stop_starting(self, reason: str) -> None:
        """No attempt starts until `go_on(reason)` (rule 7: the broker is away, nothing could be settled)."""
        self._held_for.add(reason)

    def go_on(self, reason: str) -> None:
        self._held_for.discard(reason)

    def drain(self) -> None:
        """From now on nothing is started: what waits is parked; what is in flight ends by itself."""
        self._draining = True
        for lane in list(self._waiting):
            for flight in self._take_all(lane):
                self._settle.park(flight, "draining")

    @property
    def in_flight(self) -> int:
        return self._share.in_flight

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for lane in self._lanes:
            self._close(lane.connector)
            lane.connector = None
        if self._closing:
            await asyncio.wait(self._closing, timeout=1.0)

    def gauges(self) -> Iterable[tuple[str, str, str, int, int, bool]]:
        """For `/metrics`: vendor, tenant label, type, waiting, in flight, whether the breaker is open."""
        now = time.monotonic()
        for lane in self._lanes:
            owner = lane.owner
            label = self._metrics.label(owner.ref, owner.tag)
            is_open = lane.breaker.open_until > now
            yield owner.ref.vendor, label, lane.record.type, len(lane.queue), lane.seat.in_flight, is_open


def _wall_ms(in_s: float) -> int:
    return int((time.time() + max(0.0, in_s)) * 1000)
