"""A steady stream of events into a deployment, and the count of what became of each: the census of the scoreboard."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from msgspec import Struct

from schemas.ids import Tag, Vendor
from tests.deployment import Deployment, event, eventually

TAG: Final = "pool-00"
POOLED: Final = {"HEADGATE_DEFAULT_TOPICS": "pooled", "HEADGATE_POOLS": "1"}
CHUNKS_PER_S: Final = 20


class Census(Struct, frozen=True):
    """`lost`: acknowledged to the producer, and neither delivered nor in a dead letter. `twice`: accepted again."""

    published: int
    lost: set[str]
    twice: int
    renamed: set[str]  # events that came under more than one webhook-id

    def __str__(self) -> str:
        return f"published {self.published}, lost {len(self.lost)}, twice {self.twice}, renamed {len(self.renamed)}"


class Load:
    """Events of `tenants`, each to the inbox's path of its name, round robin, until `stop`."""

    def __init__(self, deployment: Deployment, tenants: Sequence[str], rate_per_s: int) -> None:
        self._deployment = deployment
        self._tenants = tenants
        self.rate_per_s = rate_per_s
        self._chunk = max(1, rate_per_s // CHUNKS_PER_S)
        self._stopping = asyncio.Event()
        self.acknowledged: list[str] = []
        self.published: Counter[str] = Counter()  # by tenant, all acknowledged

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Publishes while the block runs; when it ends everything published is acknowledged."""
        task = asyncio.create_task(self._publish())
        try:
            yield self
        finally:
            self._stopping.set()
            await task

    async def _publish(self) -> None:
        number = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            numbers = range(number, number + self._chunk)
            number += self._chunk
            ids = [f"e{n}" for n in numbers]
            tenants = [self._tenants[n % len(self._tenants)] for n in numbers]
            await self._deployment.publish([(tenant, event(one)) for tenant, one in zip(tenants, ids, strict=True)])
            self.acknowledged += ids
            self.published.update(tenants)
            left_s = began + 1 / CHUNKS_PER_S - time.monotonic()
            if left_s > 0:  # the pace of the load itself
                await asyncio.sleep(left_s)

    def delivered(self) -> int:
        stats = self._deployment.inbox.stats().paths
        return sum(stats[f"/{tenant}"].accepted for tenant in self._tenants if f"/{tenant}" in stats)

    async def flows(self, more: int, timeout_s: float = 30.0) -> None:
        """Waits until `more` events than now are delivered."""
        target = self.delivered() + more
        await eventually(lambda: self.delivered() >= target, f"{more} more deliveries", timeout_s)

    async def caught_up(self, timeout_s: float = 120.0) -> None:
        """Waits until no more than a tenth of a second of the load is not delivered."""
        await eventually(
            lambda: self.delivered() >= len(self.acknowledged) - 2 * self._chunk, "the backlog is gone", timeout_s
        )

    async def census(self) -> Census:
        """Waits until everything has ended, and counts."""
        await all_ended(self._deployment)
        names: dict[str, set[str]] = {}
        accepted: Counter[str] = Counter()
        for tenant in self._tenants:
            for one in self._deployment.inbox.received(f"/{tenant}"):
                name = json.loads(one.body)["id"]
                names.setdefault(name, set()).add(one.webhook_id)
                accepted[name] += one.status == 200
        dead = {one.headers["hg-event"].decode() for one in self._deployment.dead_letters(TAG)}
        done = {name for name, times in accepted.items() if times}
        return Census(
            len(self.acknowledged),
            set(self.acknowledged) - done - dead,
            sum(times - 1 for times in accepted.values() if times > 1),
            {name for name, ids in names.items() if len(ids) > 1},
        )


async def all_ended(deployment: Deployment, timeout_s: float = 120.0) -> None:
    """Waits until everything in ingress and in the retry topic is settled and committed."""
    topics = deployment.settings.topics
    of_route, of_retry = topics.ingress(Vendor("default")), topics.retry(Vendor("default"), Tag(TAG))

    def behind(group: str, topic: str) -> bool:
        committed = deployment.committed(group, topic)
        return any(end > 0 and committed[n] < end for n, end in deployment.ends(topic).items())

    def done() -> bool:
        # what is routed may feed the retry topic, and a retry itself again: its end must not have moved meanwhile
        ends = deployment.ends(of_retry)
        return not behind("route", of_route) and not behind("retry", of_retry) and deployment.ends(of_retry) == ends

    await eventually(done, "ingress and retries are committed to their end", timeout_s)
