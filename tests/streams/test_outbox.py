"""The durable writer on a real broker: producers that fail for good, refused records, topics that are not there."""

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from streams.outbox import Letter, Outbox
from tests.deployment import Deployment, eventually

pytestmark = pytest.mark.broker

MAX_BYTES = 2_000_000


def make_topic(deployment: Deployment, name: str, **config: str) -> str:
    topic = f"{deployment.prefix}.{name}"
    admin = AdminClient(deployment.settings.kafka.confluent())
    wanted = NewTopic(topic, 1, 1, config={key.replace("_", "."): value for key, value in config.items()})
    admin.create_topics([wanted])[topic].result(10)
    return topic


def values(deployment: Deployment, topic: str) -> list[bytes | None]:
    return [record.value for record in deployment.read(topic)]


@pytest.fixture
def fail_for_good(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Gives every producer made from now on that lives a fatal error, by the library's own means; how many it gave."""
    folder = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    library = ctypes.CDLL(str(next(folder.glob("librdkafka*"))))
    library.rd_kafka_test_fatal_error.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p]
    made: list[Any] = []

    class Producer(confluent_kafka.Producer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(confluent_kafka, "Producer", Producer)

    def fail() -> int:
        given = 0
        for producer in made:
            handle = ctypes.c_void_p.from_address(id(producer) + object.__basicsize__).value  # what follows the head
            given += library.rd_kafka_test_fatal_error(handle, 47, b"as a test wants it") == 0
        made.clear()
        return given

    return fail


@pytest.fixture
async def outbox(deployment: Deployment) -> AsyncIterator[Outbox]:
    yield Outbox(deployment.settings.kafka.confluent(), MAX_BYTES)


async def test_a_batch_after_a_fatal_error_is_written_by_a_new_producer(
    deployment: Deployment, fail_for_good: Callable[[], int]
):
    topic = make_topic(deployment, "batches")
    outbox = Outbox(deployment.settings.kafka.confluent(), MAX_BYTES)
    await outbox.write_batch(topic, ["a"], [b"1"])
    assert fail_for_good() == 2
    async with asyncio.timeout(20):
        await outbox.write_batch(topic, ["a", "b"], [b"2", b"3"])
    assert await asyncio.to_thread(values, deployment, topic) == [b"1", b"2", b"3"]


async def test_single_records_after_a_fatal_error_are_written_once_by_a_new_producer(
    deployment: Deployment, fail_for_good: Callable[[], int]
):
    topic = make_topic(deployment, "letters")
    outbox = Outbox(deployment.settings.kafka.confluent(), MAX_BYTES)
    assert fail_for_good() == 2
    found: list[bool] = []
    for number in range(20):
        outbox.write(Letter(topic, b"k", b"%d" % number, (), lambda _letter, there: found.append(there)))
    assert await outbox.flushed(20)
    await asyncio.sleep(0.5)  # what would be written twice would come now
    assert found == [True] * 20
    assert sorted(await asyncio.to_thread(values, deployment, topic)) == sorted(b"%d" % n for n in range(20))


async def test_one_record_that_is_refused_again_and_again_does_not_look_like_a_broker_that_is_away(
    deployment: Deployment, outbox: Outbox
):
    topic = make_topic(deployment, "small", max_message_bytes="1000")
    outbox.write(Letter(topic, b"k", b"x" * 5000, (), lambda _letter, _there: None))
    longest = 0.0
    for _ in range(80):
        await asyncio.sleep(0.1)
        longest = max(longest, outbox.unacknowledged_for_s())
    assert outbox.unacknowledged_bytes > 0
    assert longest < 5.0  # what it takes for a broker that is away


async def test_what_is_refused_for_the_size_of_a_neighbour_in_its_batch_is_not_cut(
    deployment: Deployment, outbox: Outbox
):
    topic = make_topic(deployment, "edge", max_message_bytes="100000")
    whole = [bytes([65 + n]) * 70_000 for n in range(4)]
    for value in whole:  # each fits, any two in one batch do not
        outbox.write(Letter(topic, b"k", value, (), lambda _letter, _there: None))
    assert await outbox.flushed(30)
    assert sorted(await asyncio.to_thread(values, deployment, topic)) == whole


async def test_records_that_are_written_when_others_are_acknowledged_do_not_multiply_the_polling(
    deployment: Deployment, outbox: Outbox
):
    topic, small = make_topic(deployment, "chain"), make_topic(deployment, "small", max_message_bytes="1000")
    outbox.write(Letter(small, b"k", b"x" * 5000, (), lambda _letter, _there: None))  # keeps the outbox polling
    left = 50
    loop = asyncio.get_running_loop()

    def another(_letter: Letter, _there: bool) -> None:
        nonlocal left
        left -= 1
        if left > 0:
            outbox.write(Letter(topic, b"k", b"v", (), another))

    another(Letter(topic, b"", b"", (), another), True)
    await eventually(lambda: left == 0, "the chain ended", 30)
    timers = [timer for timer in loop._scheduled if not timer.cancelled() and "_poll" in repr(timer)]  # type: ignore[attr-defined]
    assert len(timers) <= 1


async def test_a_record_for_a_topic_that_is_not_there_is_told_so(deployment: Deployment, outbox: Outbox):
    told: list[bool] = []
    outbox.write(Letter(f"{deployment.prefix}.nowhere", b"k", b"v", (), lambda _letter, there: told.append(there)))
    assert await outbox.flushed(20)
    assert told == [False]
