"""R11 and R12 without their far sides: the stage's reader killed between any two of its steps (files for objects).

What the folder holds in the end is held against what was published: no event missing, none twice, every batch whole.
Redis is away, so nothing but the log and the cursors can keep an event from being stored twice.
"""

import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest

from connectors.registry import KINDS
from dev.stack import Stack
from schemas.ids import DEFAULT_VENDOR, ExternalId, TenantRef
from tests.chaos.killed_stage import POINTS
from tests.deployment import Deployment, Worker, event, eventually
from tests.files import SPEC, become, neighbour, stored

pytestmark = [pytest.mark.broker, pytest.mark.timeout(900)]

NOWHERE = {"REDIS_URL": "redis://127.0.0.1:1/0", "COMMIT_INTERVAL": "100ms"}
ACME = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
QUICK: dict[str, Any] = {"schedule": ["0s", *["1s"] * 30], "max_age": "1h"}
WORKER = "w0"  # a static member: nobody waits for the dead one's session to end
A_ROUND = 60
IN_SMALL = ("staged", "noted", "stored", "parked", "offsets_sent")


@pytest.fixture(autouse=True)
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(KINDS, "files", SPEC)  # type: ignore[arg-type]
    yield


@pytest.fixture
async def deployment(stack: Stack) -> AsyncIterator[Deployment]:
    async with Deployment.on(stack) as made:
        yield made


class Story:
    """Two destinations that interleave in one partition, and workers that die one after the other."""

    def __init__(self, deployment: Deployment, folder: Path, *, noting: bool = True) -> None:
        self.deployment = deployment
        self.folders = [folder / name for name in ("slow", neighbour(ACME, "slow"))]
        self.noting = noting
        self.sent = 0
        self.bad = 0

    async def begin(self) -> None:
        destinations = []
        for folder, window_ms, events in zip(self.folders, (900, 200), (40, 15), strict=True):
            folder.mkdir()
            options = {"folder": str(folder), "window_ms": window_ms, "events": events, "noting": self.noting}
            destinations.append({"id": folder.name, "type": "files", "options": options, "retry": QUICK})
        routes = [{"id": "all", "match": {"types": ["*"]}, "to": [folder.name for folder in self.folders]}]
        await self.deployment.apply(
            {"tenants": [{"externalId": "acme", "destinations": destinations, "routes": routes}]}
        )

    async def publish(self, count: int = A_ROUND) -> None:
        """One of each round will be refused."""
        events = [("acme", event(f"e{self.sent + n}")) for n in range(count)]
        events[count // 2] = ("acme", event(f"bad{self.bad}", payload={"say": "refuse"}))
        self.sent += count
        self.bad += 1
        await self.deployment.publish(events)

    def worker(self, name: str, point: str, without: Sequence[str] = ()) -> Worker:
        command = (sys.executable, "-m", "tests.chaos.killed_stage", point, *without)
        return self.deployment.launch(name, command, **NOWHERE)

    async def dies(self, name: str, point: str, without: Sequence[str] = ()) -> None:
        """A worker that meets the point, while events come in."""
        dying = self.worker(name, point, without)
        failing = point in ("parked", "relayed")
        for folder in self.folders:
            become(folder, "timeout" if failing else "")
        for _ in range(60):
            await self.publish()
            if await gone(dying, 1.0):
                return
        raise AssertionError(f"the worker did not meet {point}")

    async def ends(self, without: Sequence[str] = ()) -> Sequence[Counter[str]]:
        """A worker that lives; what is stored once all of it is."""
        for folder in self.folders:
            become(folder, "")
        self.worker(WORKER, "none", without)

        def all_there() -> bool:
            return all(len(self.ids(folder)) >= self.sent - self.bad for folder in self.folders)

        await eventually(all_there, "all events are stored", 120)
        await self.deployment.all_committed()
        return [self.ids(folder) for folder in self.folders]

    @staticmethod
    def ids(folder: Path) -> Counter[str]:
        return Counter(name for batch in stored(folder) for _, name in batch)


async def gone(worker: Worker, within_s: float) -> bool:
    try:
        await worker.ended(within_s)
    except TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("points", [IN_SMALL, pytest.param(tuple(POINTS), marks=pytest.mark.chaos("R11, any step"))])
async def test_whatever_step_the_reader_dies_at_each_event_is_stored_once(
    deployment: Deployment, tmp_path: Path, points: Sequence[str]
) -> None:
    story = Story(deployment, tmp_path)
    await story.begin()
    for point in points:
        await story.dies(WORKER, point)
    for found in await story.ends():
        assert [name for name, times in found.items() if times > 1] == []
        assert len(found) == story.sent - story.bad
    refused = {one.headers["hg-event"] for one in deployment.dead_letters("acme")}
    assert refused == {f"bad{n}".encode() for n in range(story.bad)}


@pytest.mark.parametrize(("without", "points"), [("cursors", ("cursor_committed",) * 3), ("places", ("staged",) * 2)])
async def test_without_the_safeguard_events_are_stored_twice(
    deployment: Deployment, tmp_path: Path, without: str, points: Sequence[str]
) -> None:
    story = Story(deployment, tmp_path, noting=False)
    await story.begin()
    for point in points:
        await story.dies(WORKER, point, [without])
    found = await story.ends([without])
    assert any(times > 1 for one in found for times in one.values())


@pytest.mark.chaos("R11, at random")
async def test_a_reader_that_is_killed_at_random_a_hundred_times_stores_each_event_once(
    deployment: Deployment, tmp_path: Path
) -> None:
    dice = random.Random(11)
    story = Story(deployment, tmp_path)
    await story.begin()
    for _ in range(100):
        await story.dies(WORKER, dice.choice(list(POINTS)))
    for found in await story.ends():
        assert [name for name, times in found.items() if times > 1] == []
        assert len(found) == story.sent - story.bad
