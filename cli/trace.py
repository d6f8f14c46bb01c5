"""`headgate trace`: what became of one event of one tenant.

Read are the tenant's partition of the attempts topic and its tag's retry and dead-letter topics, to the ends that they
had at the start: once each, but for attempts of batches, which name deliveries alone and are looked for when those are
known. Kept is only what belongs to the event, so that memory does not grow with the log. They are read in the order
retry, dead letters, attempts: what moves on meanwhile is then seen where it went. A topic of a pool holds records of
other tenants too: those are passed over by their headers, and only this tenant's key opens anything.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import datetime
from time import monotonic, time
from typing import Final

import click
import msgspec
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from msgspec import Struct

from cli.output import (
    Moment,
    counted,
    load_settings,
    output_option,
    printable,
    say,
    show_json,
    show_table,
    tenant_option,
    told,
    vendor_option,
)
from config.hold import state_of
from config.kafka import CONNECT_TIMEOUT_S, client_config, connected_admin, read_to_end
from config.plan import CurrentTenant
from config.settings import Settings, SettingsError
from config.vault import MasterKeys, Unsealable, Vault
from config.writer import read_current
from schemas.attempt import (
    PURPOSE_ATTEMPT,
    PURPOSE_EVENT,
    AttemptRecord,
    EventRecord,
    RouteVerdict,
    attempt_aad_item,
    decode_answer,
    decode_record,
    listed,
)
from schemas.event import rfc3339
from schemas.ids import DeliveryId, ExternalId, Tag, TenantRef, Vendor, attempt_digest, base32
from schemas.topics import FEW, partition_of
from schemas.wire import Parked, read_parked, unread_of

MAX_EVENTS: Final = 100
MAX_ATTEMPTS: Final = 2000
MAX_CHAINS: Final = 2000
MAX_SKEW_MS: Final = 60_000  # between the clocks of workers
PROGRESS_EVERY_S: Final = 2.0

_DEFAULT_ID: Final = re.compile(r"(.+)-([0-9a-f]{8})-(\d{1,9})-(\d{1,18})")
_LISTS: Final = b'"deliveries":['  # as no other record has it: an event's has an object there
_WHY_NOT: Final = {"type": "the route names other types", "where": "its filter is false"}


class Attempt(Struct, frozen=True, omit_defaults=True):
    """`detail` and `answer` (the start of what the far side said) were sealed: empty where they do not open. `batch`:
    what was tried with others, as one."""

    attempt: int
    at: str
    code: str
    verdict: str
    durationMs: float
    trigger: str
    worker: str
    status: int = 0
    fault: str = ""
    nextAt: str = ""
    receipt: str = ""
    detail: str = ""
    answer: str = ""
    batch: str = ""


class Now(Struct, frozen=True, omit_defaults=True):
    """Where a delivery is.

    `state`: `delivered`; `waiting` in the retry topic until `dueAt`, for `why`; `dead`, as `letter`; `dropped`, such a
    letter given up; `in_flight`, handed to a worker, with nothing logged since; `unknown`, its records are gone.
    """

    state: str
    at: str = ""
    why: str = ""
    dueAt: str = ""
    letter: str = ""
    parks: int = 0
    replay: str = ""


class DeliveryTrace(Struct, frozen=True):
    """`destinationState`: on, held, disabled (it answered 410) or removed."""

    delivery: str
    destination: str
    destinationState: str
    attempts: Sequence[Attempt]
    now: Now


class EventTrace(Struct, frozen=True, omit_defaults=True):
    """An event and its deliveries. Without `id`: its own record is older than the log, its deliveries are not."""

    eventId: str
    eventType: str
    deliveries: Sequence[DeliveryTrace]
    id: str = ""
    at: str = ""
    origin: str = ""
    worker: str = ""
    correlationId: str = ""
    configVersion: int = 0
    routes: Sequence[RouteVerdict] = ()
    content: msgspec.Raw | None = None


class UnroutedRecord(Struct, frozen=True):
    """A record of this tenant that could not be routed and seems to be the one that is looked for."""

    letter: str
    at: str
    error: str
    detail: str
    origin: str


class Trace(Struct, frozen=True):
    """`logSince`: the oldest record of the tenant's partition of the attempts topic that was read."""

    vendor: str
    tenant: str
    id: str
    logSince: str
    events: Sequence[EventTrace]
    unrouted: Sequence[UnroutedRecord]
    omitted: int


class _Chain:
    """One delivery's copies in one replay job, or outside of any: the newest of each topic."""

    __slots__ = ("letter", "letter_at", "letter_at_ms", "mark", "retry", "retry_at_ms", "retry_taken")

    def __init__(self) -> None:
        self.retry: Parked | None = None
        self.retry_at_ms = 0
        self.retry_taken = False
        self.letter: Parked | None = None
        self.letter_at = ""
        self.letter_at_ms = 0
        self.mark = ""

    @property
    def newest_ms(self) -> int:
        return max(self.retry_at_ms, self.letter_at_ms)


class _Found:
    """What the topics hold of the event."""

    def __init__(self, owner: TenantRef, wanted: str) -> None:
        self._owner = owner
        self._wanted = wanted
        self._needle = msgspec.json.encode(wanted)[1:-1]
        self.chains: dict[tuple[str, str], _Chain] = {}
        self._letters: dict[str, _Chain] = {}
        self.events: dict[str, EventRecord] = {}
        self.attempts: deque[AttemptRecord] = deque(maxlen=MAX_ATTEMPTS)
        self.omitted = 0
        self.unread = 0
        self.log_since_ms = 0
        self.routed_ms = 0
        self.batches = False

    def retry(self, message: Message, committed: Mapping[int, int]) -> None:
        parked = self._parked(message)
        chain = None if parked is None else self._chain(parked.delivery, parked.replay)
        if parked is None or chain is None or (chain.retry is not None and chain.retry.hop > parked.hop):
            return
        chain.retry = parked
        chain.retry_at_ms = message.timestamp()[1]
        chain.retry_taken = (message.offset() or 0) < committed.get(message.partition() or 0, 0)

    def letter(self, message: Message) -> None:
        headers = {name: value or b"" for name, value in message.headers() or []}
        if "hg-mark" in headers:
            marked = self._letters.get(headers.get("hg-letter", b"").decode("utf-8", "replace"))
            if marked is not None and marked.letter is not None:
                marked.mark = headers["hg-mark"].decode("utf-8", "replace")
                job = headers.get("hg-replay", b"").decode("utf-8", "replace")
                if marked.mark == "replayed" and job:
                    again = self._chain(marked.letter.delivery, job)
                    if again is not None:
                        again.retry_at_ms = max(again.retry_at_ms, message.timestamp()[1])
            return
        parked = self._parked(message)
        chain = None if parked is None else self._chain(parked.delivery, parked.replay)
        if parked is None or chain is None:
            return
        chain.letter = parked
        chain.letter_at = f"{message.partition()}/{message.offset()}"
        chain.letter_at_ms = message.timestamp()[1]
        chain.mark = ""
        self._letters[chain.letter_at] = chain

    def logged(self, message: Message, *, content: bool) -> None:
        """A record of the attempts topic."""
        at_ms = message.timestamp()[1]
        if not self.log_since_ms or at_ms < self.log_since_ms:
            self.log_since_ms = at_ms
        value = message.value() or b""
        self.batches = self.batches or _LISTS in value
        if self._needle not in value:  # decoding all would cost ten times this
            return
        record = self._own(value)
        match record:
            case EventRecord():
                if not (self._wanted in (record.eventId, record.id) or self._wanted in record.deliveries.values()):
                    return
                if record.id not in self.events and len(self.events) >= MAX_EVENTS:
                    self.events.pop(next(iter(self.events)))
                    self.omitted += 1
                if not content:
                    record.sealed = None
                self.events[record.id] = record
                self.routed_ms = min(self.routed_ms or at_ms, at_ms)
            case AttemptRecord() if not record.deliveries and self._wanted in (record.eventId, record.delivery):
                self._keep(record)

    @property
    def deliveries(self) -> set[str]:
        """All that are known to be the event's; the one that is wanted, where it is one."""
        named = {delivery for event in self.events.values() for delivery in event.deliveries.values()}
        if self._wanted in named:
            return {self._wanted}
        named |= {delivery for delivery, _ in self.chains} | {record.delivery for record in self.attempts}
        return named | {self._wanted}

    def batch(self, message: Message, deliveries: Set[str]) -> None:
        """A record of the attempts topic, now that the event's deliveries are known: these are kept."""
        value = message.value() or b""
        record = self._own(value) if _LISTS in value else None
        if not isinstance(record, AttemptRecord):
            return
        record.deliveries = [one for one in record.deliveries if one.partition("/")[0] in deliveries]
        if record.deliveries:
            self._keep(record)

    def _own(self, value: bytes) -> EventRecord | AttemptRecord | None:
        """None for what is not this tenant's."""
        try:
            record = decode_record(value)
        except (msgspec.DecodeError, RecursionError):
            return None
        return record if (record.vendor, record.tenant) == (self._owner.vendor, self._owner.tenant) else None

    def _keep(self, record: AttemptRecord) -> None:
        self.omitted += len(self.attempts) == MAX_ATTEMPTS
        self.attempts.append(record)

    def _parked(self, message: Message) -> Parked | None:
        parked = read_parked(message.headers() or [])
        self.unread += parked is None and unread_of(message.headers() or []) == self._owner
        if parked is None or parked.tenant != self._owner or self._wanted not in (parked.event, parked.delivery):
            return None
        return parked

    def _chain(self, delivery: str, replay: str) -> _Chain | None:
        chain = self.chains.get((delivery, replay))
        if chain is None:
            if len(self.chains) >= MAX_CHAINS:
                self.omitted += 1
                return None
            chain = self.chains[delivery, replay] = _Chain()
        return chain


@click.command()
@click.argument("event_id", metavar="EVENT_ID")
@tenant_option("Whose event.", required=True)
@vendor_option
@click.option("--since", type=Moment(), metavar="TIME", help="Read no further back: 2h (ago), or 2026-11-21T09:30:00Z.")
@click.option("--content", is_flag=True, help="Also the event itself and what the far side answered.")
@output_option
@told
def command(event_id: str, tenant: ExternalId, vendor: Vendor, since: int | None, content: bool, output: str) -> None:
    """Show what became of an event: the routes, every attempt, and where each delivery is now.

    \b
      headgate trace --tenant acme evt_1
      headgate trace --tenant acme headgate.default.ingress-5d2f08aa-3-1207
      headgate trace --tenant acme dlv_5kq2…                 one delivery, by its webhook-id

    EVENT_ID is the event's eventId, what stands for one that was published without (topic, topic id, partition and
    offset), or a delivery's id. The log reaches back HEADGATE_ATTEMPTS_RETENTION (7 days); --since reads less of it.
    Exits 1 if nothing is found, and says what to check.
    """
    settings = load_settings(vendor)
    owner = TenantRef(vendor, tenant)
    current = read_current(settings.kafka.confluent(), settings.topics, vendor).tenants.get(tenant)
    if current is None:
        raise click.ClickException(f"vendor {vendor} has no tenant {tenant!r}")
    found = _Found(owner, event_id)
    _read(settings, owner, current, found, since, content=content)
    events = list(_events(owner, current, found, _Opener(settings, owner, current), event_id, content=content))
    unrouted = [] if events else list(_unrouted(settings, owner, event_id, since))
    since_text = rfc3339(found.log_since_ms) if found.log_since_ms else ""
    trace = Trace(vendor, tenant, event_id, since_text, events, unrouted, found.omitted)
    if output == "json":
        show_json(trace)
    else:
        _show(trace)
    if found.omitted:
        say(f"left out: {counted(found.omitted, 'older record')} of it; --since, or a delivery's id, narrows it down")
    if found.unread:
        say(
            f"left out: {counted(found.unread, 'record')} of the tenant, of whichever event, in a form that this "
            "version of headgate does not read; use the one that wrote them"
        )
    if not events and not unrouted:
        raise click.ClickException(_nothing(settings, owner, current, trace))


# ---------------------------------------------------------------- reading


def _read(
    settings: Settings, owner: TenantRef, current: CurrentTenant, found: _Found, since: int | None, *, content: bool
) -> None:
    topics, tag = settings.topics, Tag(current.record.tag)
    retry = topics.retry(owner.vendor, tag)
    committed = _committed(
        settings, topics.group("retry"), retry
    )  # before the topic: nothing is called taken too early
    for message in _records(settings, retry, None):
        found.retry(message, committed)
    for message in _records(settings, topics.dead_letters(owner.vendor, tag), None):
        found.letter(message)
    key = owner.tenant.encode()
    for message in _records(settings, topics.attempts(owner.vendor), since, key):
        found.logged(message, content=content)
    if found.batches:
        since, deliveries = max(since or 0, found.routed_ms - MAX_SKEW_MS), found.deliveries
        for message in _records(settings, topics.attempts(owner.vendor), since, key):
            if message.key() == key:
                found.batch(message, deliveries)


def _records(settings: Settings, topic: str, since_ms: int | None, key: bytes | None = None) -> Iterator[Message]:
    """A topic to its end of now; of `key` only the partition where it is, unless somebody has changed their number."""

    def chosen(consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        if key is not None and len(partitions) == FEW:
            partitions = [part for part in partitions if part.partition == partition_of(key, FEW)]
        if since_ms is None:
            return partitions
        asked = [TopicPartition(part.topic, part.partition, max(0, since_ms)) for part in partitions]
        return list(consumer.offsets_for_times(asked, timeout=CONNECT_TIMEOUT_S))

    progress = _Progress(topic)
    kafka = settings.kafka.confluent()
    for message in read_to_end(kafka, [topic], settings.topics.group("cli"), chosen, total=progress.begin):
        progress.one()
        yield message


class _Progress:
    """Says every other second how far reading has come."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._total = self._done = 0
        self._told = monotonic()

    def begin(self, total: int) -> None:
        self._total = total

    def one(self) -> None:
        self._done += 1
        if self._done % 1000 == 0 and monotonic() - self._told >= PROGRESS_EVERY_S:
            self._told = monotonic()
            say(f"{self._topic}: {self._done} of {self._total} records read")


def _committed(settings: Settings, group: str, topic: str) -> dict[int, int]:
    """What the workers have done with, by partition; nothing where this user may not ask."""
    kafka = settings.kafka.confluent()
    _, partitions = connected_admin(kafka)
    asked = [TopicPartition(topic, number) for number in range(partitions.get(topic, 0))]
    if not asked:
        return {}
    consumer = Consumer(client_config({**kafka, "group.id": group, "enable.auto.commit": False}))
    try:
        found = consumer.committed(asked, timeout=CONNECT_TIMEOUT_S)
    except KafkaException:
        return {}
    finally:
        consumer.close()
    return {part.partition: part.offset for part in found if part.error is None and part.offset >= 0}


class _Unrouted(Struct):
    eventId: str = ""


def _unrouted(settings: Settings, owner: TenantRef, event_id: str, since: int | None) -> Iterator[UnroutedRecord]:
    """Records with the tenant's key that were routed nowhere: at the place that a default id names, or with this id."""
    ingress = settings.topics.ingress(owner.vendor)
    named = _DEFAULT_ID.fullmatch(event_id)
    origin = f"{ingress}/{named[3]}/{named[4]}" if named and named[1] == ingress else None
    key = owner.tenant.encode()
    decode = msgspec.json.Decoder(_Unrouted).decode
    for message in _records(settings, settings.topics.unrouted(owner.vendor), since):
        if message.key() != key:
            continue
        headers = {name: (value or b"").decode("utf-8", "replace") for name, value in message.headers() or []}
        if headers.get("hg-origin") != origin or origin is None:
            try:
                if decode(message.value() or b"").eventId != event_id:
                    continue
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
        yield UnroutedRecord(
            f"{message.partition()}/{message.offset()}",
            rfc3339(message.timestamp()[1]),
            headers.get("hg-error", ""),
            headers.get("hg-detail", ""),
            headers.get("hg-origin", ""),
        )


# ---------------------------------------------------------------- what it means


class _Opener:
    """Opens what the tenant's key has sealed; says once why something does not open."""

    def __init__(self, settings: Settings, owner: TenantRef, current: CurrentTenant) -> None:
        self._said = False
        self._vault: Vault | None = None
        try:
            master = MasterKeys.load(settings.keys)
        except SettingsError as fault:
            self._say(str(fault))
            return
        keys = {}
        for version, key in current.keys.items():
            try:
                keys[version] = master.unwrap(owner, key)
            except Unsealable:
                self._say("the tenant's key does not open with the master keys that are given")
        self._vault = Vault(owner, keys, current.record.keyVersion, current.shredded_through)

    def open(self, purpose: str, destination: str, item: str, sealed: bytes | None) -> bytes | None:
        if sealed is None or self._vault is None:
            return None
        try:
            return self._vault.open(purpose, destination, item, sealed)
        except Unsealable as fault:
            self._say("its key was shredded" if fault.code == "shredded" else "they were sealed with another key")
            return None

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            say(f"sealed details are left out: {why}")


def _events(
    owner: TenantRef, current: CurrentTenant, found: _Found, opener: _Opener, wanted: str, *, content: bool
) -> Iterator[EventTrace]:
    attempts: dict[str, list[AttemptRecord]] = {}
    for record in sorted(found.attempts, key=lambda record: record.at):
        for delivery in dict.fromkeys([one.partition("/")[0] for one in record.deliveries or (record.delivery,)]):
            attempts.setdefault(delivery, []).append(record)
    left = dict.fromkeys([*attempts, *(delivery for delivery, _ in found.chains)])
    for event in sorted(found.events.values(), key=lambda event: event.at):
        deliveries = {
            delivery: destination
            for destination, delivery in event.deliveries.items()
            if wanted not in event.deliveries.values() or delivery == wanted
        }
        for delivery in deliveries:
            left.pop(delivery, None)
        raw = opener.open(PURPOSE_EVENT, "", event.id, event.sealed) if content else None
        yield EventTrace(
            eventId=event.eventId,
            eventType=event.eventType,
            deliveries=[
                _delivery(owner, current, found, opener, delivery, destination, attempts.get(delivery, []))
                for delivery, destination in deliveries.items()
            ],
            id=event.id,
            at=event.at,
            origin=event.origin,
            worker=event.worker,
            correlationId=event.correlationId,
            configVersion=event.configVersion,
            routes=event.routes,
            content=None if raw is None else msgspec.Raw(raw),
        )
    # what outlives its event's own record: letters are kept longer than attempts
    for delivery in left:
        of_it = attempts.get(delivery, [])
        parked = [each for (name, _), chain in found.chains.items() if name == delivery for each in _copies(chain)]
        destination = of_it[0].destination if of_it else parked[0].destination if parked else ""
        alone = [record for record in of_it if not record.deliveries]  # a batch names no event
        yield EventTrace(
            eventId=alone[0].eventId if alone else parked[0].event if parked else "",
            eventType=alone[0].eventType if alone else parked[0].event_type if parked else "",
            deliveries=[_delivery(owner, current, found, opener, delivery, destination, of_it)],
            origin=alone[0].origin if alone else parked[0].origin if parked else "",
        )


def _copies(chain: _Chain) -> Iterator[Parked]:
    if chain.retry is not None:
        yield chain.retry
    if chain.letter is not None:
        yield chain.letter


def _delivery(
    owner: TenantRef,
    current: CurrentTenant,
    found: _Found,
    opener: _Opener,
    delivery: str,
    destination: str,
    records: Sequence[AttemptRecord],
) -> DeliveryTrace:
    known = current.destinations.get(destination)
    chains = {replay: chain for (name, replay), chain in found.chains.items() if name == delivery}
    return DeliveryTrace(
        delivery,
        destination,
        "removed" if known is None else state_of(current, known),
        [_attempt(opener, record) for record in _once(records)],
        _now(delivery, chains, records),
    )


def _once(records: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """Each attempt once. `recovered` is written again for a success whose own record may be missing."""
    delivered = {record.id for record in records if record.verdict == "delivered" and record.code != "recovered"}
    once: dict[tuple[str, str], AttemptRecord] = {}
    for record in records:
        if record.code == "recovered":
            if record.id in delivered:
                continue
            delivered.add(record.id)
        once[record.id, record.at] = record
    return sorted(once.values(), key=lambda record: record.at)


def _attempt(opener: _Opener, record: AttemptRecord) -> Attempt:
    item = attempt_aad_item(record.delivery, record.attempt)
    opened = opener.open(PURPOSE_ATTEMPT, record.destination, item, record.sealed)
    answer = None if opened is None else decode_answer(opened)
    return Attempt(
        record.attempt,
        record.at,
        record.code,
        record.verdict,
        record.durationMs,
        record.trigger,
        record.worker,
        record.status,
        record.fault,
        record.nextAt,
        record.receipt,
        "" if answer is None else answer.detail,
        "" if answer is None else answer.excerpt.decode("utf-8", "replace"),
        record.delivery if record.deliveries else "",
    )


def _now(delivery: str, chains: Mapping[str, _Chain], records: Sequence[AttemptRecord]) -> Now:
    """Where a delivery is: by its newest replay job, or by what was before any."""
    replay = max(chains, key=lambda job: (job != "", chains[job].newest_ms), default="")
    chain = chains.get(replay, _Chain())
    own = [record for record in records if _is_of(delivery, record, replay)]
    for record in own:
        if record.verdict == "delivered":
            return Now("delivered", record.at, record.code if record.code != "ok" else "", replay=replay)
    letter, retry = chain.letter, chain.retry
    last = own[-1] if own else None
    if last is not None and last.deliveries and last.nextAt and last.at > rfc3339(chain.newest_ms):
        # its batch waits, as one record that names no delivery
        return Now("waiting", last.at, last.code, last.nextAt, replay=replay)
    if letter is not None and (retry is None or letter.hop >= retry.hop):
        state = {"dropped": "dropped", "replayed": "in_flight"}.get(chain.mark, "dead")
        return Now(state, rfc3339(chain.letter_at_ms), letter.error, letter=chain.letter_at, replay=replay)
    if retry is not None:
        if chain.retry_taken:
            return Now("in_flight", rfc3339(chain.retry_at_ms), retry.error, replay=replay)
        due = rfc3339(retry.not_before_ms)
        return Now("waiting", rfc3339(chain.retry_at_ms), retry.error, due, parks=retry.parks, replay=replay)
    if last is not None:  # what followed it is not in the topics any more
        return Now("unknown", last.at, last.code, replay=replay)
    return Now("in_flight", replay=replay)


def _is_of(delivery: str, record: AttemptRecord, replay: str) -> bool:
    """Whether an attempt belongs to a replay job: its id is a hash that says so, or a batch's list."""
    if record.deliveries:
        return listed(delivery, replay) in record.deliveries
    return record.id == "att_" + base32(attempt_digest(DeliveryId(delivery), record.attempt, replay))


# ---------------------------------------------------------------- showing


def _show(trace: Trace) -> None:
    for number, event in enumerate(trace.events):
        if number:
            click.echo()
        _show_event(event)
    for record in trace.unrouted:
        click.echo(f"unrouted {record.letter} at {record.at}: {record.error}: {printable(record.detail)}")
        click.echo(f"  as it came: headgate dlq show {record.letter} --unrouted --vendor {trace.vendor}")


def _show_event(event: EventTrace) -> None:
    named = (
        f"{printable(event.eventId)} ({printable(event.eventType)})" if event.eventId else "that is not known any more"
    )
    click.echo(f"event {named}")
    facts = [
        ("routed", event.at and f"{event.at} by {event.worker}, configuration {event.configVersion}"),
        ("origin", event.origin),
        ("correlation", event.correlationId),
    ]
    for name, value in facts:
        if value:
            click.echo(f"  {name}: {printable(value)}")
    if not event.id:
        click.echo("  its own record, with the routes, is older than the log")
    elif event.routes:
        click.echo()
        show_table(("ROUTE", "MATCHED", "WHY NOT"), (_route_row(route) for route in event.routes))
    else:
        click.echo("  the tenant had no routes")
    for delivery in event.deliveries:
        click.echo()
        click.echo(f"delivery {delivery.delivery} to {printable(delivery.destination)}: {_where(delivery)}")
        if delivery.attempts:
            _show_attempts(delivery.attempts)
    if event.id and not event.deliveries:
        click.echo("\nno route matched: there is nothing to deliver")
    if event.content is not None:
        click.echo()
        click.echo(msgspec.json.format(bytes(event.content), indent=2).decode())


def _route_row(route: RouteVerdict) -> tuple[str, str, str]:
    if route.matched:
        return route.route, "yes", ""
    return route.route, "no", _WHY_NOT.get(route.why) or f"its filter fails: {route.why}"


def _show_attempts(attempts: Sequence[Attempt]) -> None:
    header = ("ATTEMPT", "AT", "TRIGGER", "CODE", "STATUS", "TOOK", "NEXT", "DETAIL")
    show_table(
        header,
        (
            (
                str(one.attempt),
                one.at,
                one.trigger,
                one.code,
                str(one.status or "-"),
                f"{one.durationMs:.0f} ms",
                one.nextAt or "-",
                one.detail,
            )
            for one in attempts
        ),
    )


def _where(delivery: DeliveryTrace) -> str:
    now = delivery.now
    by = f" (replay {printable(now.replay)})" if now.replay else ""
    match now.state:
        case "delivered":
            return f"delivered {now.at}{by}"
        case "waiting":
            left_s = (datetime.fromisoformat(now.dueAt).timestamp() * 1000 - time() * 1000) / 1000
            due = f"due {now.dueAt}" + (f", in {_span(left_s)}" if left_s > 0 else ", which is now")
            why = {"suspended": "its destination is held"}.get(now.why, now.why)
            held = delivery.destinationState == "held" and now.why != "suspended"
            return f"waiting in retry, {due}: {why}{'; its destination is held' if held else ''}{by}"
        case "dead":
            return f"dead letter {now.letter} since {now.at}: {now.why}{by}"
        case "dropped":
            return f"dead letter {now.letter}, dropped"
        case "in_flight":
            return f"on its way: taken by a worker, nothing is logged of it since{f' {now.at}' if now.at else ''}{by}"
        case _:
            return f"unknown: after {now.at} ({now.why}) its records are gone from the topics{by}"


def _span(seconds: float) -> str:
    whole = round(seconds)
    for size, unit, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"


def _nothing(settings: Settings, owner: TenantRef, current: CurrentTenant, trace: Trace) -> str:
    """What to check where there is no trace of an event."""
    told = [f"nothing is known of event {trace.id!r} of tenant {owner.tenant!r}. Check:"]
    if current.record.state != "active":
        told.append(f"- the tenant is {current.record.state}: its events are not routed")
    lag, where = _lag(settings, owner)
    if lag:
        told.append(
            f"- not settled yet: {counted(lag, 'record')} of the tenant's partition ({where}). Does a worker run?"
        )
    since = f"reaches back to {trace.logSince}" if trace.logSince else "holds nothing of the time that was read"
    told += [
        f"- the log {since} (HEADGATE_ATTEMPTS_RETENTION, --since): what is older is not found",
        "- the id, to the letter; of an event without eventId it is <topic>-<8 hex>-<partition>-<offset>",
        "- a repeat of an earlier event (same eventType and idempotencyKey) is dropped and leaves no record",
        "- a record that could not be read, or one under another key, which is another tenant's or no tenant's: "
        f"headgate dlq list --unrouted --vendor {owner.vendor}",
    ]
    return "\n".join(told)


def _lag(settings: Settings, owner: TenantRef) -> tuple[int, str]:
    """Records of the partition where the tenant's events are that are not settled, and its name."""
    kafka = settings.kafka.confluent()
    topic = settings.topics.ingress(owner.vendor)
    _, partitions = connected_admin(kafka)
    count = partitions.get(topic, 0)
    if not count:
        return 0, topic
    number = partition_of(owner.tenant.encode(), count)
    group = settings.topics.group("route")
    consumer = Consumer(client_config({**kafka, "group.id": group, "enable.auto.commit": False}))
    try:
        part = TopicPartition(topic, number)
        first, end = consumer.get_watermark_offsets(part, CONNECT_TIMEOUT_S)
        done = consumer.committed([part], timeout=CONNECT_TIMEOUT_S)[0].offset
    except KafkaException:
        return 0, topic
    finally:
        consumer.close()
    return end - max(first, done), f"{topic}/{number}"
