"""A worker with one of its safeguards removed: what the tests of those safeguards must notice.

`python -m tests.chaos.sabotaged_worker HOW` is `headgate worker`, but for that.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import streams.lanes
import streams.outbox
from config.settings import Settings
from schemas.ids import DestinationId
from streams.app import run_worker
from streams.compiled import CompiledTenant
from streams.flight import Flight
from streams.lanes import Lane, Lanes
from streams.ledger import Answers, Ledger
from streams.outbox import Outbox
from streams.settle import Settle


def acknowledges_early() -> None:
    """The source is acknowledged when a delivery is taken on, not when it has ended."""
    admit = Lanes.admit

    def early(lanes: Lanes, flight: Flight, *more: Any) -> None:
        admit(lanes, flight, *more)
        flight.source.settled((flight.offset,))

    Lanes.admit = early  # type: ignore[method-assign]


def gives_up() -> None:
    """A record that the broker has not acknowledged after half a second counts as written."""
    settings, answered = streams.outbox.producer_settings, Outbox._answered

    def impatient(kafka: Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
        return {**settings(kafka, max_bytes), "message.timeout.ms": 500}

    def never_mind(outbox: Outbox, number: int, error: Any) -> None:
        if error is not None:
            print("gave up", flush=True)
        answered(outbox, number, None)

    streams.outbox.producer_settings = impatient
    Outbox._answered = never_mind  # type: ignore[method-assign]


def needs_redis() -> None:
    """A Redis that does not answer is a fault."""
    ask = Ledger.ask

    async def insist(
        ledger: Ledger, events: Sequence[str], positions: Sequence[str], keys: Sequence[str], hops: Sequence[int]
    ) -> Answers | None:
        answers = await ask(ledger, events, positions, keys, hops)
        if answers is None and keys:
            raise ConnectionError("Redis does not answer")
        return answers

    Ledger.ask = insist  # type: ignore[method-assign]


def crosses_tenants() -> None:
    """A destination is known by its id alone: whose was needed first gets the deliveries of all."""
    lane = CompiledTenant.lane
    first: dict[DestinationId, Lane] = {}

    def anybodys(tenant: CompiledTenant, destination: DestinationId) -> Lane | None:
        found = lane(tenant, destination)
        return None if found is None else first.setdefault(destination, found)

    CompiledTenant.lane = anybodys  # type: ignore[method-assign]


def sends_what_is_old() -> None:
    """What waited while the process stood still is sent, whoever has its partitions by now."""
    streams.lanes.STOPPED_S = float("inf")  # type: ignore[misc]


def leaks() -> None:
    """Each attempt that ends leaves 32 KiB behind, and each tenth an open descriptor."""
    ended = Settle.ended
    left: list[Any] = []

    def leave(settle: Settle, flight: Flight) -> None:
        ended(settle, flight)
        left.append(b"x" * 32768)
        if len(left) % 10 == 0:
            left.append(open(os.devnull, "rb"))  # noqa: SIM115 - that it is not closed is the point

    Settle.ended = leave  # type: ignore[method-assign]


WAYS: Final[dict[str, Callable[[], None]]] = {
    way.__name__: way for way in (acknowledges_early, gives_up, leaks, needs_redis, crosses_tenants, sends_what_is_old)
}


def main() -> None:
    WAYS[sys.argv[1]]()
    sys.exit(run_worker(Settings.load(os.environ)))


if __name__ == "__main__":
    main()
