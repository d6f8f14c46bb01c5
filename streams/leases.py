"""Rates of destinations across workers: leases tokens in Redis, ahead of need and beside the way of an event.

Every 100 ms one call asks for the tokens of all lanes that have used their rate. Nothing waits for it: a lane without
tokens is looked at again at the next tick. Where Redis does not answer, each worker keeps to the rate divided by the
number of workers that there were when it last did.
"""

import asyncio
import random
import time
from typing import Final

from streams.lanes import Lanes
from streams.ledger import Ledger

EVERY_S: Final = 0.1
COUNT_EVERY_S: Final = 5.0
THERE_WITHIN_S: Final = 20


class Leases:
    """Runs beside the lanes until it is cancelled."""

    def __init__(self, lanes: Lanes, ledger: Ledger, prefix: str, worker: str) -> None:
        self._lanes = lanes
        self._ledger = ledger
        self._key = f"{prefix}:workers"
        self._worker = worker
        self._counted_at = float("-inf")
        self.workers = 1

    async def run(self) -> None:
        while True:
            # not in step with other workers: the one that always came first would have all of a scarce rate
            await asyncio.sleep(EVERY_S * random.uniform(0.5, 1.5))
            await self._count()
            await self._lease()

    async def _count(self) -> None:
        if time.monotonic() - self._counted_at < COUNT_EVERY_S or not self._ledger.is_on:
            return
        self._counted_at = time.monotonic()
        found = await self._ledger.count_workers(self._key, self._worker, THERE_WITHIN_S)
        if found:
            self.workers = found

    async def _lease(self) -> None:
        asked = [(lane, rate) for lane in self._lanes.leasing() if (rate := lane.rate) is not None]
        if not asked:
            return
        given = None
        if self._ledger.is_on:
            given = await self._ledger.lease(
                [f"{lane.owner.space}rate:{lane.id}" for lane, _ in asked],
                [rate.wanted for _, rate in asked],
                [rate.per_s for _, rate in asked],
            )
        for place, (_, rate) in enumerate(asked):
            if given is None:
                rate.alone(self.workers)
            else:
                rate.grant(given[place])
        self._lanes.leased()
