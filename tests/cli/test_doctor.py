"""`headgate doctor` on real Kafka and Redis: sound deployments pass, and each thing that is wrong is named."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from cli.doctor import acknowledgement_problem
from config.provision import settings_of
from schemas.ids import DEFAULT_VENDOR, Tag
from schemas.topics import TopicSpec
from tests.cli.shell import headgate, told
from tests.deployment import ROOT, Deployment, event, eventually, free_port

pytestmark = pytest.mark.broker

CANARY = "canary-5e1d"


async def checks(deployment: Deployment, **env: str | None) -> dict[str, dict[str, Any]]:
    """By name. Whether it says that all is well, and its exit, agree with them."""
    found = await headgate(deployment, "doctor", "--output", "json", **env)
    assert found.stdout, found.stderr
    answer = json.loads(found.stdout)
    failed = [one for one in answer["checks"] if one["status"] == "fail"]
    assert answer["ok"] == (not failed)
    assert found.exit_code == (1 if failed else 0), found.stderr
    assert all(one.get("do") for one in answer["checks"] if one["status"] == "warn"), answer
    return {one["name"]: one for one in answer["checks"]}


def statuses(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: one["status"] for name, one in found.items() if one["status"] != "ok"}


def alter(deployment: Deployment, topic: str, name: str, value: str) -> None:
    change = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[change])
    client = admin(deployment)
    for future in client.incremental_alter_configs([resource]).values():
        future.result()


def admin(deployment: Deployment) -> AdminClient:
    return AdminClient(deployment.settings.kafka.confluent())


async def test_a_sound_deployment_has_no_faults_and_the_check_leaves_nothing_behind(deployment: Deployment) -> None:
    secret = {"secrets": {"headers": {"X-Token": {"value": CANARY}}}}
    await deployment.apply({"tenants": [deployment.tenant("acme", **secret)]})
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    await deployment.all_committed()
    found = await checks(deployment)
    # what a machine of one's own is: one broker without an authorizer, a development key
    assert statuses(found) == {"replication": "warn", "development key": "warn", "acls": "warn"}
    assert "4.1 or newer" in found["broker"]["says"]
    assert found[f"group {deployment.prefix}.route"]["says"] == "1 worker; ingress: all settled"
    text = await headgate(deployment, "doctor")
    assert text.exit_code == 0
    assert len(text.stdout.splitlines()) == len(found)
    assert CANARY not in text.output
    assert f"{deployment.prefix}.doctor" not in admin(deployment).list_topics(timeout=10).topics


async def test_topics_that_lose_records_or_are_missing_fail_and_unknown_ones_are_told(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme"), deployment.tenant("beta")]})
    topics, tag = deployment.settings.topics, Tag("acme")
    before = await checks(deployment)
    assert not [one for one in before.values() if one["status"] == "fail"]
    assert "no worker runs" in before[f"group {deployment.prefix}.route"]["do"]
    retry = topics.retry(DEFAULT_VENDOR, tag)
    alter(deployment, retry, "retention.ms", str(10 * 86_400_000))  # 96 h and 7 days are 11
    alter(deployment, topics.audit(DEFAULT_VENDOR), "max.message.bytes", "1000000")
    alter(deployment, topics.attempts(DEFAULT_VENDOR), "retention.ms", "3600000")
    alter(deployment, topics.unrouted(DEFAULT_VENDOR), "retention.bytes", "1000000000")
    gone = topics.dead_letters(DEFAULT_VENDOR, Tag("beta"))
    client = admin(deployment)
    client.delete_topics([gone])[gone].result()
    stranger = topics.dead_letters(DEFAULT_VENDOR, Tag("nobody"))
    client.create_topics([NewTopic(stranger, 1, 1)])[stranger].result()
    await eventually(lambda: gone not in client.list_topics(timeout=10).topics, "the topic is gone")
    found = await checks(deployment)
    for name, status, topic in (
        ("topics", "fail", gone),
        ("retention of what waits", "fail", retry),
        ("record sizes", "fail", topics.audit(DEFAULT_VENDOR)),
        ("policies", "fail", topics.unrouted(DEFAULT_VENDOR)),
        ("retention", "warn", topics.attempts(DEFAULT_VENDOR)),
        ("leftover topics", "warn", stranger),
    ):
        assert (before[name]["status"], found[name]["status"]) == ("ok", status)
        assert topic in found[name]["says"]
    assert "10d, not 11d" in found["retention of what waits"]["says"]


@pytest.mark.parametrize(
    ("copies", "least", "problem"),
    [(3, 1, "alone"), (4, 1, "alone"), (3, 2, None), (1, 1, None), (2, 1, None), (1, 2, "stuck"), (3, -1, None)],
)
def test_of_three_copies_two_must_acknowledge(copies: int, least: int, problem: str | None) -> None:
    assert acknowledgement_problem(copies, least) == problem
    made = settings_of(TopicSpec("t", 1, {"retention.ms": "1"}), copies)
    assert made == {"retention.ms": "1", **({"min.insync.replicas": "2"} if copies >= 3 else {})}


async def test_a_topic_with_fewer_copies_than_must_acknowledge_fails(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    topic = deployment.settings.topics.ingress(DEFAULT_VENDOR)
    alter(deployment, topic, "min.insync.replicas", "2")
    found = (await checks(deployment))["acknowledgements"]
    assert (found["status"], found["says"]) == ("fail", f"{topic} has min.insync.replicas=2")


async def test_keys_that_do_not_open_are_named_by_tenant(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    foreign = deployment.folder / "foreign.key"
    foreign.write_text(f"k9:{base64.b64encode(bytes(32)).decode()}\n")
    assert (await checks(deployment))["keys"]["status"] == "ok"
    found = (await checks(deployment, HEADGATE_MASTER_KEY_FILE=str(foreign)))["keys"]
    assert found["status"] == "fail"
    assert "tenant 'acme': key 1" in found["says"]
    assert base64.b64encode(bytes(32)).decode() not in str(found)


@contextmanager
def evicting(url: str) -> Iterator[None]:
    client = redis.Redis.from_url(url)
    before = client.config_get("maxmemory-policy")
    try:
        client.config_set("maxmemory-policy", "allkeys-lru")
        yield
    finally:
        client.config_set("maxmemory-policy", before["maxmemory-policy"])
        client.close()


async def test_redis_that_is_away_fails_and_one_that_evicts_is_told(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    found = await checks(deployment)
    assert (found["redis"]["status"], found["redis memory"]["status"]) == ("ok", "ok")
    with evicting(deployment.env["HEADGATE_REDIS_URL"]):
        assert "allkeys-lru" in (await checks(deployment))["redis memory"]["says"]
    away = f"redis://:{CANARY}@127.0.0.1:{free_port()}/0"
    found = await checks(deployment, HEADGATE_REDIS_URL=away)
    assert found["redis"]["status"] == "fail"
    assert CANARY not in str(found)


async def test_records_that_retention_took_before_a_worker_did_fail(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await deployment.all_committed()
    group = f"group {deployment.prefix}.route"
    assert (await checks(deployment))[group]["status"] == "ok"
    assert await worker.terminate() == 0
    await deployment.publish([("acme", event(f"lost{n}")) for n in range(5)])
    waiting = (await checks(deployment))[group]
    assert waiting["status"] != "fail"
    assert "not settled: 5 records of ingress" in waiting["says"]
    topic = deployment.settings.topics.ingress(DEFAULT_VENDOR)
    (full,) = [number for number, end in deployment.ends(topic).items() if end]
    client = admin(deployment)
    for future in client.delete_records([TopicPartition(topic, full, 6)]).values():
        future.result()
    found = await told(deployment, "doctor")
    assert any(one["status"] == "fail" and f"{topic}/{full}: 5 records" in one["says"] for one in found["checks"])


def run_at(deployment: Deployment, seconds: float) -> str:
    """What the command says of the clock on a machine whose clock is off."""
    code = f"import time; right = time.time; time.time = lambda: right() + {seconds}; from cli.main import main; main()"
    env = {**deployment.env, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, "doctor"], env=env, capture_output=True, text=True, timeout=60)
    return next(line for line in done.stdout.splitlines() if " clock: " in line)


async def test_a_clock_that_is_off_is_told_with_how_much(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    assert run_at(deployment, 0).startswith("ok ")
    assert "5.0 s behind" in run_at(deployment, -5)
    assert run_at(deployment, 300).startswith("fail  clock: this machine's clock is 300.0 s ahead of")


async def test_a_broker_that_is_away_is_the_first_thing_told(deployment: Deployment) -> None:
    found = await checks(deployment, HEADGATE_KAFKA_BOOTSTRAP=f"127.0.0.1:{free_port()}")
    assert next(iter(found)) == "broker"
    assert found["broker"]["status"] == "fail"
    assert "HEADGATE_KAFKA_BOOTSTRAP" in found["broker"]["says"]
    assert found["redis"]["status"] == "ok"
