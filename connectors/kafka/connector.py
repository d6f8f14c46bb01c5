"""The Kafka connector: one event, one record in a topic of the tenant's own cluster, one outcome."""

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Final

from aiokafka.protocol.produce import ProduceRequest
from pydantic import SecretStr

from connectors.body import body
from connectors.contract import Batch, Batching, Expressions, Feed, Spec, Step, deliver_each
from connectors.egress import Egress
from connectors.http.tls import client_context
from connectors.kafka.classify import CODES, CORRUPT, INVALID_RECORD, Fault, fault_of
from connectors.kafka.cluster import Cluster, Place, Reach
from connectors.kafka.connection import Login
from connectors.kafka.encode import CODECS, MAX_BATCH_BYTES, Key, Record
from connectors.kafka.options import MAX_TIMEOUT_S, Options, Secrets
from connectors.kafka.producer import LINGER_S, Producer, Producers, ends_of
from connectors.kafka.tokens import Tokens
from schemas.delivery import Delivery
from schemas.ids import DeliveryId, DestinationId, TenantRef
from schemas.outcome import Outcome, reject

_BATCHING: Final = Batching(
    max_events=0, max_bytes=MAX_BATCH_BYTES, linger_s=LINGER_S, max_in_flight=0, timeout_s=MAX_TIMEOUT_S
)


class KafkaConnector:
    """A `Direct` connector. Thousands of idle ones stay small: its producer is live only while it works."""

    __slots__ = ("_key", "_producer", "_reach", "_steps", "_timeout_s", "_tokens")

    batching = _BATCHING

    def __init__(
        self,
        tenant: TenantRef,
        options: Options,
        secrets: Secrets,
        egress: Egress,
        expressions: Expressions,
    ) -> None:
        pool = egress.keep(Producers)
        password = secrets.password or SecretStr("")
        place = options.token_place
        self._timeout_s = options.timeout_s
        self._tokens = (
            Tokens(egress, tenant, place, options.username, password, options.scope, options.timeout_s)
            if place is not None
            else None
        )
        mechanism = "" if options.sasl == "none" else options.sasl.upper()
        tls = _context(pool, options, secrets) if options.tls else None
        login = Login(tls, mechanism, options.username, password, self._tokens)
        self._reach = Reach(egress, tenant, options.places, options.topic, login, options.timeout_s)
        self._producer = Producer(pool, self._reach, CODECS[options.compression])
        self._key = Key(options.key, expressions.get("key"))
        self._steps = ("resolve", "connect", *(("tls",) if options.tls else ()), "login", "topic", "brokers", "write")

    async def open(self) -> None:
        """Nothing to do: the first delivery dials."""

    def start(self, delivery: Delivery, at_ms: int, done: Callable[[Outcome], None]) -> None:
        loop = asyncio.get_running_loop()
        event = delivery.event
        try:
            key = self._key.of(event)
        except ValueError as fault:
            loop.call_soon(done, reject("event", "key", f"the key of the record: {fault}"))
            return
        deadline = loop.time() + self._timeout_s
        self._producer.send(Record(delivery, key, body(event), at_ms, deadline, done))

    def hurry(self) -> None:
        self._producer.hurry()

    async def deliver(self, batch: Batch) -> Mapping[DeliveryId, Outcome]:
        return await deliver_each(self, batch)

    async def check(self) -> Sequence[Step]:
        """To every leader's own door, and there a request to write nothing: rights are asked for before its content."""
        cluster = Cluster(self._reach)
        try:
            await cluster.look()
            await self._ask_to_write(cluster)
        except Fault as fault:
            failed = self._steps.index(fault.step)
            return [
                *(Step(name, True) for name in self._steps[:failed]),
                Step(self._steps[failed], False, fault.detail),
            ]
        finally:
            cluster.close()
        return [Step(name, True) for name in self._steps]

    async def _ask_to_write(self, cluster: Cluster) -> None:
        led: dict[Place, int] = {}
        for number, place in enumerate(cluster.leaders):
            if place is None:
                raise Fault("unavailable", f"partition {number} has no leader", step="brokers")
            led.setdefault(place, number)
        for place, number in led.items():
            nothing = ProduceRequest(None, -1, int(self._timeout_s * 1000), [(self._reach.topic, [(number, b"")])])
            try:
                error, _ = ends_of(await cluster.ask(place, nothing, "write"), self._reach.topic)[number]
            except Fault as fault:
                if fault.step != "write":
                    fault.step = "brokers"
                raise
            except KeyError:
                raise Fault("protocol", step="write") from None
            if error not in (0, INVALID_RECORD, CORRUPT):
                raise fault_of(error)
        await cluster.producer_id()

    async def close(self) -> None:
        await self._producer.close()
        if self._tokens is not None:
            await self._tokens.close()


def _context(pool: Producers, options: Options, secrets: Secrets) -> Callable[[], ssl.SSLContext]:
    """One for all, or for who has an authority or a certificate, one of its own, made at its first connection."""
    identity = secrets.identity
    if not options.ca and identity is None:
        return lambda: pool.shared_context

    @lru_cache(maxsize=1)
    def own() -> ssl.SSLContext:
        try:
            return client_context(pool.ca_file, identity, ca=options.ca, alpn=())
        except ssl.SSLError:
            raise Fault("client_certificate", step="tls") from None

    return own


def connect(
    tenant: TenantRef,
    destination: DestinationId,
    options: Options,
    secrets: Secrets,
    egress: Egress,
    retry_also: Set[int] = frozenset(),
    expressions: Expressions | None = None,
) -> KafkaConnector:
    """Call it on the event loop that deliveries are to run on."""
    return KafkaConnector(tenant, options, secrets, egress, expressions or {})


def _dials(options: Options) -> Mapping[str, tuple[str, bool]]:
    place = options.token_place
    token = {"token_url": (place.host, place.tls)} if place is not None else {}
    return {"bootstrap": (options.places[0][0], options.tls), **token}


SPEC: Final = Spec(
    kind="kafka",
    title="Kafka",
    feed=Feed.LANE,
    options=Options,
    secrets=Secrets,
    example={
        "options": {
            "bootstrap": "kafka-1.acme.example:9093,kafka-2.acme.example:9093",
            "topic": "orders",
            "sasl": "scram-sha-512",
            "username": "headgate",
        },
        "secrets": {"password": {"env": "ACME_KAFKA_PASSWORD"}},
    },
    codes=CODES,
    connect=connect,
    dials=_dials,
    expressions=lambda options: options.expressions,
)
