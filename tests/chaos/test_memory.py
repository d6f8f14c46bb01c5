"""One worker under a hard limit of memory: large events, many destinations, some of them hanging.

The limit is the kernel's (`limited.py`), so a worker that passes it ends. Peak memory is what the kernel counted
(VmHWM), not a sample. The full size is what `make chaos` runs; the small one has the same proportions.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec import Struct, structs

from dev.inbox import Hang, RemoteInbox
from dev.stack import Stack
from tests.deployment import Deployment, Worker, eventually

MIB = 2**20


class Scene(Struct, frozen=True):
    """Each tenant's events go to all of its `destinations_each` destinations. Those of `hanging` tenants all hang."""

    tenants: int
    hanging: int
    destinations_each: int
    events_each: int  # of a tenant that answers
    events_each_hanging: int
    event_bytes: int
    event_bytes_hanging: int
    budget: str
    limit_mib: int
    deadline_s: float

    @property
    def healthy_deliveries(self) -> int:
        return (self.tenants - self.hanging) * self.destinations_each * self.events_each

    @property
    def destinations(self) -> int:
        return self.tenants * self.destinations_each


LARGE_EVENT = MIB - 2048
SMALL = Scene(50, 5, 10, 2, 6, 256 * 1024, LARGE_EVENT, "64MiB", 288, 150.0)
FULL = Scene(1000, 100, 10, 1, 1, LARGE_EVENT, LARGE_EVENT, "256MiB", 512, 1500.0)


class Seen(Struct):
    """The worst of what was seen while the load ran."""

    memory_peak_mib: int = 0
    sockets: int = 0
    held_mib: int = 0


def _status_mib(worker: Worker, field: str) -> int:
    with open(f"/proc/{worker.process.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":")) // 1024


def _sockets(worker: Worker) -> int:
    folder = f"/proc/{worker.process.pid}/fd"
    count = 0
    for name in os.listdir(folder):
        try:
            count += os.readlink(f"{folder}/{name}").startswith("socket:")
        except FileNotFoundError:
            pass  # closed meanwhile
    return count


@asynccontextmanager
async def _scene(
    stack: Stack, scene: Scene, inbox: RemoteInbox, **env: str
) -> AsyncIterator[tuple[Deployment, Worker]]:
    """A worker that is ready, under its limit, with all events waiting for it in Kafka."""
    settings = {
        "HEADGATE_DEFAULT_TOPICS": "pooled",
        "HEADGATE_MEMORY_BUDGET": scene.budget,
        "HEADGATE_RETRY_TIERS": "1s,5s,30s",
        "HEADGATE_IN_FLIGHT": "2000",
        **env,
    }
    async with Deployment.on(stack, **settings) as deployment:
        await deployment.apply({"tenants": [_tenant(scene, inbox, number) for number in range(scene.tenants)]})
        inbox.script("/hang", Hang())
        large, usual = (os.urandom(size // 2).hex() for size in (scene.event_bytes_hanging, scene.event_bytes))
        for number in range(scene.events_each_hanging):
            await deployment.publish([_event(tenant, number, large) for tenant in range(scene.hanging)])
        for number in range(scene.events_each):
            await deployment.publish([_event(tenant, number, usual) for tenant in range(scene.hanging, scene.tenants)])
        limited = (sys.executable, "-m", "tests.chaos.limited", str(scene.limit_mib))
        yield deployment, deployment.launch(command=limited)


def _event(tenant: int, number: int, payload: str) -> tuple[str, dict[str, object]]:
    return f"t{tenant}", {"eventId": f"e{tenant}-{number}", "eventType": "report.made", "payload": payload}


def _tenant(scene: Scene, inbox: RemoteInbox, number: int) -> dict[str, object]:
    options = {"url": inbox.url("/hang" if number < scene.hanging else "/ok"), "timeout": "15s"}
    names = [f"d{other}" for other in range(scene.destinations_each)]
    return {
        "externalId": f"t{number}",
        "destinations": [{"id": name, "type": "webhook", "options": options} for name in names],
        "routes": [{"id": "all", "match": {"types": ["*"]}, "to": names}],
    }


async def _all_others_are_delivered(stack: Stack, scene: Scene) -> Seen:
    seen = Seen()
    with RemoteInbox.spawn(keep_bodies=False) as inbox:
        async with _scene(stack, scene, inbox) as (_deployment, worker):
            await worker.ready()

            def delivered() -> bool:
                ended = worker.process.poll()
                assert ended is None, f"the worker ended ({ended}):\n{worker.log.read_text()[-3000:]}"
                seen.memory_peak_mib = _status_mib(worker, "VmHWM")
                seen.sockets = max(seen.sockets, _sockets(worker))
                seen.held_mib = max(seen.held_mib, int(worker.metric("headgate_held_bytes")) // MIB)
                paths = inbox.stats().paths
                return "/ok" in paths and paths["/ok"].accepted >= scene.healthy_deliveries

            await eventually(delivered, "all events of destinations that answer are delivered", scene.deadline_s)
            hanging = inbox.stats().paths["/hang"]
            assert hanging.requests > 0
            assert hanging.accepted == 0
            assert worker.metric("headgate_in_flight") > 0  # delivered past what hangs, not after it
            assert await worker.terminate() == 0
            paths = inbox.stats().paths
    assert paths["/ok"].accepted == scene.healthy_deliveries
    assert paths["/ok"].duplicates == 0
    print(
        f"\n{scene.destinations} destinations, {scene.hanging * scene.destinations_each} hanging: peak of memory "
        f"{seen.memory_peak_mib} MiB of {scene.limit_mib}, {seen.sockets} sockets, {seen.held_mib} MiB of events held"
    )
    return seen


@pytest.mark.broker
async def test_a_small_worker_delivers_large_events_past_hanging_destinations(stack: Stack) -> None:
    seen = await _all_others_are_delivered(stack, SMALL)
    assert seen.memory_peak_mib <= SMALL.limit_mib


@pytest.mark.broker
async def test_without_the_budget_the_same_load_takes_more_than_the_limit(stack: Stack) -> None:
    """The control: what hangs then holds a request for each of its 300 deliveries. The limit is far away here: how a
    process without memory ends, if it ends, is its libraries' affair."""
    with RemoteInbox.spawn(keep_bodies=False) as inbox:
        far = structs.replace(SMALL, limit_mib=64 * SMALL.limit_mib)
        async with _scene(stack, far, inbox, HEADGATE_MEMORY_BUDGET="64GiB") as (_deployment, worker):
            await worker.ready()
            await eventually(
                lambda: _status_mib(worker, "VmHWM") > SMALL.limit_mib, "more memory than the limit", SMALL.deadline_s
            )


@pytest.mark.chaos("memory")
@pytest.mark.timeout(1800)
async def test_512_mib_are_enough_for_10_000_destinations_of_which_1_000_hang(stack: Stack) -> None:
    seen = await _all_others_are_delivered(stack, FULL)
    assert seen.memory_peak_mib <= FULL.limit_mib
