"""Headgate on a broker with passwords, TLS and an authorizer: each part with the rights of its role and no others.

What must work works; what a user must not do is refused by the broker, and each refusal has a control that shows that
it is the right which decides.
"""

import asyncio
import base64
import datetime
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cli.apply import apply_document
from cli.keys import shred_tenant
from config.acls import Acl, Role, stage_transactional_id
from config.kafka import KafkaFault, client_config
from config.provision import delete_topics, provision
from config.settings import Settings
from dev import broker, certificates, jars
from dev.inbox import ACCEPT, Refuse, fail_first
from dev.stack import Stack
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag, TenantRef, Vendor
from schemas.topics import tenant_topics
from tests.cli.shell import headgate
from tests.deployment import ROOT, Worker, event, eventually, free_port
from tests.secured.users import Secured

pytestmark = pytest.mark.broker

OPERATING = ROOT / "docs" / "operating.md"
REFUSED = "TOPIC_AUTHORIZATION_FAILED"


def write(kafka: dict[str, Any], *topics: str) -> dict[str, str]:
    """What the broker answers to a record, by topic: nothing, or the name of a refusal."""
    answers: dict[str, str] = {}
    producer = Producer(client_config({**kafka, "acks": "all", "message.timeout.ms": 20_000}))
    for topic in topics:
        try:
            producer.produce(
                topic,
                b"{}",
                b"k",
                on_delivery=lambda error, message: answers.update({message.topic(): error.name() if error else ""}),
            )
        except KafkaException as known:  # what it was told with the list of topics
            answers[topic] = str(known.args[0].name())
    producer.flush(30)
    return answers


def read(kafka: dict[str, Any], *topics: str) -> dict[str, str]:
    """What the broker answers to who reads the first partition, by topic: nothing, or the name of a refusal."""
    answers: dict[str, str] = {}
    consumer = Consumer(client_config({**kafka, "group.id": "none", "enable.partition.eof": True}))
    try:
        for topic in topics:
            listed = consumer.list_topics(topic, timeout=20).topics[topic]
            if listed.error is not None:  # not even to be seen
                answers[topic] = listed.error.name()
        consumer.assign([TopicPartition(topic, 0, 0) for topic in topics if topic not in answers])
        while answers.keys() < set(topics):
            message = consumer.poll(20)
            assert message is not None, f"nothing came of {set(topics) - answers.keys()}"
            error = message.error()
            if error is None or error.name() == "_PARTITION_EOF":
                answers[message.topic() or ""] = ""
            elif error.name() != "GROUP_AUTHORIZATION_FAILED":  # it joins none
                answers[message.topic() or ""] = error.name()
    finally:
        consumer.close()
    return answers


def begin(kafka: dict[str, Any], transactional_id: str) -> str:
    """What the broker answers to who takes a vendor's control plane over."""
    try:
        Producer(client_config({**kafka, "transactional.id": transactional_id})).init_transactions(20)
    except KafkaException as exception:
        return str(exception.args[0].name())
    return ""


def move(settings: Settings, tag: Tag, transactional_id: str) -> str:
    """What the broker answers to who reads a stage and its cursors, and commits a batch: nothing, or a refusal's name.

    What it commits is where it was, so that it can be done again.
    """
    kafka, topics = settings.kafka.confluent(), settings.topics
    stage, cursor = topics.stage(DEFAULT_VENDOR, tag), topics.stage_cursor(DEFAULT_VENDOR, tag)
    if refusal := next(filter(None, read(kafka, stage, cursor).values()), ""):
        return refusal
    group = {"group.id": topics.group("stage"), "auto.offset.reset": "earliest", "enable.auto.commit": False}
    consumer = Consumer(client_config({**kafka, **group}))
    producer = Producer(client_config({**kafka, "transactional.id": transactional_id}))
    try:
        producer.init_transactions(20)  # ends one that was refused midway
        consumer.subscribe([stage])
        message = consumer.poll(20)
        assert message is not None, "nothing came of the stage"
        if message.error() is not None:
            return str(message.error().name())
        producer.begin_transaction()
        producer.produce(cursor, b"{}", b"k")
        place = TopicPartition(stage, message.partition() or 0, message.offset() or 0)
        producer.send_offsets_to_transaction([place], consumer.consumer_group_metadata(), 20)
        producer.commit_transaction(20)
    except KafkaException as exception:
        return str(exception.args[0].name())
    finally:
        consumer.close()
    return ""


def log_of(worker: Worker) -> str:
    return worker.log.read_text()


async def stopped(worker: Worker) -> str:
    """The log of a worker that ends by itself, with a fault."""
    assert await worker.ended(60) == 1
    return log_of(worker)


# ---------------------------------------------------------------- what must work


async def test_each_part_does_its_work_with_the_rights_of_its_role_alone(secured: Secured) -> None:
    inbox = secured.inbox
    document = {
        "tenants": [
            {
                "externalId": "acme",
                "destinations": [
                    secured.webhook("good"),
                    secured.webhook("shaky", id="shaky", retry={"schedule": ["0s", "100ms"], "max_age": "1h"}),
                    secured.webhook("picky", id="picky"),
                ],
                "routes": [
                    {"id": "all", "match": {"types": ["order.*"]}, "to": ["hook", "shaky"]},
                    {"id": "refunds", "match": {"types": ["refund.*"]}, "to": ["picky"]},
                ],
            }
        ]
    }
    inbox.script("/shaky", fail_first(1))
    inbox.script("/picky", Refuse(400))
    await secured.apply(document)
    worker = await secured.worker()
    await secured.publish_as_producer(
        {"customerExternalId": "acme", **event("e1", "order.paid")},
        {"customerExternalId": "acme", **event("e2", "refund.made")},
        {"customerExternalId": "later", **event("e3", "order.paid")},
    )
    await inbox.wait_for("/good", 1, 30)
    await inbox.wait_for("/shaky", 1, 30)
    await inbox.wait_for("/picky", 1, 30, what="requests")
    await secured.all_committed()

    # the operator looks, traces and replays
    (letter,) = await secured.told("operator", "dlq", "list", "--tenant", "acme")
    shown = await secured.told("operator", "dlq", "show", letter["letter"], "--tenant", "acme")
    assert shown["content"]["eventId"] == "e2"
    trace = await secured.told("operator", "trace", "--tenant", "acme", "e1")
    assert {one["now"]["state"] for one in trace["events"][0]["deliveries"]} == {"delivered"}
    inbox.script("/picky", ACCEPT)
    await secured.told("operator", "dlq", "replay", "--tenant", "acme", "--wait")
    await inbox.wait_for("/picky", 1, 30)
    for user in ("operator", "worker"):
        found = await secured.told(user, "doctor")
        by_name = {check["name"]: check for check in found["checks"]}
        assert by_name["rights"]["status"] == "ok"
        assert user in by_name["rights"]["says"].rpartition(":")[2]
        assert by_name["tenants"]["says"] == "1 tenant, whole"

    # the control plane changes what there is, while the worker runs
    await secured.apply({"tenants": [*document["tenants"], secured.tenant("later", "later")]})
    await secured.told("operator", "dlq", "replay", "--unrouted", "--wait")
    await inbox.wait_for("/later", 1, 30)
    await secured.told("control", "secrets", "rotate", "--tenant", "acme", "--destination", "hook")
    await secured.told("control", "keys", "rotate", "--tenant", "acme")
    await secured.told("control", "keys", "rotate", "--master")
    await secured.told("control", "destinations", "disable", "--tenant", "acme", "picky")
    await secured.told("control", "destinations", "enable", "--tenant", "acme", "picky")

    # the broker is killed; and it ends what has not logged in anew after 4 s, as shared clusters do
    secured.stack.stop_kafka(kill=True)
    secured.stack.start_kafka()
    large = {**event("large", "order.paid"), "payload": {"text": "x" * 900_000}}  # many TLS records, one answer
    await secured.publish_as_producer(
        {"customerExternalId": "acme", **event("e4", "order.paid")}, {"customerExternalId": "acme", **large}
    )
    await inbox.wait_for("/good", 3, 60)
    await eventually(lambda: log_of(worker).count("KafkaConnectionError") > 3, "sessions have ended")
    assert inbox.stats().paths["/good"].requests == 3  # none twice

    # a static member comes back
    assert await worker.terminate() == 0
    again = await secured.worker()

    # settings that grow, and the end of a tenant
    larger = secured.as_user("control", RETRY_TIERS="1s,2s,3s,4s,5s,6s,7s,8s,9s", MAX_EVENT_BYTES="2MiB")
    apply_document(larger, msgspec.json.encode(document).decode(), prune=True)
    assert len(secured.ends(secured.settings.topics.retry(DEFAULT_VENDOR, Tag("acme")))) == 9
    later = TenantRef(DEFAULT_VENDOR, ExternalId("later"))
    shredded = shred_tenant(secured.as_user("control"), later, say=lambda _: None, agreed=lambda _: True)
    assert shredded is not None
    assert (shredded.state, len(shredded.topics)) == ("deleted", 2)
    assert await again.terminate() == 0


async def test_production_starts_on_the_secured_broker_and_refuses_a_key_for_development(secured: Secured) -> None:
    key = secured.folder / "master.key"
    key.write_text(f"k1:{base64.b64encode(os.urandom(32)).decode()}\n")
    safe = {
        "HEADGATE_ENV": "production",
        "HEADGATE_MASTER_KEY_FILE": str(key),
        "HEADGATE_REDIS_URL": f"unix://{secured.folder}/no-redis",  # it may be away
        "HEADGATE_REPLICATION_FACTOR": "1",
        "HEADGATE_EGRESS_ALLOW_IN_PRODUCTION": "1",
    }
    file = secured.folder / "tenants.json"
    file.write_bytes(msgspec.json.encode({"tenants": [secured.tenant("acme")]}))
    done = await secured.run("control", "apply", "-f", str(file), **safe)
    assert done.exit_code == 0, done.stderr
    await secured.worker("safe", **{name.removeprefix("HEADGATE_"): value for name, value in safe.items()})
    await secured.publish_as_producer({"customerExternalId": "acme", **event("e1")})
    await secured.inbox.wait_for("/acme", 1, 30)

    # and does not with any of these, whatever is run
    commands: dict[Role, list[str]] = {
        "worker": ["worker"],
        "control": ["apply", "-f", str(file)],
        "producer": ["publish", "-f", str(file)],
        "operator": ["get", "tenants"],
    }
    unsafe = {
        "HEADGATE_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
        "HEADGATE_REDIS_URL": secured.stack.redis_url,
        "HEADGATE_MASTER_KEY_FILE": str(secured.stack.master_key_file),
        "HEADGATE_EGRESS_ALLOW_IN_PRODUCTION": "",
    }
    for role, arguments in commands.items():
        for name, value in unsafe.items():
            refused = await secured.run(role, *arguments, **{**safe, name: value})
            assert refused.exit_code == 1
            assert name in refused.stderr
            assert "production" in refused.stderr


# ---------------------------------------------------------------- what a user must not do


async def test_what_a_role_does_not_do_is_refused_until_somebody_gives_it_the_right(secured: Secured) -> None:
    await secured.apply({"tenants": [secured.tenant("acme")]})
    topics, tag = secured.settings.topics, Tag("acme")
    ingress, attempts = topics.ingress(DEFAULT_VENDOR), topics.attempts(DEFAULT_VENDOR)
    retry, letters = topics.retry(DEFAULT_VENDOR, tag), topics.dead_letters(DEFAULT_VENDOR, tag)
    unrouted, audit = topics.unrouted(DEFAULT_VENDOR), topics.audit(DEFAULT_VENDOR)
    forbidden: dict[Role, dict[str, list[str]]] = {
        "worker": {"Write": [topics.control, topics.keys, ingress, audit], "Read": [letters, unrouted, attempts]},
        "producer": {
            "Write": [topics.control, topics.keys, topics.state, retry, letters, attempts],
            "Read": [ingress, topics.control, topics.keys, retry, letters, unrouted, attempts],
        },
        "operator": {"Write": [topics.control, topics.keys, topics.state, attempts], "Read": [audit]},
        "control": {"Write": [ingress, retry, letters, attempts], "Read": [ingress, retry, letters, attempts]},
    }
    for role, of_role in forbidden.items():
        kafka = secured.as_user(role).kafka.confluent()
        asked = [(write if what == "Write" else read, names) for what, names in of_role.items()]
        assert [act(kafka, *names) for act, names in asked] == [dict.fromkeys(names, REFUSED) for _, names in asked]
        given = [Acl("topic", name, "literal", what) for what, names in of_role.items() for name in names]  # type: ignore[arg-type]
        secured.give(role, *given)
        assert [act(kafka, *names) for act, names in asked] == [dict.fromkeys(names, "") for _, names in asked]
    take_over = f"{secured.prefix}.apply.default"
    for role in ("worker", "producer", "operator"):
        kafka = secured.as_user(role).kafka.confluent()
        assert begin(kafka, take_over) == "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"
    assert begin(secured.as_user("control").kafka.confluent(), take_over) == ""


async def test_batches_of_a_stage_are_committed_by_a_worker_with_each_of_its_rights_and_by_nobody_else(
    secured: Secured,
) -> None:
    topics, tag, sizes = secured.settings.topics, Tag("acme"), secured.settings.sizes
    await secured.apply({"tenants": [secured.tenant("acme")]})
    specs = [spec for spec in tenant_topics(topics, DEFAULT_VENDOR, tag, sizes, staged=True) if ".stage" in spec.name]
    control = secured.as_user("control").kafka.confluent()
    provision(control, specs, replication_factor=1, grow=frozenset(), say=lambda _: None)
    worker = secured.as_user("worker")
    stage, cursor = topics.stage(DEFAULT_VENDOR, tag), topics.stage_cursor(DEFAULT_VENDOR, tag)
    assert write(worker.kafka.confluent(), stage, cursor) == {stage: "", cursor: ""}
    mine = stage_transactional_id(topics, "w0")
    assert move(worker, tag, mine) == ""
    needed = [acl for acl in secured.rights("worker") if "stage" in acl.name]
    needed.remove(Acl("topic", topics.stage(DEFAULT_VENDOR, Tag("")), "prefixed", "Write"))  # the route agent's
    assert len(needed) == 5
    for acl in needed:
        secured.take("worker", acl)
        assert "AUTHORIZATION_FAILED" in move(worker, tag, mine), acl
        secured.give("worker", acl)
        assert move(worker, tag, mine) == "", acl  # the control
    # neither under the name of a control plane, nor under one that goes on where ours ends
    for foreign in (f"{secured.prefix}.apply.default", f"{secured.prefix}.stages.w0"):
        assert move(worker, tag, foreign) == "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"
    for role in ("producer", "operator", "control"):
        user = secured.as_user(role)  # type: ignore[arg-type]
        assert read(user.kafka.confluent(), stage, cursor) == {stage: REFUSED, cursor: REFUSED}
        assert write(user.kafka.confluent(), stage, cursor) == {stage: REFUSED, cursor: REFUSED}
        assert begin(user.kafka.confluent(), mine) == "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"
    with pytest.raises(KafkaFault, match=f"delete topic {re.escape(stage)}"):
        delete_topics(secured.as_user("operator").kafka.confluent(), [stage])
    assert set(delete_topics(control, [stage, cursor])) == {stage, cursor}


async def test_a_vendor_ends_at_its_name(stack: Stack) -> None:
    """Rights of `acme` are no rights of `acme2`, whatever the prefix looks like."""
    async with Secured.on(stack, HEADGATE_VENDORS="acme,acme2") as secured:
        assert isinstance(secured, Secured)
        for vendor in ("acme", "acme2"):
            await secured.apply({"vendor": vendor, "tenants": [secured.tenant("one")]})
        topics, tag = secured.settings.topics, Tag("one")
        acme, other = Vendor("acme"), Vendor("acme2")
        producer = secured.as_user("producer").kafka.confluent()
        mine, its = topics.ingress(acme), topics.ingress(other)
        assert write(producer, mine, its) == {mine: "", its: REFUSED}
        assert read(producer, mine) == {mine: REFUSED}
        # an operator of one vendor
        name = f"{secured.prefix}-acme"
        operator = Settings.load({**secured.env, **stack.add_user(name)}).kafka.confluent()
        given = await secured.told_as_admin(
            "acls", "--role", "operator", "--principal", f"User:{name}", "--vendor", "acme", "--apply"
        )
        assert given["added"]
        both = [[topics.dead_letters(v, tag), topics.retry(v, tag), topics.attempts(v)] for v in (acme, other)]
        assert read(operator, *both[0], *both[1]) == dict.fromkeys(both[0], "") | dict.fromkeys(both[1], REFUSED)
        assert write(operator, *both[1]) == dict.fromkeys(both[1], REFUSED)
        # the control: without the dot it would
        secured.give_to(name, Acl("topic", f"{secured.prefix}.acme", "prefixed", "Read"))
        assert read(operator, *both[1]) == dict.fromkeys(both[1], "")


# ---------------------------------------------------------------- what is said of it


async def test_a_refused_command_names_user_right_and_what_to_run(secured: Secured) -> None:
    file = secured.folder / "tenants.json"
    file.write_bytes(msgspec.json.encode({"tenants": [secured.tenant("acme")]}))
    lines = secured.folder / "events.ndjson"
    lines.write_bytes(msgspec.json.encode({"customerExternalId": "acme", **event("e1")}))
    commands: dict[str, tuple[Role, list[str]]] = {
        "control": ("operator", ["apply", "-f", str(file)]),
        "producer": ("worker", ["publish", "-f", str(lines)]),
        "operator": ("producer", ["dlq", "list", "--tenant", "acme"]),
    }
    await secured.apply({"tenants": [secured.tenant("acme")]})
    for needed, (has, arguments) in commands.items():
        refused = await secured.run(has, *arguments)
        assert refused.exit_code == 1
        assert isinstance(refused.exception, SystemExit)
        who = f"User:{secured.name(has)}"
        assert f"for {needed} {who} lacks" in refused.stderr
        remedy = f"headgate acls --role {needed} --principal {who} --apply"
        assert remedy in refused.stderr
        # what it says to run is what is needed
        await secured.told_as_admin(*remedy.split()[1:])
        done = await secured.run(has, *arguments)
        assert done.exit_code == 0, done.stderr


async def test_no_connection_without_the_password_and_the_right_authority(secured: Secured) -> None:
    await secured.apply({"tenants": []})
    wrong = {
        "Authentication failed": {"HEADGATE_KAFKA_SASL_PASSWORD": "canary-pw"},
        "certificate verify failed": {"HEADGATE_KAFKA_CA_FILE": str(another_authority(secured.folder))},
        "verify failed": {"HEADGATE_KAFKA_CA_FILE": str(expired_authority(secured.stack, secured.folder))},
    }
    for part, env in wrong.items():
        refused = await secured.run("operator", "get", "tenants", **env)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert isinstance(refused.exception, SystemExit)
        assert part in refused.stderr
        assert f"as User:{secured.name('operator')}" in refused.stderr
        assert "HEADGATE_KAFKA_SASL_…" in refused.stderr
        assert "canary-pw" not in refused.stderr
    log = await stopped(secured.launch("wrong", KAFKA_SASL_PASSWORD="canary-pw"))  # the worker says the same, and ends
    assert "Authentication failed" in log
    assert "canary-pw" not in log
    plain = AdminClient(client_config({"bootstrap.servers": secured.stack.kafka_bootstrap}))
    with pytest.raises(KafkaException):
        plain.list_topics(timeout=2)
    # the control: nothing but that was wrong
    assert (await secured.run("operator", "get", "tenants")).exit_code == 0


def another_authority(folder: Path) -> Path:
    certificates.make(folder / "another")
    return folder / "another" / certificates.AUTHORITY


def expired_authority(stack: Stack, folder: Path) -> Path:
    """The broker's own, as it was until yesterday."""
    key = load_pem_private_key((stack.kafka.tls / certificates.AUTHORITY_KEY).read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    path = folder / "expired.pem"
    path.write_bytes(certificates.authority(key, datetime.timedelta(days=-1)))
    return path


async def test_a_worker_that_lacks_rights_says_so_at_its_start_and_later_and_loses_nothing(secured: Secured) -> None:
    topics = secured.settings.topics
    of_topics = (
        Acl("topic", topics.ingress(DEFAULT_VENDOR), "literal", "Read"),
        Acl("topic", topics.retry(DEFAULT_VENDOR, Tag("")), "prefixed", "Write"),
        Acl("topic", topics.attempts(DEFAULT_VENDOR), "literal", "Write"),
    )
    of_group = Acl("group", topics.group("route"), "literal", "Read")
    retry = {"schedule": ["0s", "200ms", "200ms"], "max_age": "1h"}
    await secured.apply({"tenants": [secured.tenant("acme", retry=retry)]})
    secured.inbox.script("/acme", fail_first(1))
    secured.take("worker", *of_topics, of_group)
    log = await stopped(secured.launch("denied"))
    assert [right for right in (*of_topics, of_group) if str(right) not in log] == []
    assert f"headgate acls --role worker --principal User:{secured.name('worker')} --apply" in log
    assert "Traceback" not in log
    secured.give("worker", *of_topics, of_group)
    worker = await secured.worker()

    async def publish(name: str) -> None:
        await secured.publish_as_producer({"customerExternalId": "acme", **event(name)})

    def told(*rights: Acl) -> bool:
        status, body = worker.get("/readyz")
        return status == 503 and all(str(right) in body for right in rights) and "headgate acls" in body

    await publish("first")
    await secured.inbox.wait_for("/acme", 1, 30)
    secured.take("worker", *of_topics)
    await publish("without topics")
    await eventually(lambda: told(*of_topics), "it is told")
    secured.give("worker", *of_topics)
    await secured.inbox.wait_for("/acme", 2, 60)
    await worker.ready()

    secured.take("worker", of_group)
    await publish("without the group")
    await eventually(lambda: told(of_group), "it is told")
    secured.give("worker", of_group)
    await worker.ready()
    await publish("last")
    await secured.inbox.wait_for("/acme", 4, 60)
    await secured.all_committed()
    log = log_of(worker)
    assert log.count('"rights_lacking"') >= 2
    assert log.count('"rights_complete"') >= 2


async def test_rights_are_given_once_and_what_a_user_has_beside_them_is_named(secured: Secured) -> None:
    name = f"{secured.prefix}-billing"
    user = Settings.load({**secured.env, **secured.stack.add_user(name)}).kafka.confluent()
    await secured.apply({"tenants": [secured.tenant("acme")]})
    ingress = secured.settings.topics.ingress(DEFAULT_VENDOR)
    arguments = ["acls", "--role", "producer", "--principal", f"User:{name}"]
    assert (await headgate(secured, *arguments)).exit_code == 0
    assert write(user, ingress) == {ingress: REFUSED}  # printing gives nothing
    refused = await secured.run("control", *arguments, "--apply")
    assert refused.exit_code == 1
    assert f"User:{secured.name('control')}" in refused.stderr
    given = await headgate(secured, *arguments, "--apply")
    assert given.stdout == f"+ User:{name}: Write on topic {ingress}\n"
    assert write(user, ingress) == {ingress: ""}
    again = await secured.told_as_admin(*arguments, "--apply")
    assert (again["added"], again["others"]) == ([], [])
    beside = Acl("topic", f"{secured.prefix}.", "prefixed", "Read")
    secured.give_to(name, beside)
    told = await headgate(secured, *arguments, "--apply")
    assert told.stdout == ""
    assert f"--remove --force --allow-principal User:{name} --operation Read" in told.stderr
    assert f"--topic {secured.prefix}." in told.stderr


async def test_doctor_says_what_its_user_lacks_and_takes_what_it_may_not_see_for_nothing_else(secured: Secured) -> None:
    await secured.apply({"tenants": [secured.tenant("acme")]})
    right = Acl("topic", secured.settings.topics.retry(DEFAULT_VENDOR, Tag("")), "prefixed", "Read")
    secured.take("operator", right)
    done = await secured.run("operator", "doctor", "--output", "json")
    checks = {check["name"]: check for check in msgspec.json.decode(done.stdout)["checks"]}
    assert done.exit_code == 0  # as a producer it would do
    secured.take("operator", Acl("topic", secured.settings.topics.ingress(DEFAULT_VENDOR), "literal", "Write"))
    done = await secured.run("operator", "doctor", "--output", "json")
    checks = {check["name"]: check for check in msgspec.json.decode(done.stdout)["checks"]}
    assert done.exit_code == 1
    assert checks["rights"]["status"] == "fail"
    assert str(right) in checks["rights"]["says"]
    assert "headgate acls --role operator" in checks["rights"]["do"]
    # a user that sees no topic is not told that they are missing
    found = {one["name"]: one for one in (await secured.told("producer", "doctor"))["checks"]}
    assert "cannot see topic" in found["topics"]["says"]
    assert "cannot see topic" in found["tenants"]["says"]


# ---------------------------------------------------------------- the documentation


async def test_the_steps_of_the_documentation_set_a_broker_up(secured: Secured) -> None:
    """Its own lines, run; `kafka-configs.sh` is Kafka's, started from the jars of the embedded broker."""
    section = OPERATING.read_text().split("\n## A Kafka with users\n")[1].split("\n## ")[0]
    make, give, apply, work = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    tool = secured.folder / "kafka-configs.sh"
    kit = broker.prepare(jars.cache_dir(), lambda _: None)
    java = shlex.join(kit.command("kafka.admin.ConfigCommand", scratch=secured.folder))
    tool.write_text(f'#!/bin/sh\nexec {java} "$@"\n')
    tool.chmod(0o700)
    (secured.folder / "tenants.yaml").write_bytes(msgspec.json.encode({"tenants": [secured.tenant("acme")]}))
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")},
        **secured.env,
        "HEADGATE_HTTP_PORT": str(free_port()),
        "PATH": f"{secured.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(block: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=secured.folder, env=env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def set_up() -> None:
        assert "Completed updating config for user worker" in run(make)
        for name in ("control", "operator", "billing"):
            settings = secured.stack.add_user(name)
            (secured.folder / f"{name}.password").write_text(settings["HEADGATE_KAFKA_SASL_PASSWORD"])
        given = run(give)
        assert all(f"+ User:{name}: " in given for name in ("worker", "control", "operator", "billing"))
        assert run(give) == ""
        assert "acme/hook/signing" in run(apply)

    await asyncio.to_thread(set_up)
    worker = Worker(env, secured.folder / "worker.log", ["bash", "-c", f'cd "{secured.folder}"; exec env {work}'])
    secured.workers.append(worker)
    await worker.ready()
    assert await worker.terminate() == 0
