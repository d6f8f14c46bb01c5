"""The webhook connector: one event, one signed POST, one outcome."""

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Final

from connectors.contract import Batch, Batching, Expressions, Feed, Spec, Step, deliver_each, give
from connectors.egress import Egress
from connectors.http.answer import Answer
from connectors.http.tls import Identity
from connectors.webhook import encode
from connectors.webhook.classify import CODES, classify
from connectors.webhook.options import MAX_TIMEOUT_S, Options, Secrets, generate_secrets, signing_key
from schemas.delivery import Delivery
from schemas.ids import DeliveryId, DestinationId, TenantRef
from schemas.outcome import Outcome, retry

_BATCHING: Final = Batching(max_events=1, max_bytes=0, linger_s=0.0, max_in_flight=0, timeout_s=MAX_TIMEOUT_S)
_STEPS: Final = ("resolve", "connect", "tls")


class WebhookConnector:
    """A `Direct` connector. Holds nothing but its head, its keys and its target: thousands of idle ones stay small."""

    __slots__ = ("_retry_also", "_signer", "_signs", "_start", "_target", "_timeout_s")

    batching = _BATCHING

    def __init__(
        self, tenant: TenantRef, options: Options, secrets: Secrets, egress: Egress, retry_also: Set[int]
    ) -> None:
        identity = None
        if secrets.client_cert is not None and secrets.client_key is not None:
            identity = Identity(secrets.client_cert.get_secret_value(), secrets.client_key.get_secret_value())
        self._target = egress.http.target(tenant, options.place, identity)
        self._timeout_s = options.timeout_s
        self._retry_also = retry_also
        custom = {name: value.get_secret_value() for name, value in secrets.headers.items()}
        self._start = self._target.head + encode.fixed_headers(custom)
        self._signs = bool(secrets.signing)
        self._signer = encode.Signer([signing_key(secret.get_secret_value()) for secret in secrets.signing])

    async def open(self) -> None:
        """Nothing to do: the first delivery dials."""

    def start(self, delivery: Delivery, at_ms: int, done: Callable[[Outcome], None]) -> None:
        """Begins one attempt. `done` is called once, from the event loop, never from inside `start`."""
        if not self._signs:  # a fault of ours: a secret is made where none is given
            asyncio.get_running_loop().call_soon(done, retry("platform", "unsigned", "no live signing secret"))
            return
        message = encode.message(self._start, self._signer, delivery, at_ms)

        def answered(answer: Answer) -> None:
            done(classify(answer, at_ms, self._retry_also))

        self._target.post(message, self._timeout_s, answered)

    def hurry(self) -> None:
        """Nothing lingers here."""

    async def deliver(self, batch: Batch) -> Mapping[DeliveryId, Outcome]:
        return await deliver_each(self, batch)

    async def check(self) -> Sequence[Step]:
        """Resolves, connects and shakes hands; sends no request, so the receiver's handler sees nothing."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._target.probe(self._timeout_s, partial(give, answer))
        found = await answer
        names = _STEPS if self._target.place.tls else _STEPS[:-1]
        if not found.fault:
            return [Step(name, True) for name in names]
        failed = names.index(found.step) if found.step in names else len(names) - 1
        detail = f"{self._target.place.display}: {found.detail or CODES.get(found.fault, found.fault)}"
        return [*(Step(name, True) for name in names[:failed]), Step(names[failed], False, detail)]

    async def close(self) -> None:
        await self._target.close()


def connect(
    tenant: TenantRef,
    destination: DestinationId,
    options: Options,
    secrets: Secrets,
    egress: Egress,
    retry_also: Set[int] = frozenset(),
    expressions: Expressions | None = None,
) -> WebhookConnector:
    """Call it on the event loop that deliveries are to run on."""
    return WebhookConnector(tenant, options, secrets, egress, retry_also)


SPEC: Final = Spec(
    kind="webhook",
    title="Webhook",
    feed=Feed.LANE,
    options=Options,
    secrets=Secrets,
    example={
        "options": {"url": "https://hooks.acme.example/in", "timeout": "15s"},
        "secrets": {"signing": {"env": "ACME_SIGNING_SECRET"}, "headers": {"Authorization": {"env": "ACME_TOKEN"}}},
    },
    codes=CODES,
    connect=connect,
    dials=lambda options: {"url": (options.place.host, options.place.tls)},
    generate=generate_secrets,
)
