"""Whether everything that was published came to the end that it should. Pure: works on what was seen, asks nobody."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from dev.demo.events import DemoEvent
from dev.demo.far_sides import Held
from dev.demo.places import PLACES, STORES, Kind, Place, Store
from dev.inbox import Received


class Letter(Struct, frozen=True):
    """What `headgate dlq list --output json` says of a dead letter, as far as it is checked."""

    tenant: str
    destination: str
    event: str
    error: str


class Body(Struct, frozen=True):
    """A webhook's body."""

    id: str
    type: str
    payload: dict[str, Any]


class Seen(Struct, frozen=True):
    """Requests by path, and dead letters by tenant."""

    received: Mapping[str, Sequence[Received]]
    letters: Mapping[str, Sequence[Letter]]


class Check(Struct, frozen=True):
    """One promise, how many things it was checked on, and what broke it."""

    promise: str
    count: int
    faults: tuple[str, ...]

    @property
    def held(self) -> bool:
        return self.count > 0 and not self.faults


def due(place: Place | Store, events: Iterable[DemoEvent]) -> dict[str, DemoEvent]:
    """The events that a place should get, by id."""
    return {
        event.id: event for event in events if event.tenant == place.tenant and place.wants(event.type, event.payload)
    }


def complete(events: Sequence[DemoEvent], received: Mapping[str, Sequence[Received]]) -> bool:
    """Whether every place has got all that it is due: accepted, or refused where it refuses."""
    return all(
        due(place, events).keys()
        <= {event_id(one) for one in received[place.path] if place.dead or 200 <= one.status < 300}
        for place in PLACES
    )


def all_stored(events: Sequence[DemoEvent], stored: Mapping[Kind, Sequence[Held]]) -> bool:
    """Whether bucket, dataset and topic hold all that they are due."""
    return all(due(store, events).keys() <= {one.id for one in stored[store.kind]} for store in STORES)


def event_id(request: Received) -> str:
    return msgspec.json.decode(request.body, type=Body).id


def check(events: Sequence[DemoEvent], seen: Seen) -> list[Check]:
    """Every promise of the demo."""
    ids = {event.id for event in events}
    # a stack that was kept may still hold deliveries of an earlier demo
    ours = {
        place.path: [(one, body) for one in seen.received[place.path] if (body := _body(one)).id in ids]
        for place in PLACES
    }
    return [
        _arrived(events, ours),
        _nothing_else(events, ours),
        _as_published(events, ours),
        _signed(ours),
        _one_id_each(ours),
        _retried(seen.received, ours),
        _redacted(ours),
        _dead(events, seen.letters),
        _dead_elsewhere(ids, seen.letters),
    ]


def check_mended(events: Sequence[DemoEvent], before: Seen, after: Seen) -> list[Check]:
    """What a replay owes, once the destinations that refused accept: `before` it, and `after` it all."""
    published = {event.id: event for event in events}
    arrived, listed = 0, 0
    missing: list[str] = []
    left: list[str] = []
    for place in PLACES:
        if not place.dead:
            continue
        refused = {
            body.id: one.webhook_id for one in before.received[place.path] if (body := _body(one)).id in published
        }
        accepted = {
            (body.id, one.webhook_id)
            for one in after.received[place.path]
            if 200 <= one.status < 300
            and one.signature_ok is True
            and (event := published.get((body := _body(one)).id)) is not None
            and (body.type, body.payload) == (event.type, event.payload)
        }
        wanted = due(place, events)
        arrived += len(wanted)
        missing += [
            f"{event} did not arrive at {place.path} as it was refused there"
            for event in sorted(wanted)
            if (event, refused.get(event)) not in accepted
        ]
        letters = {letter.event for letter in before.letters[place.tenant]} & wanted.keys()
        listed += len(letters)
        still = {letter.event for letter in after.letters[place.tenant]}
        left += [f"{event} is still listed for {place.tenant}" for event in sorted(letters & still)]
    return [
        Check(
            "what was refused has arrived by a replay, well signed, under the same webhook-id", arrived, tuple(missing)
        ),
        Check("what was replayed is no longer listed as a dead letter", listed, tuple(left)),
    ]


def check_stored(events: Sequence[DemoEvent], stored: Mapping[Kind, Sequence[Held]]) -> list[Check]:
    """The promises of bucket, dataset and topic."""
    results = []
    for store in STORES:
        wanted = due(store, events)
        copies = Counter(one.id for one in stored[store.kind])
        once = [f"{event} is there {copies[event]} times" for event in sorted(wanted) if copies[event] != 1]
        # new with each run of the demo: nobody else's events can have got there rightly
        astray = [
            f"{one.id} of {one.owner or 'another tenant'} is there"
            for one in stored[store.kind]
            if one.id not in wanted or one.owner not in (None, store.tenant)
        ]
        changed = [
            f"{one.id} is not what was published"
            for one in stored[store.kind]
            if (event := wanted.get(one.id)) is not None
            and (one.type, exact(one.payload)) != (event.type, exact(event.value)["payload"])
        ]
        results += [
            Check(f"{store.shown} holds every event of its tenant once", len(wanted), tuple(once)),
            Check(f"{store.shown} holds nothing else", copies.total(), tuple(astray)),
            Check(f"{store.shown} holds type and payload as published, digit for digit", len(wanted), tuple(changed)),
        ]
    return results


def exact(text: str | bytes) -> Any:
    """JSON whose numbers are compared by their digits: 1.10 is not 1.1."""
    return json.loads(text, parse_int=_digits, parse_float=_digits)


def _digits(number: str) -> tuple[str]:
    return (number,)  # a text would be equal to a string of the same digits


_Ours = Mapping[str, Sequence[tuple[Received, Body]]]


def _body(request: Received) -> Body:
    return msgspec.json.decode(request.body, type=Body)


def _arrived(events: Sequence[DemoEvent], ours: _Ours) -> Check:
    count, faults = 0, []
    for place in PLACES:
        if place.dead:
            continue
        wanted = due(place, events)
        count += len(wanted)
        got = {body.id for one, body in ours[place.path] if 200 <= one.status < 300}
        faults += [f"{event} did not arrive at {place.path}" for event in sorted(wanted.keys() - got)]
    return Check("every event that a route matches has arrived", count, tuple(faults))


def _nothing_else(events: Sequence[DemoEvent], ours: _Ours) -> Check:
    count, faults = 0, []
    for place in PLACES:
        wanted = due(place, events)
        for _, body in ours[place.path]:
            count += 1
            if body.id not in wanted:
                faults.append(f"{place.path} got {body.id}, which is another tenant's or does not match")
    return Check("no request holds another tenant's event, or one that the filter leaves out", count, tuple(faults))


def _as_published(events: Sequence[DemoEvent], ours: _Ours) -> Check:
    published = {event.id: event for event in events}
    count, faults = 0, []
    for place in PLACES:
        if place.redacts_card:
            continue
        for _, body in ours[place.path]:
            count += 1
            event = published[body.id]
            if (body.type, body.payload) != (event.type, event.payload):
                faults.append(f"{place.path}: {body.id} is not what was published")
    return Check("type and payload are as published", count, tuple(faults))


def _signed(ours: _Ours) -> Check:
    requests = [(path, one) for path, all_of in ours.items() for one, _ in all_of]
    faults = [f"{path}: {one.webhook_id} is not well signed" for path, one in requests if one.signature_ok is not True]
    return Check("every request is signed with its own destination's secret", len(requests), tuple(faults))


def _one_id_each(ours: _Ours) -> Check:
    owners: dict[str, tuple[str, str]] = {}
    faults = []
    for path, requests in ours.items():
        for one, body in requests:
            owner = owners.setdefault(one.webhook_id, (path, body.id))
            if owner != (path, body.id):
                faults.append(f"{one.webhook_id} stands for {owner} and for {(path, body.id)}")
    ends = {(path, body.id) for path, requests in ours.items() for _, body in requests}
    if len(ends) != len(owners):
        faults.append(f"{len(owners)} webhook-ids for {len(ends)} deliveries: some changed between attempts")
    return Check("a delivery keeps its webhook-id through all attempts", len(ends), tuple(faults))


def _retried(received: Mapping[str, Sequence[Received]], ours: _Ours) -> Check:
    count, faults = 0, []
    for place in PLACES:
        if not place.failures:
            continue
        failed = sum(one.status == 503 for one in received[place.path])
        if failed != place.failures:
            faults.append(f"{place.path} failed {failed} requests, not {place.failures}")
        for event in {body.id for one, body in ours[place.path] if one.status == 503}:
            count += 1
            answers = [one.status for one, body in ours[place.path] if body.id == event]
            if answers != [*[503] * (len(answers) - 1), 200]:
                faults.append(f"{place.path}: {event} was answered {answers}")
    return Check("what failed at first was tried again until it went well", count, tuple(faults))


def _redacted(ours: _Ours) -> Check:
    count, faults = 0, []
    for place in PLACES:
        if not place.redacts_card:
            continue
        for _, body in ours[place.path]:
            count += 1
            card = body.payload.get("card", {})
            if "4242" in str(card):
                faults.append(f"{place.path}: {body.id} shows a card number")
    return Check("redacted fields did not leave", count, tuple(faults))


def _dead(events: Sequence[DemoEvent], letters: Mapping[str, Sequence[Letter]]) -> Check:
    count, faults = 0, []
    for place in PLACES:
        if not place.dead:
            continue
        wanted = due(place, events)
        count += len(wanted)
        got = {letter.event for letter in letters[place.tenant] if letter.destination == place.destination}
        faults += [f"{event} is not among the dead letters of {place.tenant}" for event in sorted(wanted.keys() - got)]
    return Check("what was refused lies in its tenant's dead letters", count, tuple(faults))


def _dead_elsewhere(ids: set[str], letters: Mapping[str, Sequence[Letter]]) -> Check:
    dead = {place.tenant for place in PLACES if place.dead}
    faults = [
        f"{letter.event} lies in the dead letters of {tenant} ({letter.error})"
        for tenant, all_of in letters.items()
        if tenant not in dead
        for letter in all_of
        if letter.event in ids
    ]
    return Check("nothing else is a dead letter", len(letters), tuple(faults))
