"""The topics of stage kinds on real Kafka: where they are made, how long they are kept, and when they end."""

from typing import Any

import pytest
from confluent_kafka.admin import NewTopic

from cli.keys import shred_tenant
from config.provision import topic_settings
from connectors.registry import KINDS
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag, TenantRef
from schemas.topics import DAY_MS, FEW
from tests.cli.test_doctor import admin, alter, checks
from tests.deployment import Deployment, eventually
from tests.files import SPEC

pytestmark = pytest.mark.broker


@pytest.fixture(autouse=True)
def kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, SPEC.kind, SPEC)  # type: ignore[arg-type]


def staged(external_id: str, **more: Any) -> dict[str, Any]:
    """A tenant with a destination of a stage kind."""
    destination = {"id": "store", "type": SPEC.kind, "options": SPEC.example["options"], **more}
    return {"externalId": external_id, "destinations": [destination]}


def partitions(deployment: Deployment) -> dict[str, int]:
    """How many the stages and their cursors have, by topic."""
    listed = admin(deployment).list_topics(timeout=10).topics
    start = f"{deployment.prefix}.{DEFAULT_VENDOR}.stage"
    return {name: len(topic.partitions) for name, topic in listed.items() if name.startswith(start)}


def names(deployment: Deployment, *tags: str) -> dict[str, int]:
    topics = deployment.settings.topics
    return {of(DEFAULT_VENDOR, Tag(tag)): FEW for tag in tags for of in (topics.stage, topics.stage_cursor)}


async def test_a_stage_is_made_for_whom_a_destination_needs_it_and_ends_with_its_tenant(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("one"), deployment.tenant("two")]})
    assert partitions(deployment) == {}
    await deployment.apply({"tenants": [staged("one"), deployment.tenant("two")]})
    assert partitions(deployment) == names(deployment, "one")
    await deployment.apply({"tenants": [staged("three", retry={"schedule": ["0s"], "max_age": "700h"})]})
    assert partitions(deployment) == names(deployment, "one", "three")
    stage = deployment.settings.topics.stage(DEFAULT_VENDOR, Tag("one"))
    longest = str(700 * 3_600_000 + 7 * DAY_MS)  # of anybody's
    kafka = deployment.settings.kafka.confluent()
    await eventually(lambda: topic_settings(kafka, stage)["retention.ms"] == longest, "the retention is raised")
    await deployment.apply({"tenants": [staged("one")]}, prune=True)
    three = TenantRef(DEFAULT_VENDOR, ExternalId("three"))
    shredded = shred_tenant(deployment.settings, three, say=lambda _: None, agreed=lambda _: True)
    assert shredded is not None
    assert set(names(deployment, "three")) < set(shredded.topics)
    await eventually(lambda: partitions(deployment) == names(deployment, "one"), "the topics are gone")


async def test_a_stage_never_gets_more_partitions_and_retries_do(deployment: Deployment) -> None:
    """What a destination has in one partition would go on in another, where its cursor is not."""
    topics, one = deployment.settings.topics, Tag("one")
    stage, retry = topics.stage(DEFAULT_VENDOR, one), topics.retry(DEFAULT_VENDOR, one)
    config = {"message.timestamp.type": "LogAppendTime"}
    client = admin(deployment)
    for future in client.create_topics([NewTopic(name, 2, 1, config=config) for name in (stage, retry)]).values():
        future.result()
    await eventually(lambda: stage in client.list_topics(timeout=10).topics, "the topic is there")
    await deployment.apply({"tenants": [staged("one")]})
    tiers = len(deployment.settings.sizes.retry_tiers_s)
    grown = lambda: len(client.list_topics(timeout=10).topics[retry].partitions) == tiers  # noqa: E731
    await eventually(grown, "retries have grown")  # the control
    assert partitions(deployment)[stage] == 2


async def test_a_stage_that_is_missing_or_loses_what_waits_in_it_fails_the_check(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [staged("one"), staged("two"), deployment.tenant("three")]})
    topics = deployment.settings.topics
    before = await checks(deployment)
    assert not [one for one in before.values() if one["status"] == "fail"]
    assert before["leftover topics"]["status"] == "ok"
    stage = topics.stage(DEFAULT_VENDOR, Tag("one"))
    cursor = topics.stage_cursor(DEFAULT_VENDOR, Tag("two"))
    alter(deployment, stage, "retention.ms", str(10 * DAY_MS))  # 96 h and 7 days are 11
    client = admin(deployment)
    client.delete_topics([cursor])[cursor].result()
    await eventually(lambda: cursor not in client.list_topics(timeout=10).topics, "the topic is gone")
    found = await checks(deployment)
    for name, topic in (("topics", cursor), ("retention of what waits", stage)):
        assert (before[name]["status"], found[name]["status"]) == ("ok", "fail")
        assert topic in found[name]["says"]
    # who has no such destination any more needs none, and what is there of one is no stranger's
    await deployment.apply({"tenants": [deployment.tenant("one"), deployment.tenant("two")]})
    after = await checks(deployment)
    assert (after["topics"]["status"], after["leftover topics"]["status"]) == ("ok", "ok")
    stranger = topics.stage(DEFAULT_VENDOR, Tag("nobody"))
    client.create_topics([NewTopic(stranger, 1, 1)])[stranger].result()
    await eventually(lambda: stranger in client.list_topics(timeout=10).topics, "the topic is there")
    assert stranger in (await checks(deployment))["leftover topics"]["says"]
