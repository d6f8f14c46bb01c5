"""How old the events of many tenants are when they arrive, while another does this or that.

An event's id says of which period it is, whose it is and when it was published, so that its arrival tells its age.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from dev.inbox import RemoteInbox
from tests.deployment import Deployment, event, eventually

EVERY_S: Final = 0.02


class Others:
    """Tenants whose events go to a receiver of its own process, evenly at so many a second in all."""

    def __init__(self, deployment: Deployment, receiver: RemoteInbox, names: Sequence[str], rate_per_s: int) -> None:
        self.names = names
        self.published = 0
        self._deployment = deployment
        self._receiver = receiver
        self._chunk = int(rate_per_s * EVERY_S)

    @classmethod
    @asynccontextmanager
    async def of(cls, deployment: Deployment, count: int, rate_per_s: int) -> AsyncIterator["Others"]:
        with RemoteInbox.spawn(count_only=True, arrivals=True) as receiver:
            yield cls(deployment, receiver, [f"t{n}" for n in range(count)], rate_per_s)

    def tenants(self) -> list[dict[str, Any]]:
        found = [self._deployment.tenant(name) for name in self.names]
        for tenant in found:
            tenant["destinations"][0]["options"]["url"] = self._receiver.url(f"/{tenant['externalId']}")
        return found

    async def publish(self, period: str, for_s: float, *, among: Callable[[int], Sequence[Any]] = lambda _: ()) -> None:
        """Events for so long. `among` gives what else is published with each of the 50 chunks a second."""
        began = time.monotonic()
        chunks = int(for_s / EVERY_S)
        for chunk in range(chunks):
            now_ms = time.time() * 1000
            numbers = range(self.published, self.published + self._chunk)
            owners = [self.names[number % len(self.names)] for number in numbers]
            events = [(t, event(f"{period}:{t}:{n}:{now_ms:.1f}")) for t, n in zip(owners, numbers, strict=True)]
            await self._deployment.publish([*events, *among(chunk)])
            self.published += self._chunk
            await asyncio.sleep(max(0.0, began + (chunk + 1) * EVERY_S - time.monotonic()))

    async def arrived(self) -> None:
        """Waits until all that was published has arrived."""
        await eventually(lambda: self._receiver.stats().accepted >= self.published, "all others' events", 120)

    def ages_ms(self) -> dict[tuple[str, str], list[float]]:
        """By period and tenant, of the first arrival of each event."""
        found: dict[tuple[str, str], list[float]] = {}
        for name, at_ms in {one.event: one.at_ms for one in reversed(self._receiver.arrivals())}.items():
            period, tenant, _, published_ms = name.split(":")
            found.setdefault((period, tenant), []).append(at_ms - float(published_ms))
        return found


def p99(ages_ms: Sequence[float]) -> float:
    return sorted(ages_ms)[len(ages_ms) * 99 // 100]
