"""What a new owner of a stage partition finds in the cursor topic."""

import asyncio
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from dev.stack import Stack
from schemas.staged import CursorRecord, cursor_key, encode_cursor
from streams.cursor import load

pytestmark = [pytest.mark.broker]

OF = b"acme/bucket"


async def test_a_new_owner_waits_for_the_transaction_that_the_last_one_has_not_ended(stack: Stack) -> None:
    kafka = {"bootstrap.servers": stack.kafka_bootstrap}
    topic = f"cursor-{uuid4().hex[:8]}"
    admin = AdminClient(kafka)
    for made in admin.create_topics([NewTopic(topic, 1, 1)]).values():
        made.result()
    last_owner = Producer({**kafka, "transactional.id": topic})
    last_owner.init_transactions(20)
    for last in (1, 2):
        last_owner.begin_transaction()
        last_owner.produce(topic, encode_cursor(CursorRecord(last, "log")), cursor_key(0, OF), partition=0)
        last_owner.flush(20)
        if last == 1:
            last_owner.commit_transaction(20)
    loading = asyncio.create_task(asyncio.to_thread(load, kafka, [(topic, 0)]))
    await asyncio.wait([loading], timeout=2)
    last_owner.commit_transaction(20)
    assert (await loading)[topic, 0].cursors[OF].last == 2
