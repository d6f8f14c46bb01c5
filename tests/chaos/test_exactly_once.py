"""R11 and R12: S3 and BigQuery hold each event once, whatever becomes of the worker, and whatever they answer.

Redis is away. The far sides speak the real protocols (`tests/contract/farsides`); what they hold in the end is held
against what was published.
"""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import pytest

from dev.stack import Stack
from schemas.ids import DestinationId, ExternalId, TenantRef, Vendor, delivery_id
from tests.contract.far_side import Mode
from tests.contract.farsides.bigquery import BigQueryFarSide
from tests.contract.farsides.s3 import S3FarSide
from tests.deployment import Deployment, Worker, event, eventually
from tests.files import neighbour

pytestmark = [pytest.mark.broker, pytest.mark.timeout(1800)]

NOWHERE = {"REDIS_URL": "redis://127.0.0.1:1/0", "COMMIT_INTERVAL": "100ms"}
QUICK: dict[str, Any] = {"schedule": ["0s", *["1s"] * 48], "max_age": "2h"}
WORKER = "w0"
SLICES = 20
SLICE_S = 0.2
ACME = TenantRef(Vendor("default"), ExternalId("acme"))
TYPES = ("invoice.paid", "order.placed")
ILL = (Mode.THROTTLED, Mode.HANGS, Mode.RESETS)


class Rig(Protocol):
    """A kind and its far side."""

    kind: str
    far: Any

    def options(self) -> Mapping[str, Any]: ...

    def env(self) -> Mapping[str, str]: ...

    def requests(self) -> int: ...

    def count(self) -> int:
        """How many the far side holds."""
        ...


class S3Rig:
    kind = "s3"

    def __init__(self) -> None:
        self.far = S3FarSide()

    def options(self) -> Mapping[str, Any]:
        return {**self.far.options(), "timeout": "2s"}

    def env(self) -> Mapping[str, str]:
        return {}

    def requests(self) -> int:
        return len(self.far.requests)

    def count(self) -> int:
        return len(self.far.held())


class BigQueryRig:
    kind = "bigquery"

    def __init__(self) -> None:
        self.far = BigQueryFarSide()

    def options(self) -> Mapping[str, Any]:
        return self.far.options()

    def env(self) -> Mapping[str, str]:
        return {"BIGQUERY_ENDPOINT": ",".join(self.far.proxy.place)}

    def requests(self) -> int:
        return len(self.far.proxy.appends)

    def count(self) -> int:
        found = self.far.proxy.rows("COUNT(*), 1")
        return int(found[0][0] or 0) if found else 0


class Story:
    """Two destinations of one tenant at the same place, whose batches interleave in a partition."""

    def __init__(self, deployment: Deployment, rig: S3Rig | BigQueryRig) -> None:
        self.deployment = deployment
        self.rig = rig
        self.sent = 0
        self.stores = {"store": "1s", neighbour(ACME, "store"): "3s"}

    async def begin(self) -> None:
        secrets = {name: {"value": value} for name, value in self.rig.far.secrets().items()}
        made = [
            {
                "id": name,
                "type": self.rig.kind,
                "options": {**self.rig.options(), "flush_interval": interval},
                "secrets": secrets,
                "retry": QUICK,
            }
            for name, interval in self.stores.items()
        ]
        routes = [{"id": "all", "match": {"types": ["*"]}, "to": list(self.stores)}]
        await self.deployment.apply({"tenants": [{"externalId": "acme", "destinations": made, "routes": routes}]})

    async def publish(self, count: int) -> None:
        numbers = range(self.sent, self.sent + count)
        await self.deployment.publish([("acme", event(f"e{n}", TYPES[n % 2], payload={"n": n})) for n in numbers])
        self.sent += count

    def worker(self, *without: str) -> Worker:
        command = (sys.executable, "-m", "tests.chaos.killed_stage", "none", *without)
        return self.deployment.launch(WORKER, command, **NOWHERE, **self.rig.env())

    async def killed_around_a_flush(self, dice: random.Random, *without: str) -> None:
        """Publishes, and kills the worker within moments of a request of its own."""
        running = await self.worker(*without).ready()
        for _ in range(SLICES):  # over longer than the longest window, so that batches begin at different records
            await self.publish(10)
            await asyncio.sleep(SLICE_S)
        before = self.rig.requests()
        await self.publish(50)
        await eventually(lambda: self.rig.requests() > before, "the far side is asked", 60)
        await asyncio.sleep(dice.random() * 0.2)
        running.kill()

    def tried(self) -> int:
        """Whatever shows that the far side was asked: a request that it counts, or a batch that is parked."""
        return self.rig.requests() + len(self.deployment.retries("acme"))

    def tried_since(self, before: int) -> bool:
        return self.tried() > before

    async def ends(self, *without: str) -> Counter[str]:
        await self.rig.far.become(Mode.UP)
        self.worker(*without)
        await eventually(lambda: self.rig.count() >= 2 * self.sent, "all of it is stored", 180)
        await self.deployment.all_committed()
        return self.held()

    def held(self) -> Counter[str]:
        return Counter(str(one.delivery) for one in self.rig.far.held())

    def expected(self) -> set[str]:
        return {
            delivery_id(ACME, TYPES[n % 2], f"e{n}", DestinationId(name))
            for n in range(self.sent)
            for name in self.stores
        }


@pytest.fixture(params=["s3", "bigquery"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[S3Rig | BigQueryRig]:
    made = S3Rig() if request.param == "s3" else BigQueryRig()
    await made.far.start()
    yield made
    await made.far.stop()


@pytest.fixture
async def deployment(stack: Stack) -> AsyncIterator[Deployment]:
    async with Deployment.on(stack) as made:
        yield made


async def shown_ill(story: Story, modes: Sequence[Mode], rounds: int, count: int) -> None:
    """A worker that lives while the far side fails in one way after the other."""
    running = await story.worker().ready()
    for number in range(rounds):
        await story.rig.far.become(modes[number % len(modes)])
        before = story.tried()
        await story.publish(count)
        await eventually(partial(story.tried_since, before), "the far side has failed", 60)
        await story.rig.far.become(Mode.UP)
    running.kill()


async def test_each_event_is_held_once_when_workers_are_killed_around_flushes(
    deployment: Deployment, rig: S3Rig | BigQueryRig
) -> None:
    story = Story(deployment, rig)
    await story.begin()
    dice = random.Random(11)
    for _ in range(3):
        await story.killed_around_a_flush(dice)
    await shown_ill(story, ILL, len(ILL), 50)
    held = await story.ends()
    assert set(held.values()) == {1}
    assert set(held) == story.expected()


@pytest.mark.parametrize(("kind", "without"), [("s3", "cursors"), ("bigquery", "notes")])
async def test_without_the_safeguard_events_are_held_twice(deployment: Deployment, kind: str, without: str) -> None:
    made = S3Rig() if kind == "s3" else BigQueryRig()
    await made.far.start()
    story = Story(deployment, made)
    await story.begin()
    dice = random.Random(12)
    for _ in range(8):
        await story.killed_around_a_flush(dice, without)
        if any(times > 1 for times in story.held().values()):
            break
    held = await story.ends(without)
    await made.far.stop()
    assert any(times > 1 for times in held.values())


@pytest.mark.chaos("R11, R12")
async def test_each_event_of_many_is_held_once_when_workers_are_killed_around_flushes(
    deployment: Deployment, rig: S3Rig | BigQueryRig
) -> None:
    story = Story(deployment, rig)
    await story.begin()
    dice = random.Random(13)
    for _ in range(10):
        await story.publish(1_900)
        await story.killed_around_a_flush(dice)
    await shown_ill(story, ILL, 9, 500)
    held = await story.ends()
    assert set(held.values()) == {1}
    assert set(held) == story.expected()
