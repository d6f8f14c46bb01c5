"""What the floor leaves out, as single calls into libraries: how low the cost of a delivery could be (ADR 0010).

`python -m bench parts`. Each part is the product's own call, on the events of the benchmark, alone in a loop: data and
code lie in the processor's nearest cache, nothing is between two calls. Their sum is a bound from below for what a
delivery costs beyond consuming, signing and sending; the way from one to the next, the lanes, limits, retries,
metrics and commits cost nothing in it.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final

from confluent_kafka.admin import AdminClient, NewTopic
from msgspec import Struct

from bench import events
from bench.rig import ADMIN_TIMEOUT_S, Rig
from config.settings import Settings
from config.vault import Vault
from routing.match import Route, RouteTable, compile_route
from schemas.attempt import PURPOSE_EVENT, AttemptRecord, EventRecord, RouteVerdict, encode_record
from schemas.control import RouteRecord
from schemas.event import Event, Problem, canonical, decode_event
from schemas.ids import DeliveryId, ExternalId, TenantRef, Vendor, attempt_digest, base32_many, parts
from streams.ledger import DONE, Ledger, tenant_space
from streams.outbox import Outbox

BATCH: Final = 600  # deliveries, as in a round
REPEATS: Final = 9
WRITTEN: Final = 50  # batches, for what is measured by the process's whole CPU time
MAX_BYTES: Final = 2**20
PARTITIONS: Final = 4
AT: Final = "2026-11-21T09:30:00.000Z"
ORIGIN: Final = "headgate.default.ingress/3/1234567"
VERDICTS: Final = (RouteVerdict("all", True),)
TENANT: Final = TenantRef(Vendor("default"), ExternalId(events.tenant_name(1)))
PREFIX: Final = parts(TENANT.vendor, TENANT.tenant)
DESTINATION_PART: Final = parts("hook-0")
FILTER: Final = "payload.total > 1 && payload.country == 'CH'"


class Part(Struct, frozen=True):
    name: str
    us: float  # of CPU for one delivery


def measure(rig: Rig) -> list[Part]:
    values = [events.event("parts", number * events.TENANTS + 1)[1] for number in range(BATCH)]
    made = [_decoded(value) for value in values]
    names = [DeliveryId("dlv_" + name) for name in base32_many([_digests(event)[1] for event in made])]
    vault = Vault(TENANT, {1: os.urandom(32)}, 1)
    sealed = [vault.seal(PURPOSE_EVENT, "", name, canonical(event)) for name, event in zip(names, made, strict=True)]
    table = RouteTable.build([_route()])
    found = [
        Part("decode and check the event", _each(lambda: [_decoded(value) for value in values])),
        # every other tenant of the benchmark has one
        Part("match, half of them with a filter", _each(lambda: [table.match(event) for event in made]) / 2),
        Part("ids of event, delivery and attempt", _each(lambda: _ids(made, names))),
        Part("seal the event", _each(lambda: [vault.seal(PURPOSE_EVENT, "", "evt_", canonical(one)) for one in made])),
        Part("encode the event's record", _each(lambda: list(map(_event_record, made, names, sealed)))),
        Part("encode the attempt's record", _each(lambda: list(map(_attempt_record, made, names)))),
    ]
    records = [*map(_event_record, made, names, sealed), *map(_attempt_record, made, names)]
    return [*found, *asyncio.run(_far(rig, records, names))]


def _each(work: Callable[[], object]) -> float:
    """Microseconds for one delivery of a batch; the best of some repeats, which leaves out what others add."""
    taken = []
    for _ in range(REPEATS):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken) / BATCH * 1e6


def _route() -> Route:
    return compile_route(RouteRecord(id="all", version=1, types=("invoice.*",), to=("hook-0",), where=FILTER))


def _decoded(value: bytes) -> Event:
    event = decode_event(value, TENANT.tenant, "p-", 0, 0, MAX_BYTES)
    assert not isinstance(event, Problem)
    return event


def _digests(event: Event) -> tuple[bytes, bytes]:
    """What names the event, and its delivery, made as the route agent makes them."""
    event_type, key = event.eventType.encode(), event.idempotencyKey.encode()
    hashed = blake2b(b"%b%d:%b%d:%b" % (PREFIX, len(event_type), event_type, len(key), key), digest_size=16)
    of_delivery = hashed.copy()
    of_delivery.update(DESTINATION_PART)
    return hashed.digest(), of_delivery.digest()


def _ids(made: Sequence[Event], names: Sequence[DeliveryId]) -> list[str]:
    digests = [digest for event in made for digest in _digests(event)]
    return base32_many([*digests, *[attempt_digest(name, 1, "") for name in names]])


def _event_record(event: Event, name: str, sealed: bytes) -> bytes:
    return encode_record(
        EventRecord(
            name, TENANT.vendor, TENANT.tenant, event.eventId, event.eventType, AT, ORIGIN, "worker-0", "c1", 1,
            VERDICTS, {"hook-0": name}, sealed,
        )
    )  # fmt: skip


def _attempt_record(event: Event, name: str) -> bytes:
    return encode_record(
        AttemptRecord(
            name, TENANT.vendor, TENANT.tenant, event.eventId, event.eventType, name, "hook-0", "webhook", 1, "event",
            AT, 1.234, "delivered", "ok", ORIGIN, "worker-0", "all", "", 200, "", "c1", 1,
        )
    )  # fmt: skip


async def _far(rig: Rig, records: Sequence[bytes], names: Sequence[str]) -> list[Part]:
    """What is said to the broker and to Redis, by the CPU time of all threads of this process."""
    topic = f"{rig.prefix}.parts"
    admin = AdminClient({"bootstrap.servers": rig.bootstrap})
    await asyncio.to_thread(admin.create_topics([NewTopic(topic, PARTITIONS, 1)])[topic].result, ADMIN_TIMEOUT_S)
    settings = Settings.load(rig.stack.settings())
    outbox = Outbox(settings.kafka.confluent(), MAX_BYTES)
    keys = [TENANT.tenant] * len(records)
    ledger = Ledger(settings.redis.url, dedupe_ttl_s=60, ledger_ttl_s=60, deadline_s=5.0, on_error=lambda: None)
    space = tenant_space(rig.prefix, TENANT)
    event_keys, delivery_keys = [f"{space}:e{name}" for name in names], [f"{space}:{name}" for name in names]
    positions, hops, done = [ORIGIN] * BATCH, [0] * BATCH, [DONE] * BATCH
    await outbox.write_batch(topic, keys, records)
    await ledger.warm()
    began = time.process_time()
    for _ in range(WRITTEN):
        await outbox.write_batch(topic, keys, records)
    written = time.process_time()
    for _ in range(WRITTEN):
        await ledger.ask(event_keys, positions, delivery_keys, hops)
        await ledger.tell(delivery_keys, done)
    told = time.process_time()
    await ledger.close()
    per = 1e6 / WRITTEN / BATCH
    return [
        Part("write both records, all replicas", (written - began) * per),
        Part("ask Redis, and tell it", (told - written) * per),
    ]
