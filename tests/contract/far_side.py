"""What a far side is: a fake that speaks the kind's real protocol on loopback, and behaves as it is told.

Each kind has one in `farsides/<kind>.py`, called `FAR_SIDE`; with it the whole suite of this folder runs for that kind.
"""

import importlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from msgspec import Struct

from connectors.egress import Network
from schemas.ids import DeliveryId
from schemas.outcome import Verdict


class Mode(Enum):
    """How the far side behaves from the next delivery on."""

    UP = "takes everything"
    DOWN = "nothing listens"
    THROTTLED = "asks to come back later"
    RESETS = "breaks the connection in the middle"
    HANGS = "takes the request and says nothing"
    GARBLED = "answers with what is not its protocol"
    DENIED = "does not accept the credentials"
    GONE = "says that the destination is no more"
    REFUSES = "does not take this event"


class Held(Struct, frozen=True):
    """One delivery as the far side has it: by which id, and the payload's bytes."""

    delivery: DeliveryId
    payload: bytes


class FarSide(Protocol):
    """`retry_after_s` is what it asks for when THROTTLED, 0 where its protocol cannot.

    `differs`: modes in which this kind comes to another verdict than most do, or that its protocol has no words for.
    """

    allow: Sequence[Network]
    retry_after_s: float
    differs: Mapping[Mode, Verdict | None]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def become(self, mode: Mode) -> None: ...

    def options(self) -> Mapping[str, Any]:
        """Options that lead here, with the shortest timeout that the kind takes kindly."""
        ...

    def secrets(self) -> Mapping[str, Any]:
        """Secrets that it accepts. Every value holds `CANARY`, so that a leak is seen."""
        ...

    def held(self) -> Sequence[Held]:
        """What it has taken, in order; twice if it came twice."""
        ...

    def touched(self) -> int:
        """Requests that a handler of the destination's owner would have seen, of any kind."""
        ...


CANARY = "canary"


def far_side(kind: str) -> FarSide:
    made: FarSide = importlib.import_module(f"tests.contract.farsides.{kind}").FAR_SIDE()
    return made
