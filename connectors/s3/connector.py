"""The S3 connector: a batch of the stage becomes one object for each event type and hour, each stored once."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from typing import Final

from connectors.contract import Batch, Batching, Expressions, Feed, Span, Spec, Step
from connectors.egress import Egress
from connectors.s3 import encode
from connectors.s3.bucket import Bucket
from connectors.s3.classify import CODES, UNSURE, Fault
from connectors.s3.classify import Step as StepName
from connectors.s3.client import Credentials, Service, Workshop
from connectors.s3.credentials import AccessKey, Holder, Role
from connectors.s3.encode import Planned, Squeezer
from connectors.s3.options import MAX_TIMEOUT_S, Options, Secrets
from schemas.delivery import Delivery
from schemas.ids import DeliveryId, DestinationId, TenantRef, base32, digest, parts
from schemas.outcome import Outcome, delivered

# Objects of a batch that are written at once; each on a connection of its own.
PARALLEL: Final = 8
MAX_IN_FLIGHT: Final = 2
# No request begins later than this into a batch; the last that did have their own timeout.
BATCH_S: Final = 240.0
# how many deliveries are sorted into objects before the event loop goes on
PLANNED_AT_ONCE: Final = 1000
# Batches stored in part, of which it is remembered what need not be sent again: else one with many objects, or with
# one that is refused, would send all others each time.
MAX_REMEMBERED: Final = 8
PROBE: Final = ".headgate-check-"


def batching(options: Options) -> Batching:
    return Batching(
        max_events=options.flush_events,
        max_bytes=options.flush_bytes,
        linger_s=options.flush_interval_s,
        max_in_flight=MAX_IN_FLIGHT,
        timeout_s=BATCH_S + 2 * MAX_TIMEOUT_S,
    )


class S3Connector:
    __slots__ = (
        "_bucket",
        "_destination",
        "_drained",
        "_holder",
        "_options",
        "_role",
        "_shop",
        "_steps",
        "_stored",
        "_sts",
        "_tenant",
        "_under_way",
        "batching",
    )

    def __init__(
        self, tenant: TenantRef, destination: DestinationId, options: Options, secrets: Secrets, egress: Egress
    ) -> None:
        self.batching = batching(options)
        self._tenant = tenant
        self._destination = destination
        self._options = options
        self._shop = egress.keep(Workshop)
        base = Credentials(secrets.access_key_id.get_secret_value(), secrets.secret_access_key.get_secret_value())
        self._sts: Service | None = None
        self._holder: Holder = AccessKey(base)
        if options.role:
            self._sts = Service(egress, tenant, "sts", options.region, options.sts_place, False, options.timeout_s)
            session = f"headgate-{base32(digest(parts(tenant.vendor, tenant.tenant, destination)))[:16]}"
            self._holder = Role(self._sts, base, options.role, options.external_id, session)
        service = Service(egress, tenant, "s3", options.region, options.place, options.path_style, options.timeout_s)
        self._bucket = Bucket(service, self._holder, options)
        self._steps: tuple[StepName, ...] = ("connect", "write", "once", "read", "delete")
        if options.role:
            self._steps = ("connect", "role", "write", "once", "read", "delete")
        self._stored: dict[Span, set[str]] = {}  # keys of objects
        self._under_way = 0
        self._drained: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Nothing to do: the first batch dials."""

    async def deliver(self, batch: Batch) -> Mapping[DeliveryId, Outcome]:
        assert batch.span is not None, "a batch of a stage kind covers a range of it"
        self._under_way += 1
        try:
            return await self._deliver(batch, batch.span)
        finally:
            self._under_way -= 1
            if not self._under_way and self._drained is not None and not self._drained.done():
                self._drained.set_result(None)

    async def _deliver(self, batch: Batch, span: Span) -> Mapping[DeliveryId, Outcome]:
        deadline = asyncio.get_running_loop().time() + BATCH_S
        groups: dict[tuple[str, str, str], list[Delivery]] = {}
        waiting = iter(batch.deliveries)
        while some := list(islice(waiting, PLANNED_AT_ONCE)):
            encode.plan(some, groups)
            await asyncio.sleep(0)
        options = self._options
        name = f"{encode.stem(span, batch.tenant, batch.destination)}.{encode.EXTENSIONS[options.compression]}"
        objects = (
            Planned(encode.key_of(options.prefix, place, name), deliveries) for place, deliveries in groups.items()
        )
        outcomes: dict[DeliveryId, Outcome] = {}
        stored = self._stored.pop(span, set())
        whole = True

        async def work() -> None:
            nonlocal whole
            for planned in objects:  # shared: each takes the next
                if planned.key in stored:
                    outcome = _delivered(planned)
                else:
                    outcome = await self._store(planned, batch, span, deadline)
                if outcome.verdict == "delivered":
                    stored.add(planned.key)
                else:
                    whole = False
                outcomes.update(dict.fromkeys([one.id for one in planned.deliveries], outcome))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(PARALLEL, len(groups))):
                group.create_task(work())
        if not whole:
            while len(self._stored) >= MAX_REMEMBERED:
                del self._stored[next(iter(self._stored))]
            self._stored[span] = stored
        return outcomes

    async def _store(self, planned: Planned, batch: Batch, span: Span, deadline: float) -> Outcome:
        try:
            if len(planned.key.encode()) > encode.MAX_KEY_BYTES:
                raise Fault("key_too_long", f"{CODES['key_too_long']} Shorten the type, or the prefix.")
            content, identity = await self._encoded(planned, batch, span)
            await self._bucket.store(planned.key, content, identity, deadline)
        except Fault as fault:
            return fault.outcome
        return _delivered(planned)

    async def _encoded(self, planned: Planned, batch: Batch, span: Span) -> tuple[bytes, str]:
        """The object's bytes and identity: lines are made here, a slice at a time, and compressed in a thread."""
        run = self._shop.run
        squeezer = Squeezer(self._options.compression)
        slices: Iterator[bytes] = encode.slices(planned.deliveries)
        lines = next(slices)
        for following in slices:
            await run(partial(squeezer.add, lines))
            lines = following
        return await run(lambda: (squeezer.end(lines), encode.identity(span, batch.tenant, batch.destination, planned)))

    async def check(self) -> Sequence[Step]:
        """Writes an object beside those of events, finds that it cannot be written twice, and removes it."""
        owner = base32(digest(parts(self._tenant.vendor, self._tenant.tenant, self._destination)))[:8]
        prefix = self._options.prefix
        problem = await self._probe(f"{prefix}{'/' if prefix else ''}{PROBE}{owner}", owner)
        if problem is None:
            return [Step(name, True) for name in self._steps]
        failed = self._steps.index(problem.step)
        return [
            *(Step(name, True) for name in self._steps[:failed]),
            Step(self._steps[failed], False, problem.detail),
        ]

    async def _probe(self, key: str, identity: str) -> Fault | None:
        bucket = self._bucket
        deadline = asyncio.get_running_loop().time() + BATCH_S
        try:
            await bucket.put(key, b"{}\n", identity, "write", deadline)
        except Fault as fault:
            return fault
        problem = None
        try:
            if not await bucket.refuses(key, deadline):
                why = "the store overwrites objects although it is told not to (If-None-Match)"
                problem = Fault("incompatible", why, step="once")
            else:
                await bucket.verify(key, identity, deadline)
        except Fault as fault:
            problem = fault
        try:
            await bucket.delete(key, deadline)
        except Fault as fault:
            return problem or fault
        return problem

    async def close(self) -> None:
        if self._under_way:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        await self._bucket.close()
        if self._sts is not None:
            await self._sts.close()


def _delivered(planned: Planned) -> Outcome:
    return delivered(status=200, receipt=planned.key)


def connect(
    tenant: TenantRef,
    destination: DestinationId,
    options: Options,
    secrets: Secrets,
    egress: Egress,
    retry_also: Set[int] = frozenset(),
    expressions: Expressions | None = None,
) -> S3Connector:
    """Call it on the event loop that deliveries are to run on."""
    return S3Connector(tenant, destination, options, secrets, egress)


def _dials(options: Options) -> Mapping[str, tuple[str, bool]]:
    places = {"endpoint": options.place, "sts_endpoint": options.sts_place}
    return {name: (place.host, place.tls) for name, place in places.items() if place is not None}


SPEC: Final = Spec(
    kind="s3",
    title="S3",
    feed=Feed.STAGE,
    options=Options,
    secrets=Secrets,
    example={
        "options": {"bucket": "acme-events", "region": "eu-central-1", "prefix": "headgate"},
        "secrets": {
            "access_key_id": {"env": "ACME_S3_ACCESS_KEY_ID"},
            "secret_access_key": {"env": "ACME_S3_SECRET_ACCESS_KEY"},
        },
    },
    codes=CODES,
    connect=connect,
    dials=_dials,
    batching=batching,
    unsure=UNSURE,
)
