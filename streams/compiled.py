"""A tenant in the shape that the hot path wants: route table, lanes, key prefixes, vault. Made anew when it changes.

Also where a worker asks about what it does not know: a tenant, a destination or a key counts as unknown only once the
registry has read the control plane to end offsets asked for after the record was fetched (design, section 3, rule 3).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from config.registry import Destination, Registry, Tenant
from routing.filters import FilterError
from routing.match import PatternError, Route, RouteTable, compile_route
from routing.redact import PathError
from schemas.control import DestinationRecord
from schemas.ids import DestinationId, TenantRef, Vendor, parts
from streams.lanes import Lane, Lanes
from streams.ledger import tenant_space
from streams.metrics import OTHER, Average, Metrics, bump

log = structlog.get_logger()

T = TypeVar("T")

QUESTION_EVERY_S: Final = 1.0
UNKNOWN_OVERHEAD_BYTES: Final = 1024  # Python's objects for a record that waits
AT_A_TIME: Final = 600  # of what has waited: as many as a round has (`ingress.py`), for the others' sake


class CompiledTenant:
    """Everything about one tenant that a delivery needs. Belongs to one configuration version; lanes outlive it."""

    __slots__ = (
        "_averages",
        "_lanes",
        "_metrics",
        "_own",
        "can_seal",
        "config_version",
        "destinations",
        "event_counts",
        "log_events",
        "named_types",
        "prefix",
        "ref",
        "routes_events",
        "space",
        "state",
        "successor",
        "table",
        "tag",
        "tenant",
        "vault",
    )

    def __init__(
        self,
        tenant: Tenant,
        routes: Sequence[Route],
        lanes: Lanes,
        metrics: Metrics,
        prefix: str,
        before: "CompiledTenant | None",
    ) -> None:
        self.tenant = tenant
        self.ref: TenantRef = tenant.ref
        self.tag = tenant.tag
        self.state = tenant.state
        self.vault = tenant.vault
        self.can_seal = tenant.vault.can_seal
        self.routes_events = tenant.state == "active" and self.can_seal
        self.config_version = tenant.config_version
        self.log_events = tenant.payload_mode != "private"
        # without its key there are none: their connectors are closed, and what waits for them is dropped as `shredded`
        shredded = 0 < tenant.key_version <= tenant.shredded_through
        self.destinations = tenant.destinations if tenant.state == "active" and not shredded else {}
        self.table = RouteTable.build(routes)
        self.named_types = {text for route in tenant.routes for text in route.types if "*" not in text}
        self.prefix = parts(tenant.ref.vendor, tenant.ref.tenant)
        self.space: str = before.space if before is not None else tenant_space(prefix, tenant.ref) + ":"
        self._metrics = metrics
        self._lanes = lanes
        self._averages: dict[str, Average] = before._averages if before is not None else {}
        self.event_counts = metrics.events(tenant.ref.vendor, metrics.label(tenant.ref, tenant.tag))
        self._own: dict[DestinationId, Lane] = {}
        for name, lane in (before._own if before is not None else {}).items():
            destination = self.destinations.get(name)
            lanes.reconfigure(lane, self, destination)
            if destination is not None:
                self._own[name] = lane
        self.successor: CompiledTenant | None = None
        if before is not None:
            before.successor = self

    def newest(self) -> "CompiledTenant":
        """What the tenant is by now: for whoever held it over an await. A lane made by an old one would serve nobody
        else, and would never hear of a change."""
        found = self
        while found.successor is not None:
            found = found.successor
        return found

    def lane(self, destination: DestinationId) -> Lane | None:
        """Its lane, made when it is first needed; None for a destination that the tenant does not have."""
        lane = self._own.get(destination)
        if lane is None:
            record = self.destinations.get(destination)
            if record is None:
                return None
            lane = self._own[destination] = self._lanes.lane(self, record)
        return lane

    def grave(self, destination: DestinationId) -> Lane:
        """A lane that turns everything into dead letters, for what is parked for a removed destination."""
        record = DestinationRecord(id=destination, type="removed", version=0, options=msgspec.Raw(b"{}"))
        lane = Lane(self, Destination(record, False), self._metrics.meter(self.ref, self.tag, "removed"))
        lane.removed = True
        return lane

    def type_label(self, event_type: str) -> str:
        return event_type if event_type in self.named_types else OTHER

    def average(self, label: str) -> Average:
        found = self._averages.get(label)
        if found is None:
            found = self._averages[label] = self._metrics.average(self.ref, self.tag, label)
        return found

    def dropped(self, reason: str) -> None:
        bump(self._metrics.meter(self.ref, self.tag, "").dropped, reason)


class Tenants:
    """All tenants, compiled; kept up to date by the registry."""

    def __init__(
        self,
        registry: Registry,
        lanes: Lanes,
        metrics: Metrics,
        prefix: str,
        read_to_end: Callable[[], Awaitable[None]],
    ) -> None:
        self._lanes = lanes
        self._metrics = metrics
        self._prefix = prefix
        self._read_to_end = read_to_end
        self._by_ref: dict[TenantRef, CompiledTenant] = {}
        self._by_key: dict[Vendor, dict[bytes, CompiledTenant]] = {}
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        registry.on_change(self._changed)

    def _changed(self, tenant: Tenant) -> None:
        ref = tenant.ref
        before = self._by_ref.get(ref)
        try:
            routes = [compile_route(route) for route in tenant.routes]
        except (PatternError, FilterError, PathError) as fault:
            # `apply` refuses such a route; what wrote this one was another version. The tenant stays as it was, but for
            # its keys: what is shredded must open for nobody
            log.error("route_not_compiled", vendor=ref.vendor, fault=type(fault).__name__)
            if before is None or before.vault is tenant.vault:
                return
            tenant = replace(
                before.tenant,
                key_version=tenant.key_version,
                vault=tenant.vault,
                shredded_through=tenant.shredded_through,
            )
            routes = [compile_route(route) for route in tenant.routes]
        compiled = CompiledTenant(tenant, routes, self._lanes, self._metrics, self._prefix, before)
        self._by_ref[ref] = compiled
        self._by_key.setdefault(ref.vendor, {})[ref.tenant.encode()] = compiled

    def get(self, ref: TenantRef) -> CompiledTenant | None:
        return self._by_ref.get(ref)

    def of_vendor(self, vendor: Vendor) -> dict[bytes, CompiledTenant]:
        """By the raw key of an ingress record. The same dict for good: it is filled as tenants come."""
        return self._by_key.setdefault(vendor, {})

    def __len__(self) -> int:
        return len(self._by_ref)

    async def ask(self) -> None:
        """Returns when the registry has read all that was there when this was called. At most one question a second."""
        if self._question is None:
            self._question = asyncio.get_running_loop().create_task(self._put_question())
        await asyncio.shield(self._question)

    async def _put_question(self) -> None:
        await asyncio.sleep(max(0.0, self._asked_at + QUESTION_EVERY_S - time.monotonic()))
        self._question = None  # who asks from here on needs newer end offsets
        self._asked_at = time.monotonic()
        await self._read_to_end()


class Unknowns(Generic[T]):
    """Records that wait for the registry to catch up; then `again` gets them, `AT_A_TIME`. Others go on meanwhile."""

    def __init__(self, tenants: Tenants, again: Callable[[Sequence[T]], Awaitable[None]], max_bytes: int) -> None:
        """Who adds waits for `room` before it takes more: a control plane that is away must not fill the memory."""
        self._tenants = tenants
        self._again = again
        self._max_bytes = max_bytes
        self._waiting: list[T] = []
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None
        self.held_bytes = 0

    async def room(self) -> None:
        await self._room.wait()

    def add(self, item: T, size: int) -> None:
        """`size` in bytes, without what Python needs for it."""
        self._waiting.append(item)
        self.held_bytes += size + UNKNOWN_OVERHEAD_BYTES
        if self.held_bytes > self._max_bytes:
            self._room.clear()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(_ended)

    def __len__(self) -> int:
        return len(self._waiting)

    async def _run(self) -> None:
        try:
            while self._waiting:
                items, self._waiting = self._waiting, []
                size = self.held_bytes
                await self._tenants.ask()
                for first in range(0, len(items), AT_A_TIME):  # held meanwhile: `again` may have to wait
                    await self._again(items[first : first + AT_A_TIME])
                self.held_bytes -= size
                if self.held_bytes <= self._max_bytes:
                    self._room.set()
        finally:
            self._task = None


def _ended(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.result()  # a bug ends the worker (`app.py`): what waited here is settled by nobody else
