"""The producer: what goes together, what is stored once, and how much of it is live."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import json as msgjson
from pydantic import SecretStr

from connectors.body import body
from connectors.egress import Egress
from connectors.kafka.cluster import Reach
from connectors.kafka.connection import Login
from connectors.kafka.encode import CODECS, Record
from connectors.kafka.producer import LINGER_S, Producer, Producers
from schemas.outcome import Outcome
from schemas.topics import partition_of
from tests.connectors.kafkas import deliver, delivery, sink
from tests.connectors.post import ACME
from tests.connectors.receiver import Peer, Receiver
from tests.connectors.until import until
from tests.contract.far_side import Mode
from tests.contract.farsides.kafka import (
    INIT_PRODUCER,
    LOST,
    METADATA,
    PARTITIONS,
    PASSWORD,
    PRODUCE,
    TOPIC,
    KafkaFarSide,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "kafka-partitions.json").read_text())


def requests(far: KafkaFarSide, api: int) -> int:
    return sum(asked == api for asked, _ in far.requests)


# ---------------------------------------------------------------- the record


@pytest.mark.parametrize(("key", "partitions"), VECTORS["keys"], ids=lambda value: str(value)[:20])
def test_a_key_goes_where_java_s_own_producer_puts_it(key: str, partitions: list[int]) -> None:
    assert [partition_of(key.encode(), count) for count in VECTORS["partitions"]] == partitions


@pytest.mark.parametrize("compression", CODECS)
async def test_a_record_is_the_webhook_s_body_under_the_event_s_fields(
    far: KafkaFarSide, egress: Egress, compression: str
) -> None:
    connector = sink(egress, far.options(), far.secrets(), compression=compression)
    one = delivery(1, b'{"a": 1.0}', source="billing", aggregateId="inv_42")
    (outcome,) = await deliver(connector, one)
    (stored,) = far.stored
    assert stored.value == body(one.event)
    assert stored.key == b"inv_42"
    assert stored.partition == partition_of(b"inv_42", PARTITIONS)
    assert outcome.receipt == f"{stored.partition}/0"
    assert dict(stored.headers) == {
        "deliveryId": one.id.encode(),
        "eventId": b"evt_1",
        "eventType": b"invoice.paid",
        "occurredAt": b"2026-11-21T09:30:00Z",
        "schemaVersion": b"1",
        "source": b"billing",
        "aggregateId": b"inv_42",
    }
    await connector.close()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("tenant", b"acme"),
        ("event_id", b"evt_1"),
        ("aggregate_id", None),
        ("type + '/' + payload.customer", "invoice.paid/Zürich".encode()),
        ("string(payload.number)", b"7"),
        ("''", None),
    ],
)
async def test_the_key_is_what_the_options_say(
    far: KafkaFarSide, egress: Egress, key: str, expected: bytes | None
) -> None:
    connector = sink(egress, far.options(), far.secrets(), key=key)
    await deliver(connector, delivery(1, '{"customer":"Zürich","number":7}'.encode()))
    assert [one.key for one in far.stored] == [expected]
    await connector.close()


@pytest.mark.parametrize("key", ["payload.customer", "string(payload.customer.id)", "payload.number", "payload.long"])
async def test_an_event_that_gives_no_key_is_refused_alone_and_its_values_are_not_told(
    far: KafkaFarSide, egress: Egress, key: str
) -> None:
    connector = sink(egress, far.options(), far.secrets(), key=key)
    bad = delivery(1, b'{"number":4711,"long":"%b"}' % (b"4711" * 500))
    good = delivery(2, b'{"customer":{"id":"c1"},"number":"n","long":"l"}')
    outcomes = await deliver(connector, bad)
    assert [(one.verdict, one.fault, one.code) for one in outcomes] == [("reject", "event", "key")]
    assert "4711" not in outcomes[0].detail
    if "id" in key or key != "payload.customer":
        assert [one.verdict for one in await deliver(connector, good)] == ["delivered"]
    await connector.close()


async def test_records_without_a_key_are_spread(far: KafkaFarSide, egress: Egress) -> None:
    connector = sink(egress, far.options(), far.secrets())
    for number in range(9):
        await deliver(connector, delivery(number))
    assert {one.partition for one in far.stored} == set(range(PARTITIONS))
    await connector.close()


# ---------------------------------------------------------------- what goes together


async def test_what_comes_within_the_linger_goes_in_one_request(far: KafkaFarSide, egress: Egress) -> None:
    connector = sink(egress, far.options(), far.secrets(), key="event_id")
    await deliver(connector, delivery(0))
    before, ended = requests(far, PRODUCE), list[Outcome]()
    started = time.monotonic()
    for number in range(1, 51):
        connector.start(delivery(number), 0, ended.append)
    await until(lambda: len(ended) == 50)
    assert time.monotonic() - started >= LINGER_S
    assert requests(far, PRODUCE) == before + 1  # all partitions have one leader
    assert len(far.stored) == 51
    await connector.close()


async def test_a_full_batch_goes_without_waiting(far: KafkaFarSide, egress: Egress) -> None:
    connector = sink(egress, far.options(), far.secrets(), key="tenant", compression="none")
    await deliver(connector, delivery(0))
    ended: list[Outcome] = []
    for number in range(1, 12):
        connector.start(delivery(number, b'"%b"' % (b"x" * 200_000)), 0, ended.append)
    await connector.close()
    assert [one.verdict for one in ended] == ["delivered"] * 11
    sizes = [len(content) for api, content in far.requests if api == PRODUCE]
    assert max(sizes) < 1024 * 1024 + 4096
    assert len(sizes) >= 4


async def test_a_topic_that_takes_less_gets_less(far: KafkaFarSide, egress: Egress) -> None:
    """Each event would fit; only their batch is too large."""
    far.most_records = 4
    connector = sink(egress, far.options(), far.secrets(), key="tenant")
    sent = [delivery(number) for number in range(30)]
    assert {one.verdict for one in await deliver(connector, *sent)} == {"delivered"}
    assert [one.delivery for one in far.held()] == [one.id for one in sent]
    await connector.close()


async def test_one_event_that_is_refused_takes_no_others_along(far: KafkaFarSide, egress: Egress) -> None:
    far.poison = b"arsenic"
    connector = sink(egress, far.options(), far.secrets(), key="tenant")
    sent = [delivery(number, b'"arsenic"' if number in (7, 20) else b'"wine"') for number in range(30)]
    outcomes = await deliver(connector, *sent)
    assert [number for number, one in enumerate(outcomes) if one.verdict == "reject"] == [7, 20]
    assert {one.code for one in outcomes} == {"ok", "refused"}
    assert [one.delivery for one in far.held()] == [one.id for at, one in enumerate(sent) if at not in (7, 20)]
    await connector.close()


# ---------------------------------------------------------------- once


@pytest.mark.parametrize("forgetful", [False, True])
async def test_an_answer_that_was_lost_is_asked_for_again_and_the_record_is_there_once(
    far: KafkaFarSide, egress: Egress, forgetful: bool
) -> None:
    """The control is a broker that does not look at the sequence."""
    far.forgetful = forgetful
    connector = sink(egress, far.options(), far.secrets())
    await deliver(connector, delivery(0))
    far.answers = [LOST, LOST, 7, 20]
    outcomes = await deliver(connector, delivery(1), delivery(2))
    assert [one.verdict for one in outcomes] == ["delivered"] * 2
    times = 3 if forgetful else 1
    assert sorted(one.delivery for one in far.held()) == sorted(
        [delivery(0).id, *(delivery(1).id, delivery(2).id) * times]
    )
    assert requests(far, INIT_PRODUCER) == 1
    await connector.close()


async def test_a_leader_that_has_moved_is_found_within_the_attempt(far: KafkaFarSide, egress: Egress) -> None:
    connector = sink(egress, far.options(), far.secrets())
    await deliver(connector, delivery(0))
    before = requests(far, METADATA)
    far.answers = [6]
    assert [one.verdict for one in await deliver(connector, delivery(1))] == ["delivered"]
    assert requests(far, METADATA) == before + 1
    await connector.close()


async def test_what_is_open_at_the_deadline_takes_the_sequence_with_it(far: KafkaFarSide, egress: Egress) -> None:
    """The far side holds producers to their sequence: under the old id the next record would be out of order."""
    connector = sink(egress, far.options(), far.secrets(), timeout="500ms")
    await deliver(connector, delivery(0))
    await far.become(Mode.HANGS)
    assert [one.code for one in await deliver(connector, delivery(1))] == ["timeout"]
    await far.become(Mode.UP)
    assert [one.verdict for one in await deliver(connector, delivery(2))] == ["delivered"]
    assert requests(far, INIT_PRODUCER) == 2
    await connector.close()


async def test_a_broker_that_restarts_costs_no_delivery(far: KafkaFarSide, egress: Egress) -> None:
    connector = sink(egress, far.options(), far.secrets())
    await deliver(connector, delivery(0))
    far.drop()
    assert [one.verdict for one in await deliver(connector, delivery(1))] == ["delivered"]
    await connector.close()


async def test_a_throttled_producer_keeps_away_for_as_long_as_it_is_told(far: KafkaFarSide, egress: Egress) -> None:
    connector = sink(egress, far.options(), far.secrets())
    far.throttle_ms = 700
    assert [one.verdict for one in await deliver(connector, delivery(0))] == ["delivered"]
    started = time.monotonic()
    await deliver(connector, delivery(1))
    assert time.monotonic() - started > 0.6
    far.throttle_ms = 0
    await connector.close()


# ---------------------------------------------------------------- how much is live


def producer(pool: Producers, egress: Egress, far: KafkaFarSide) -> Producer:
    login = Login(None, "PLAIN", "acme", SecretStr(PASSWORD), None)
    return Producer(pool, Reach(egress, ACME, (("127.0.0.1", far.port),), TOPIC, login, 5.0), CODECS["none"])


async def send(one: Producer) -> Outcome:
    waiting: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    deadline = asyncio.get_running_loop().time() + 5
    one.send(Record(delivery(), None, b'{"payload":1}', 0, deadline, waiting.set_result))
    one.hurry()
    return await waiting


async def test_an_idle_producer_makes_room_and_comes_back(far: KafkaFarSide, egress: Egress) -> None:
    pool = Producers(egress, max_live=3)
    many = [producer(pool, egress, far) for _ in range(8)]
    for one in many * 2:
        assert (await send(one)).verdict == "delivered"
        assert pool.live <= 3
    await until(lambda: far.connections <= 3)
    assert len(far.stored) == 16
    pool.close()
    await until(lambda: far.connections == 0)


async def test_where_all_are_busy_who_comes_is_tried_again_at_no_cost(far: KafkaFarSide, egress: Egress) -> None:
    pool = Producers(egress, max_live=2)
    first, second, third = (producer(pool, egress, far) for _ in range(3))
    await far.become(Mode.HANGS)
    busy = [asyncio.create_task(send(one)) for one in (first, second)]
    await asyncio.sleep(0.1)
    outcome = await send(third)
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "platform", "no_resources")
    pool.close()
    assert {(await one).code for one in busy} == {"closed"}


async def test_an_idle_producer_goes_after_a_while(far: KafkaFarSide, egress: Egress) -> None:
    pool = Producers(egress, idle_s=0.3)
    one = producer(pool, egress, far)
    await send(one)
    assert (pool.live, far.connections) == (1, 1)
    await until(lambda: (pool.live, far.connections) == (0, 0))
    assert (await send(one)).verdict == "delivered"
    pool.close()


# ---------------------------------------------------------------- tokens


def tokens(*answers: bytes) -> Receiver:
    waiting = list(answers)

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            assert request.headers["authorization"] == "Basic YWNtZTpzJTNFY3JldA=="
            assert request.body == b"grant_type=client_credentials&scope=kafka+write"
            content = waiting.pop(0)
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))

    return Receiver(script)


async def test_a_login_by_token_asks_for_one_through_the_door(far: KafkaFarSide, egress: Egress) -> None:
    long = "t" * 9000  # as some services make them: more than is kept of a webhook's answer
    far.tokens = {long}
    async with tokens(msgjson.encode({"access_token": long, "expires_in": 60})) as service:
        oauth = {
            "sasl": "oauthbearer",
            "token_url": f"http://127.0.0.1:{service.port}/token",
            "scope": "kafka write",
        }
        connector = sink(egress, far.options(), {"password": "s>cret"}, **oauth)
        assert [one.verdict for one in await deliver(connector, delivery(1))] == ["delivered"]
        await connector.close()


@pytest.mark.parametrize(
    "answer", [b"{}", b"<html>", b'{"access_token":"a\\u0001auth=Bearer b"}', b'{"access_token":7}']
)
async def test_what_is_no_token_is_never_sent(far: KafkaFarSide, egress: Egress, answer: bytes) -> None:
    async with tokens(answer) as service:
        url = f"http://127.0.0.1:{service.port}/token"
        oauth = {"sasl": "oauthbearer", "token_url": url, "scope": "kafka write"}
        connector = sink(egress, far.options(), {"password": "s>cret"}, **oauth)
        (outcome,) = await deliver(connector, delivery(1))
        assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", "token")
        assert far.logins == 0
        await connector.close()
