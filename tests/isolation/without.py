"""The worker with one of its safeguards taken out: the control of the tests here.

`python -m tests.isolation.without <safeguard>` is `headgate worker` but for what `SAFEGUARDS` says.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import routing.pace
import streams.lanes
import streams.pump
from cli.worker import command
from config.vault import Vault
from routing.policy import Look
from routing.share import Seat, Share
from schemas.attempt import PURPOSE_DELIVERY
from schemas.ids import ExternalId, TenantRef, Vendor
from streams.flight import Source
from streams.settle import Settle


def share() -> None:
    """Whoever comes first may have all of IN_FLIGHT."""

    def first_come(self: Share, seat: Seat, size: int) -> bool:
        return self.in_flight < self.total

    def has_room(self: Share) -> bool:
        return self.in_flight < self.total

    Share.may_start = first_come  # type: ignore[method-assign]
    Share.has_room = has_room  # type: ignore[method-assign]


def parking() -> None:
    """What has no room waits in its lane, however long."""
    lanes: Any = streams.lanes
    pace: Any = routing.pace
    lanes.QUEUE_AGE_S = pace.BEHIND_S = math.inf
    lanes.QUEUE_BOUND = pace.SMALL = sys.maxsize


def tiers() -> None:
    """A record of the retry topic that is not due yet holds those behind it."""

    def hold(not_before_ms: int, now_ms: int, heap_has_room: bool, tiers_ms: Any) -> Look:
        return Look.DUE if not_before_ms <= now_ms else Look.PAUSE

    pump: Any = streams.pump
    pump.look = hold


def waits() -> None:
    """A record of the retry topic is due when its tier's time has come, whatever it says."""
    pump: Any = streams.pump
    pump.look = lambda *_: Look.DUE


def binding() -> None:
    """Deliveries of all tenants are sealed with one key, and bound to no tenant."""
    common = Vault(TenantRef(Vendor("any"), ExternalId("any")), {1: b"k" * 32}, 1)
    seal, open_ = Vault.seal, Vault.open

    def seal_alike(self: Vault, purpose: str, destination: str, item: str, plaintext: bytes) -> bytes:
        return seal(common if purpose == PURPOSE_DELIVERY else self, purpose, destination, item, plaintext)

    def open_alike(self: Vault, purpose: str, destination: str, item: str, sealed: bytes) -> bytes:
        return open_(common if purpose == PURPOSE_DELIVERY else self, purpose, destination, item, sealed)

    Vault.seal, Vault.open = seal_alike, open_alike  # type: ignore[method-assign]


def keeping() -> None:
    """What cannot be routed is acknowledged, and kept nowhere."""

    def drop(self: Settle, *_: Any, source: Source, offset: int, **__: Any) -> None:
        source.settled((offset,))

    Settle.unrouted = drop  # type: ignore[method-assign]


SAFEGUARDS: dict[str, Callable[[], None]] = {
    "share": share,
    "parking": parking,
    "tiers": tiers,
    "waits": waits,
    "binding": binding,
    "keeping": keeping,
}

if __name__ == "__main__":
    SAFEGUARDS[sys.argv[1]]()
    command(args=[])
