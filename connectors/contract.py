"""The connector contract: what a kind of destination declares, and what it does when it is asked to deliver.

A connector does not sleep, retry, log, count or read a clock; the pipeline does. It turns the errors it knows into
outcomes and lets the rest reach `streams/runner.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from msgspec import Struct
from pydantic import BaseModel

from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, TenantRef
from schemas.outcome import Outcome

if TYPE_CHECKING:
    from connectors.egress import Egress

Options = TypeVar("Options", bound=BaseModel)
Secrets = TypeVar("Secrets", bound=BaseModel)
Given = TypeVar("Given")
# An expression of the options, compiled: what it gives of an event. Raises ValueError where it cannot be evaluated on
# this one; the fault's text names fields and types, never a value.
Expression: TypeAlias = Callable[[Event], str]
Expressions: TypeAlias = Mapping[str, Expression]  # by option


class Feed(Enum):
    """Where deliveries of a kind wait: in a lane of the worker, or in the stage topic."""

    LANE = "lane"
    STAGE = "stage"


class Span(Struct, frozen=True, gc=False):
    """A range of a stage partition that a batch covers. `log` names that topic for good, also after one of the same
    name took its place: `<cluster id>/<topic id>`."""

    log: str
    partition: int
    first: int
    last: int


Note: TypeAlias = Callable[[bytes], Awaitable[None]]


class NotOwned(Exception):
    """The batch is another worker's by now: its partition was taken away from this one."""


async def keep_nothing(_noted: bytes) -> None:
    """For batches of lane kinds, and for those that nobody delivers a second time."""


class Batch(Struct, frozen=True):
    """Deliveries of one tenant to one destination. `at_ms` is the clock that a signature needs.

    A batch of a stage kind is delivered again as the batch it was: same span, same deliveries in the same order,
    after a failure as after a crash. What its connector must know then, it writes with `note` before it acts; that
    returns once it is durable, and raises NotOwned where this worker no longer owns the batch: then nothing may be
    sent, and the connector lets it through. `noted` is what was written last, empty at first.
    """

    tenant: TenantRef
    destination: DestinationId
    at_ms: int
    span: Span | None
    deliveries: tuple[Delivery, ...]
    noted: bytes = b""
    note: Note = keep_nothing


class Batching(Struct, frozen=True, gc=False):
    """How much is delivered together. For stage kinds, `linger_s` after its first record a batch ends; `max_bytes` are
    those of its records in the stage; `max_in_flight` counts batches. `timeout_s` bounds one `deliver` whatever hangs:
    a connector has smaller ones of its own, and names its outcomes itself."""

    max_events: int
    max_bytes: int
    linger_s: float
    max_in_flight: int
    timeout_s: float


class Step(Struct, frozen=True, gc=False):
    """One named step of `check`: what was tried, whether it worked, and what to do where it did not."""

    name: str
    ok: bool
    detail: str = ""


class Connector(Protocol):
    batching: Batching

    async def open(self) -> None: ...

    async def check(self) -> Sequence[Step]:
        """Tries the destination in named steps and leaves nothing behind."""
        ...

    async def deliver(self, batch: Batch) -> Mapping[DeliveryId, Outcome]:
        """Exactly one outcome for each delivery of the batch."""
        ...

    async def close(self) -> None:
        """Waits for what is in flight. Twice is fine."""
        ...


class Direct(Connector, Protocol):
    """A lane kind that delivers one event at a time without a task or a future (ADR 0002)."""

    def start(self, delivery: Delivery, at_ms: int, done: Callable[[Outcome], None]) -> None:
        """Begins the attempt; `done` is called exactly once, from the event loop, never from inside `start`."""
        ...

    def hurry(self) -> None:
        """No more comes before something ends: what lingers to be sent together goes now."""
        ...


async def deliver_each(connector: Direct, batch: Batch) -> Mapping[DeliveryId, Outcome]:
    """`deliver` of a `Direct` connector, through a future for each delivery: for those who have no lane."""
    loop = asyncio.get_running_loop()
    waiting: dict[DeliveryId, asyncio.Future[Outcome]] = {}
    for delivery in batch.deliveries:
        waiting[delivery.id] = loop.create_future()
        connector.start(delivery, batch.at_ms, partial(give, waiting[delivery.id]))
    connector.hurry()
    return {ident: await outcome for ident, outcome in waiting.items()}


def give(waiter: asyncio.Future[Given], value: Given) -> None:
    """What came, to who waits for it. A waiter that was cancelled wants nothing any more."""
    if not waiter.done():
        waiter.set_result(value)


def place_of(fault: BaseException) -> str:
    """Where it was raised: a bug's words may quote a payload or a secret, its type and place are enough to find it."""
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace is not None else ""


class Spec(Generic[Options, Secrets]):
    """What a kind declares. Validation, docs page, form and OpenAPI branch come from `options` and `secrets`."""

    def __init__(
        self,
        *,
        kind: str,
        title: str,
        feed: Feed,
        options: type[Options],
        secrets: type[Secrets],
        example: Mapping[str, Any],
        codes: Mapping[str, str],
        connect: "Callable[[TenantRef, DestinationId, Options, Secrets, Egress, Set[int], Expressions], Connector]",
        dials: Callable[[Options], Mapping[str, tuple[str, bool]]],
        expressions: Callable[[Options], Mapping[str, str]] = lambda options: {},
        generate: Callable[[], Mapping[str, str]] = dict,
        batching: Callable[[Options], Batching] | None = None,
        unsure: Set[str] = frozenset(),
    ) -> None:
        """`codes` maps each outcome code to its meaning; `generate` makes the secrets that none were given for.

        Of stage kinds: `batching` says how large batches get by these options; `unsure` are the codes after which
        nobody knows whether the far side holds what was sent.

        `dials` gives, by option, the host that it names and whether that is spoken to in TLS; `expressions` the
        expression over an event that it holds (`routing/filters.py`), which must give a text.

        `connect`'s last arguments are the statuses of the destination's `retry.also`, and those expressions, compiled.
        """
        self.kind = kind
        self.title = title
        self.feed = feed
        self.options = options
        self.secrets = secrets
        self.example = example
        self.codes = codes
        self.connect = connect
        self.dials = dials
        self.expressions = expressions
        self.generate = generate
        self.batching = batching
        self.unsure = unsure
