"""The whole path as a state machine: what an operator, a producer, receivers and bad luck can do, in any order.

`WholePath` drives a real deployment (brokers, Redis, worker processes, an inbox) by steps that Hypothesis chooses, and
keeps a model of what each step allows. At the end everything is mended and drained, and each published event must be
accounted for. Whoever reads a failure reads `story`: the steps in order, and where each missing delivery lies.

What the model does not know it reads from the topics, never from a worker's memory: how an event was routed from its
own record in `attempts`, what is not settled from the committed offsets, what was dropped from the marks. Routing takes
effect while events are under way, so the model keeps, for each event, the configurations in which it may have been
routed: all that were in force while a record of it was not committed.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final
from urllib.parse import quote

from confluent_kafka import KafkaException
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Struct

from config.hold import state_of
from config.writer import read_current
from dev import stack as embedded
from dev.inbox import ACCEPT, Hang, Received, Refuse, Script, Throttle, fail_first, signature_ok
from dev.stack import Stack
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag
from tests.cli.shell import headgate
from tests.deployment import Deployment, Read, Worker, event, eventually

TENANTS: Final = ("acme", "acme2", "ACME")  # the first two share a pool, the last has topics of its own
DESTINATIONS: Final = ("one", "two")
TYPES: Final = ("invoice.paid", "order.made")
CHANGES: Final = ("one moves", "two", "tenant")  # besides those of routes
IDS: Final = tuple(f"evt-{n}" for n in range(6))
OCCURRED_AT: Final = "2026-11-21T09:30:00Z"  # without it a duplicate would have its own, and other bytes
WORKERS: Final = ("w0", "w1")
SETTINGS: Final = {
    "HEADGATE_POOLS": "1",
    "HEADGATE_RETRY_TIERS": "1s",
    "HEADGATE_COMMIT_INTERVAL": "100ms",
}
RETRY: Final = {"schedule": ["0s", "1s"], "max_age": "1h"}
QUIET_S: Final = 120.0  # a breaker that opened lets nothing through for half a minute


class Rule(Struct, frozen=True):
    """A route that a tenant may have."""

    types: str
    to: tuple[str, ...]
    least_total: int = 0

    def matches(self, key: "EventKey") -> bool:
        return (self.types == "*" or key.type.startswith(self.types[:-1])) and key.total >= self.least_total


RULES: Final = {
    "all-one": Rule("*", ("one",)),
    "invoices-two": Rule("invoice.*", ("two",)),
    "large-both": Rule("order.*", ("one", "two"), 100),
}

FAR_SIDES: Final[Mapping[str, Script]] = {
    "accepts": ACCEPT,
    "fails": Refuse(503),
    "fails once": fail_first(1),
    "hangs": Hang(),
    "refuses": Refuse(400),
    "throttles": Throttle("1"),
    "is gone": Refuse(410),
}


class EventKey(Struct, frozen=True, order=True):
    """An event as the product tells events apart: the same id twice is a duplicate, at two tenants it is two events."""

    tenant: str
    type: str
    id: str

    @property
    def total(self) -> int:
        """Of its payload, which the key alone decides: a duplicate has the same bytes."""
        return 50 + 30 * IDS.index(self.id)


class Wanted(Struct, frozen=True):
    """A tenant's part of the configuration. `places`: how often each destination's URL has been changed."""

    rules: frozenset[str] = frozenset(RULES)
    places: tuple[tuple[str, int], ...] = (("one", 1), ("two", 1))

    @property
    def destinations(self) -> dict[str, int]:
        return dict(self.places)

    def of(self, key: EventKey) -> frozenset[str]:
        """The destinations of an event."""
        there = self.destinations
        to = (name for rule in self.rules if RULES[rule].matches(key) for name in RULES[rule].to)
        return frozenset(name for name in to if name in there)


class Routed(Struct, frozen=True):
    """An event's own record in `attempts`: the id of each of its deliveries, by destination."""

    deliveries: dict[str, str]


class Seen(Struct, frozen=True):
    """What the topics hold. `open` are letters without a mark, `dropped` those whose mark says so; by delivery."""

    routed: dict[EventKey, list[Routed]]
    letters: dict[str, list[Read]]
    dropped: set[str]
    unrouted: set[EventKey]
    unsettled: list[Read]


tenants = st.sampled_from(TENANTS)
destinations = st.sampled_from(DESTINATIONS)
keys = st.builds(EventKey, tenants, st.sampled_from(TYPES), st.sampled_from(IDS))


class WholePath(RuleBasedStateMachine):
    """`command` starts a worker in place of the real one, for a control; `timeout` is that of each destination."""

    def __init__(self, stack: Stack, command: Sequence[str] = (), timeout: str = "1s") -> None:
        super().__init__()
        self._timeout = timeout
        self.story: list[str] = []
        self._command = command
        self._runner = asyncio.Runner()
        self._exits = AsyncExitStack()
        self._failed = False
        self._broker_restarts = 0
        self._redis_restarts = 0
        self._fresh = False  # something was published since all was routed
        self._strays = False  # something was published for a tenant that was not there
        self._wanted = {name: Wanted() for name in TENANTS}
        self._present = set(TENANTS)
        self._configurations: list[
            dict[str, Wanted]
        ] = []  # all that were ever in force, of the tenants that were there
        self._possible: dict[EventKey, set[int]] = {}  # in which of them an event may have been routed
        self._secrets: defaultdict[tuple[str, str], list[str]] = defaultdict(list)  # all there ever were, newest first
        self._places: dict[str, tuple[str, str, int]] = {}  # tenant, destination and change of each path of the inbox
        self._buried: dict[str, tuple[EventKey, int]] = {}  # requests of what was dropped, where nothing was under way
        self._may_repeat = False
        self._workers: dict[str, Worker] = {}
        self._tags: dict[str, Tag] = {}
        try:
            self._do("begin", self._begin(stack))
        except BaseException:
            self._close()
            raise

    # ---------------------------------------------------------------- steps

    @initialize(
        ill=st.dictionaries(st.tuples(tenants, destinations), st.sampled_from(sorted(FAR_SIDES)), min_size=2),
        events=st.lists(keys, min_size=4, max_size=12),
    )
    def begin(self, ill: dict[tuple[str, str], str], events: list[EventKey]) -> None:
        """So that each story has something to tell: a story may do without any of the steps below."""
        for (tenant, destination), how in sorted(ill.items()):
            self.far_side(tenant, destination, how)
        self.publish(events)

    @rule(events=st.lists(keys, min_size=2, max_size=6))
    def publish(self, events: list[EventKey]) -> None:
        shown = ", ".join(f"{one.tenant} {one.type} {one.id}" for one in events)
        self._do(f"publish {shown}", self._publish(events))

    @rule(tenant=tenants, destination=destinations, how=st.sampled_from(sorted(FAR_SIDES)))
    def far_side(self, tenant: str, destination: str, how: str) -> None:
        """Where its destination is now; where it was stays as it was."""
        place = self._wanted[tenant].destinations.get(destination)
        if place is not None:
            self.story.append(f"{tenant}/{destination} {how}")
            self._deployment.inbox.script(self._path(tenant, destination, place), FAR_SIDES[how])

    @precondition(lambda self: self._alive() and self._fresh)
    @rule()
    def wait_until_all_is_routed(self) -> None:
        """Whatever becomes of the deliveries: so that what comes next comes in their midst."""
        self._do("wait until all is routed", self._until_routed())

    def wait_until_all_is_committed(self) -> None:
        """No step of a story: where a destination hangs it takes as long as that."""
        self._do("wait until all is committed", self._deployment.all_committed())

    @rule(name=st.sampled_from(WORKERS), kill=st.booleans())
    def start_or_end_worker(self, name: str, kill: bool) -> None:
        if name not in self._alive():
            self._do(f"start worker {name}", self._start(name))
        elif kill:
            self._do(f"kill worker {name}", self._kill(name))
        else:
            self._do(f"SIGTERM to worker {name}", self._terminate(name))

    @precondition(lambda self: not self._broker_restarts)
    @rule(kill=st.booleans())
    def restart_broker(self, kill: bool) -> None:
        self._broker_restarts += 1
        self._do(f"{'kill' if kill else 'stop'} the broker and start it", self._restart_broker(kill))

    @precondition(lambda self: not self._redis_restarts)
    @rule()
    def restart_redis(self) -> None:
        """It forgets everything."""
        self._redis_restarts += 1
        self._do("kill Redis and start it", self._restart_redis())

    @rule(
        tenant=tenants,
        narrowed=st.sampled_from(
            (("--destination", "one"), ("--destination", "two"), ("--error", "http_400"), (), (), ())
        ),
        force=st.booleans(),
    )
    def replay(self, tenant: str, narrowed: tuple[str, ...], force: bool) -> None:
        forced = ("--force",) if force else ()
        if tenant in self._present:
            self._do(f"replay {tenant} {' '.join((*narrowed, *forced))}", self._replay(tenant, narrowed, forced))

    @rule(tenant=tenants, narrowed=st.sampled_from(((), ("--destination", "one"), ("--destination", "two"))))
    def drop(self, tenant: str, narrowed: tuple[str, ...]) -> None:
        self._do(f"drop {tenant} {' '.join(narrowed)}", self._drop(tenant, narrowed))

    @precondition(lambda self: self._strays)
    @rule()
    def replay_unrouted(self) -> None:
        self._strays = False
        self._do("replay what was unrouted", self._replay_unrouted())

    @rule(tenant=tenants, destination=destinations, what=st.sampled_from(("enable", "disable", "secret", "key")))
    def operate(self, tenant: str, destination: str, what: str) -> None:
        """Hold a destination or enable it; rotate its secret, or the key of its tenant."""
        if tenant not in self._present or destination not in self._wanted[tenant].destinations:
            return
        if what == "key":
            self._do(f"rotate the key of {tenant}", self._run("keys", "rotate", "--tenant", tenant))
        elif what == "secret":
            self._do(f"rotate the secret of {tenant}/{destination}", self._rotate(tenant, destination))
        else:
            command = ("destinations", what, destination, "--tenant", tenant)
            self._do(f"{what} {tenant}/{destination}", self._run(*command))

    @rule(tenant=tenants, change=st.sampled_from((*RULES, *CHANGES)))
    def reconfigure(self, tenant: str, change: str) -> None:
        old = self._wanted[tenant]
        there = change in old.rules or (change == "two" and "two" in old.destinations)
        if change in RULES:
            self._wanted[tenant] = Wanted(old.rules ^ {change}, old.places)
        elif change == "tenant":
            there = tenant in self._present
            self._present ^= {tenant}
        elif there:
            self._wanted[tenant] = Wanted(old.rules, tuple(one for one in old.places if one[0] != "two"))
        else:  # another URL is another place
            self._place(tenant, "one" if change == "one moves" else "two")
        how = "" if change == "one moves" else "remove " if there else "add "
        self._do(f"{tenant}: {how}{change}", self._apply())

    @invariant()
    def nothing_crosses(self) -> None:
        """At any time: a tenant's paths have received that tenant's events only, signed by their own secrets."""
        for path in self._deployment.inbox.stats().paths:
            tenant, destination, _ = self._places[path]
            for one in self._deployment.inbox.received(path):
                of = json.loads(one.body)["payload"]["of"]
                self._must(of == tenant, f"an event of {of} came to {path}, which is {tenant}'s")
                secrets = self._secrets[tenant, destination]
                self._must(_is_signed(one, secrets), f"{one.webhook_id} came to {path} with a foreign signature")

    def __enter__(self) -> "WholePath":
        """For a story that is told by hand."""
        return self

    def __exit__(self, *_: object) -> None:
        self.teardown()

    def teardown(self) -> None:
        """The end of each story; of one that failed only what it started is ended."""
        try:
            if not self._failed:
                self._do("mend everything, and let it come to its end", self._end())
        finally:
            self._close()

    def _close(self) -> None:
        self._runner.run(self._exits.aclose())
        self._runner.close()

    # ---------------------------------------------------------------- how they are done

    def _do(self, step: str, work: Coroutine[Any, Any, Any]) -> None:
        self.story.append(step)
        try:
            self._runner.run(work)
        except BaseException as fault:
            self._fail(fault)
            raise

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            fault = AssertionError(what)
            self._fail(fault)
            raise fault

    def _fail(self, fault: BaseException) -> None:
        if not self._failed:
            self._failed = True
            fault.add_note("\n".join(["What was done:", *(f"{n:3}. {step}" for n, step in enumerate(self.story))]))

    async def _begin(self, stack: Stack) -> None:
        running = await asyncio.to_thread(embedded.up, stack.dir)
        self._deployment = await self._exits.enter_async_context(Deployment.on(running, **SETTINGS))
        await self._apply()
        current = await asyncio.to_thread(self._current)
        self._tags = {name: Tag(current.tenants[ExternalId(name)].record.tag) for name in TENANTS}
        await self._start("w0")

    def _current(self) -> Any:
        settings = self._deployment.settings
        return read_current(settings.kafka.confluent(), settings.topics, DEFAULT_VENDOR)

    def _alive(self) -> list[str]:
        return [name for name, worker in self._workers.items() if worker.process.poll() is None]

    async def _start(self, name: str) -> None:
        self._may_repeat |= bool(self._alive())  # a rebalance may send a little twice (R2)
        self._workers[name] = await self._deployment.launch(name, self._command).ready()

    async def _kill(self, name: str) -> None:
        self._may_repeat = True
        await asyncio.to_thread(self._workers[name].kill)

    async def _terminate(self, name: str) -> None:
        self._may_repeat |= len(self._alive()) > 1
        code = await self._workers[name].terminate()
        assert code == 0, f"worker {name} ended with {code} on SIGTERM:\n{self._workers[name].log.read_text()[-2000:]}"

    async def _restart_broker(self, kill: bool) -> None:
        self._may_repeat = True
        await asyncio.to_thread(self._deployment.stack.stop_kafka, kill=kill)
        await asyncio.to_thread(self._deployment.stack.start_kafka)
        await eventually(self._answers, "the broker says what is committed")

    def _answers(self) -> bool:
        try:
            self._unsettled_at_all()
        except KafkaException:  # it has not loaded its groups yet
            return False
        return True

    async def _restart_redis(self) -> None:
        self._may_repeat = True
        await asyncio.to_thread(self._deployment.stack.stop_redis, kill=True)
        await asyncio.to_thread(self._deployment.stack.start_redis)

    async def _run(self, *command: str) -> Any:
        done = await headgate(self._deployment, *command, "--output", "json")
        assert done.exit_code == 0, f"headgate {' '.join(command)}: exit {done.exit_code}: {done.output}"
        return json.loads(done.stdout)

    async def _publish(self, events: Sequence[EventKey]) -> None:
        now = len(self._configurations) - 1
        records = []
        self._fresh = True
        for key in events:
            self._possible.setdefault(key, set()).add(now)
            payload = {"of": key.tenant, "total": key.total}
            self._strays |= key.tenant not in self._present
            records.append((key.tenant, event(key.id, key.type, occurredAt=OCCURRED_AT, payload=payload)))
        # where Redis was away a duplicate is routed again, also after its letter was dropped
        self._exhume(lambda key: key in events)
        await self._deployment.publish(records)

    # ---------------------------------------------------------------- configuration

    def _is_there(self, tenant: str, destination: str) -> bool:
        return tenant in self._present and destination in self._wanted[tenant].destinations

    def _path(self, tenant: str, destination: str, place: int) -> str:
        path = f"/{quote(tenant)}/{destination}/{place}"
        self._places[path] = (tenant, destination, place)
        return path

    def _place(self, tenant: str, destination: str) -> None:
        """A new place for a destination, whether it has one or not."""
        old = self._wanted[tenant]
        used = [place for name, of, place in self._places.values() if (name, of) == (tenant, destination)]
        places = {**old.destinations, destination: 1 + max(used, default=0)}
        self._wanted[tenant] = Wanted(old.rules, tuple(sorted(places.items())))

    async def _apply(self) -> None:
        """What is under way may be routed by the new configuration, and what comes later must be."""
        under_way = {_key_of(one) for one in await asyncio.to_thread(self._unsettled_events)}
        applied = await self._deployment.apply(
            {"tenants": [self._document(name) for name in sorted(self._present)]}, prune=True
        )
        for made in applied.plan.made:
            self._secrets[made.tenant, made.destination].insert(0, made.value.get_secret_value())
        self._configurations.append({name: self._wanted[name] for name in self._present})
        for key in under_way:
            self._possible[key].add(len(self._configurations) - 1)
        await self._until_followed()

    def _document(self, tenant: str) -> dict[str, Any]:
        wanted = self._wanted[tenant]
        there = wanted.destinations
        hooks = [
            {
                "id": name,
                "type": "webhook",
                "options": {
                    "url": self._deployment.inbox.url(self._path(tenant, name, place)),
                    "timeout": self._timeout,
                },
                "retry": RETRY,
            }
            for name, place in there.items()
        ]
        routes = []
        for name in sorted(wanted.rules):
            found = RULES[name]
            match: dict[str, Any] = {"types": [found.types]}
            if found.least_total:
                match["where"] = f"payload.total >= {found.least_total}"
            if to := [one for one in found.to if one in there]:
                routes.append({"id": name, "match": match, "to": to})
        topics = "own" if tenant == "ACME" else "pooled"
        return {"externalId": tenant, "topics": topics, "destinations": hooks, "routes": routes}

    async def _rotate(self, tenant: str, destination: str) -> None:
        shown = await self._run("secrets", "rotate", "--tenant", tenant, "--destination", destination)
        self._secrets[tenant, destination].insert(0, shown["secrets"][0]["value"])

    # ---------------------------------------------------------------- letters

    async def _replay(self, tenant: str, narrowed: Sequence[str], forced: Sequence[str]) -> None:
        if forced:
            self._may_repeat = True
            self._exhume(lambda key: key.tenant == tenant)
        await self._run("dlq", "replay", "--tenant", tenant, *narrowed, *forced)

    async def _drop(self, tenant: str, narrowed: Sequence[str]) -> None:
        """A dropped delivery of which nothing else is under way must not come any more."""
        before = await asyncio.to_thread(self._look)
        await self._run("dlq", "drop", "--tenant", tenant, *narrowed)
        after = await asyncio.to_thread(self._look)
        under_way = {_key_of(one) for one in before.unsettled}
        for delivery in after.dropped - before.dropped:
            key = _key_of(after.letters[delivery][0])
            if key not in under_way:
                self._buried[delivery] = key, len(self._arrived().get(delivery, ()))

    def _exhume(self, which: Callable[[EventKey], bool]) -> None:
        """These may come again."""
        self._buried = {name: one for name, one in self._buried.items() if not which(one[0])}

    async def _replay_unrouted(self) -> None:
        now = len(self._configurations) - 1
        unrouted = (await asyncio.to_thread(self._look)).unrouted
        for key in unrouted:
            self._possible[key].add(now)
        self._exhume(lambda key: key in unrouted)
        await self._run("dlq", "replay", "--unrouted")

    # ---------------------------------------------------------------- looking

    def _topics(self) -> tuple[str, list[str]]:
        topics = self._deployment.settings.topics
        return topics.ingress(DEFAULT_VENDOR), [topics.retry(DEFAULT_VENDOR, tag) for tag in set(self._tags.values())]

    def _unsettled(self, group: str, topic: str) -> list[Read]:
        """The committed offsets first: what replaces a settled record was written before that was committed."""
        committed = self._deployment.committed(group, topic)
        return [one for one in self._deployment.read(topic) if one.offset >= committed[one.partition]]

    def _unsettled_events(self) -> list[Read]:
        return self._unsettled("route", self._topics()[0]) if self._configurations else []

    def _unsettled_at_all(self) -> list[Read]:
        ingress, retries = self._topics()
        return [
            *self._unsettled("route", ingress),
            *(one for topic in retries for one in self._unsettled("retry", topic)),
        ]

    def _look(self) -> Seen:
        unsettled = self._unsettled_at_all()
        routed: defaultdict[EventKey, list[Routed]] = defaultdict(list)
        for record in self._deployment.attempts():
            if record["kind"] == "event":
                key = EventKey(record["tenant"], record["eventType"], record["eventId"])
                routed[key].append(Routed(record.get("deliveries", {})))
        letters: defaultdict[str, list[Read]] = defaultdict(list)
        dropped: set[str] = set()
        for tag in set(self._tags.values()):
            records = self._deployment.read(self._deployment.settings.topics.dead_letters(DEFAULT_VENDOR, tag))
            names = {}
            for one in records:
                if "hg-mark" not in one.headers:
                    name = names[f"{one.partition}/{one.offset}"] = one.headers["hg-delivery"].decode()
                    letters[name].append(one)
                elif one.headers["hg-mark"] == b"dropped":
                    dropped.add(names[one.headers["hg-letter"].decode()])
        unrouted = {_key_of(one) for one in self._deployment.unrouted() if "hg-mark" not in one.headers}
        return Seen(routed, letters, dropped, unrouted, unsettled)

    def _arrived(self) -> dict[str, list[Received]]:
        """All requests, by delivery."""
        found: defaultdict[str, list[Received]] = defaultdict(list)
        for path in self._places:
            for one in self._deployment.inbox.received(path):
                found[one.webhook_id].append(one)
        return found

    async def _until_followed(self) -> None:
        """The workers route by the newest configuration."""
        newest = await asyncio.to_thread(self._deployment.read, self._deployment.settings.topics.control)
        end = newest[-1].offset + 1
        for name in self._alive():
            worker = self._workers[name]
            await eventually(lambda: worker.metric("headgate_control_offset") >= end, f"{name} follows")  # noqa: B023

    async def _until_routed(self) -> None:
        def all_routed() -> bool:
            seen = self._look()
            return all(key in seen.routed or key in seen.unrouted for key in self._possible)

        await eventually(all_routed, "every event has a record of how it was routed, or is unrouted", QUIET_S)
        self._fresh = False

    async def _until_quiet(self) -> None:
        await eventually(lambda: not self._unsettled_at_all(), "nothing is unsettled any more", QUIET_S)

    # ---------------------------------------------------------------- the end

    async def _end(self) -> None:
        for path in self._places:
            self._deployment.inbox.script(path, ACCEPT)
        self._present = set(TENANTS)
        for tenant in TENANTS:
            if "two" not in self._wanted[tenant].destinations:
                self._place(tenant, "two")
            self._wanted[tenant] = Wanted(places=self._wanted[tenant].places)
        await self._apply()
        for name in self._workers:  # a static member that stays away keeps its partitions
            if name not in self._alive():
                await self._start(name)
        await self._enable_all()
        await self._until_quiet()
        self._account(await asyncio.to_thread(self._look), final=False)
        await self._enable_all()  # a 410 that came last
        await self._replay_unrouted()
        await self._until_quiet()
        while await self._replay_all():
            await self._until_quiet()
        fresh = [EventKey(tenant, "invoice.fresh", IDS[0]) for tenant in TENANTS]
        await self._publish(fresh)
        await self._until_quiet()
        self._account(await asyncio.to_thread(self._look), final=True)
        self.nothing_crosses()
        self._fresh_came_to_the_newest(fresh)

    async def _replay_all(self) -> int:
        """How many letters were sent. More than once where a worker had not heard yet that a place is enabled."""
        done = [await self._run("dlq", "replay", "--tenant", tenant) for tenant in TENANTS]
        return sum(one["replayed"] for one in done)

    async def _enable_all(self) -> None:
        current = await asyncio.to_thread(self._current)
        for tenant in TENANTS:
            known = current.tenants[ExternalId(tenant)]
            for name, record in known.destinations.items():
                if state_of(known, record) != "on":
                    await self._run("destinations", "enable", name, "--tenant", tenant)

    def _account(self, seen: Seen, *, final: bool) -> None:
        """Each event: routed as one of the configurations said that it may have met, and each delivery of it ended.

        Before the last replay a letter is an end, after it only a delivery is, or the word of who dropped it.
        """
        wrong = []
        arrived = self._arrived()
        known: dict[str, EventKey] = {}
        for key, possible in sorted(self._possible.items()):
            maps = seen.routed.get(key, [])
            allowed = {self._configurations[one][key.tenant].of(key) for one in possible
                       if key.tenant in self._configurations[one]}  # fmt: skip
            for one in maps:
                known.update(dict.fromkeys(one.deliveries.values(), key))
                if frozenset(one.deliveries) not in allowed:
                    wrong.append(f"{_name(key)} was routed to {sorted(one.deliveries)}, not as {_shown(allowed)} says")
            missing = [
                {name: d for name, d in one.deliveries.items() if not self._has_ended(d, seen, arrived, final=final)}
                for one in maps
            ]
            if not maps and (final or key not in seen.unrouted):
                wrong.append(f"{_name(key)} is lost: it was never routed")
            elif maps and all(missing):  # killed between two routings, the last one counts
                lost = min(missing, key=len)
                where = "; ".join(self._whereabouts(name, lost[name], seen, arrived) for name in lost)
                wrong.append(f"{_name(key)} is lost: {where}")
        for delivery, requests in arrived.items():
            wrong += self._check_requests(known.get(delivery), delivery, requests, seen)
        for delivery, (key, times) in self._buried.items():
            if len(arrived.get(delivery, ())) > times:
                wrong.append(f"{_name(key)}: {delivery} was sent after it had been dropped")
        assert not wrong, "\n".join(wrong)

    @staticmethod
    def _has_ended(delivery: str, seen: Seen, arrived: Mapping[str, list[Received]], *, final: bool) -> bool:
        if any(one.status == 200 for one in arrived.get(delivery, ())):
            return True
        return delivery in seen.dropped or (not final and delivery in seen.letters)

    def _whereabouts(self, name: str, delivery: str, seen: Seen, arrived: Mapping[str, list[Received]]) -> str:
        answers = [f"{one.path}: {one.status}" for one in arrived.get(delivery, ())]
        letters = [one.headers["hg-error"].decode() for one in seen.letters.get(delivery, ())]
        return f"{delivery} to {name}: requests {answers}, dead letters {letters}, dropped {delivery in seen.dropped}"

    def _check_requests(self, key: EventKey | None, delivery: str, requests: list[Received], seen: Seen) -> list[str]:
        wrong = []
        if key is None:
            return [f"{delivery} came to {requests[0].path}, and no event was routed there"]
        places = {self._places[one.path][:2] for one in requests}
        routed = {(key.tenant, name) for one in seen.routed[key] for name, d in one.deliveries.items() if d == delivery}
        if places != routed:
            wrong.append(f"{_name(key)}: {delivery} of {_shown(routed)} came to {_shown(places)}")
        if len({one.body for one in requests}) > 1 or json.loads(requests[0].body)["id"] != key.id:
            wrong.append(f"{_name(key)}: {delivery} came with other bytes")
        accepted = sum(one.status == 200 for one in requests)
        if accepted > 1 and not self._may_repeat and not self._redis_was_late():
            wrong.append(f"{_name(key)}: {delivery} was delivered {accepted} times, and nothing had failed")
        return wrong

    def _redis_was_late(self) -> bool:
        return any("redis_off" in worker.log.read_text() for worker in self._workers.values())

    def _fresh_came_to_the_newest(self, fresh: Sequence[EventKey]) -> None:
        """Once all is mended: to the newest URL, signed by the newest secret."""
        for key in fresh:
            for name, place in self._wanted[key.tenant].destinations.items():
                received = self._deployment.inbox.received(self._path(key.tenant, name, place))
                one = next((one for one in received if json.loads(one.body)["type"] == key.type), None)
                assert one is not None, f"{_name(key)} did not come to the newest place of {name}"
                newest = self._secrets[key.tenant, name][:1]
                assert _is_signed(one, newest), f"{_name(key)} is not signed by the newest secret of {name}"


def _key_of(record: Read) -> EventKey:
    """Of a record of ingress, of the unrouted ones, of retry or of the dead letters."""
    if "hg-event" in record.headers:
        tenant, type_, id_ = (record.headers[name].decode() for name in ("hg-tenant", "hg-type", "hg-event"))
        return EventKey(tenant, type_, id_)
    body = json.loads(record.value or b"")
    return EventKey((record.key or b"").decode(), body["eventType"], body["eventId"])


def _is_signed(request: Received, secrets: Sequence[str]) -> bool:
    signature = dict(request.headers)["webhook-signature"]
    now_s = request.arrived_at_ms / 1000
    return signature_ok(secrets, request.webhook_id, request.timestamp, request.body, signature, now_s)


def _name(key: EventKey) -> str:
    return f"{key.tenant} {key.type} {key.id}"


def _shown(sets: Iterable[Iterable[str]]) -> str:
    return " or ".join(sorted("{" + ", ".join(sorted(one)) + "}" for one in sets)) or "nothing"
