"""The `headgate` command on real Kafka: what stands on stdout, what on stderr, the exit, and what the topics hold."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from cli.apply import Applied, apply_document
from cli.get import shown_options
from cli.main import command
from config.kafka import KafkaFault, read_to_end
from config.plan import Write
from config.registry import Registry, Tenant, open_secrets
from config.settings import Settings
from config.vault import MasterKeys
from config.writer import Fenced, Writer, read_current
from dev.stack import Stack
from schemas.attempt import PURPOSE_DELIVERY
from schemas.event import Event, canonical
from schemas.ids import DEFAULT_VENDOR, DeliveryId, DestinationId, EventId, ExternalId, Tag, TenantRef
from schemas.wire import Parked, parked_headers

pytestmark = pytest.mark.broker

CANARY = "canary-7f3a9c"
SIGNING = "whsec_" + "Y2FuYXJ5" * 4
ACME = ExternalId("acme")

CONFIGURATION = """\
tenants:
  - externalId: acme
    name: Acme Ltd
    destinations:
      - id: hook
        type: webhook
        options: {url: "https://hooks.acme.example/in?token=canary-7f3a9c"}
        secrets:
          signing: {env: ACME_SIGNING}
          headers: {X-Token: {env: ACME_TOKEN}}
    routes:
      - id: orders
        match: {types: ["order.*"], where: 'payload.total > 100'}
        to: [hook]
  - externalId: acme2
    topics: pooled
"""


class Shell:
    """One deployment on the stack, and `headgate` in its environment."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.env: dict[str, str] = {
            **stack.settings(),
            "HEADGATE_PREFIX": f"t{uuid.uuid4().hex[:12]}",
            "HEADGATE_POOLS": "1",
            "HEADGATE_INGRESS_PARTITIONS": "3",
            "ACME_SIGNING": SIGNING,
            "ACME_TOKEN": f"token-{CANARY}",
        }
        self.folder = folder

    @property
    def settings(self) -> Settings:
        return Settings.load(self.env)

    @property
    def kafka(self) -> dict[str, str]:
        return self.settings.kafka.confluent()

    def file(self, text: str, name: str = "headgate.yaml") -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def run(self, *args: str, stdin: str | bytes = "", env: Mapping[str, str | None] | None = None) -> Result:
        """In this process: the same code, no start-up."""
        return CliRunner().invoke(command, args, input=stdin, env={**self.env, **(env or {})})

    def process(
        self,
        *args: str,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        then: str = "pass",
        shell: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """As a process, through the console script's function; `then` runs at its end. `shell`: of sh instead."""
        code = f"import atexit; atexit.register(lambda: exec({then!r})); from cli.main import main; main()"
        return subprocess.run(
            ["/bin/sh", *args] if shell else [sys.executable, "-c", code, *args],
            input=stdin,
            capture_output=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), **(self.env if env is None else env)},
            timeout=60,
        )

    def apply(self, text: str = CONFIGURATION, **more: bool) -> Applied:
        return apply_document(self.settings, text, env=self.env, **more)

    def tenant(self, name: ExternalId) -> Tenant:
        """The tenant as a worker's registry has it."""
        settings = self.settings
        registry = Registry(MasterKeys.load(settings.keys), settings.topics)
        names = [settings.topics.keys, settings.topics.control, settings.topics.state]
        for message in read_to_end(self.kafka, names, "test"):
            registry.fold(message.topic() or "", message.key() or b"", message.value())
        tenant = registry.tenant(TenantRef(DEFAULT_VENDOR, name))
        assert tenant is not None
        return tenant

    def records(self, topic: str) -> list[tuple[bytes | None, bytes | None]]:
        return [(message.key(), message.value()) for message in read_to_end(self.kafka, [topic], "test")]


@pytest.fixture
def shell(stack: Stack, tmp_path: Path) -> Shell:
    return Shell(stack, tmp_path)


# ---------------------------------------------------------------- apply


def test_apply_makes_topics_and_tenants_and_says_so_once(shell: Shell) -> None:
    file = shell.file(CONFIGURATION)
    first = shell.run("apply", "-f", file)
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines() == [
        "+ tenant acme: slug acme, topics acme",
        "+ destination acme/hook: webhook",
        "+ secret acme/hook/headers.X-Token",
        "+ secret acme/hook/signing",
        "+ route acme/orders",
        "+ tenant acme2: slug acme2, topics pool-00",
    ]
    tenant = shell.tenant(ACME)
    (hook,) = tenant.destinations.values()
    assert open_secrets(tenant, hook, 0) == {"signing": [SIGNING], "headers.X-Token": [f"token-{CANARY}"]}
    again = shell.run("apply", "-f", file)
    assert (again.exit_code, again.stdout, again.stderr) == (0, "", "no changes\n")


def test_topics_are_as_the_design_wants_them(shell: Shell) -> None:
    shell.apply()
    prefix = shell.settings.topics.prefix
    admin = AdminClient(shell.kafka)
    listed = {
        name.removeprefix(prefix + "."): len(topic.partitions)
        for name, topic in admin.list_topics(timeout=10).topics.items()
        if name.startswith(prefix + ".")
    }
    assert listed == {
        "control": 1,
        "keys": 1,
        "state": 1,
        "default.ingress": 3,
        "default.attempts": 4,
        "default.audit": 4,
        "default.dlq.unrouted": 4,
        "default.retry.acme": 7,
        "default.dlq.acme": 4,
        "default.retry.pool-00": 7,
        "default.dlq.pool-00": 4,
    }
    for name in ("control", "keys", "state"):
        assert setting(shell, f"{prefix}.{name}", "cleanup.policy") == "compact"
    assert setting(shell, f"{prefix}.default.retry.acme", "message.timestamp.type") == "LogAppendTime"


def setting(shell: Shell, topic: str, name: str) -> str:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    admin = AdminClient(shell.kafka)  # its futures fail once it is gone
    (future,) = admin.describe_configs([resource]).values()
    return str(future.result()[name].value)


def test_a_dry_run_touches_nothing(shell: Shell) -> None:
    result = shell.run("apply", "-f", shell.file(CONFIGURATION), "--dry-run")
    assert result.exit_code == 0
    assert "+ tenant acme" in result.stdout
    assert "nothing was touched" in result.stderr
    topics = AdminClient(shell.kafka).list_topics(timeout=10).topics
    assert not [name for name in topics if name.startswith(shell.settings.topics.prefix)]


def test_a_faulty_file_applies_nothing_and_names_every_place(shell: Shell) -> None:
    text = CONFIGURATION.replace("to: [hook]", "to: [hok]").replace("externalId: acme2", "externalId: 7")
    result = shell.run("apply", "-f", shell.file(text))
    assert (result.exit_code, result.stdout) == (1, "")
    file = shell.folder / "headgate.yaml"
    assert result.stderr.splitlines() == [
        f"Error: {file}:14:14: tenants[0].routes[0].to[0]: 'hok' is no destination of this tenant; did you mean hook?",
        f'{file}:15:17: tenants[1].externalId: is a number, not a text; write it in quotes: "7"',
    ]
    topics = AdminClient(shell.kafka).list_topics(timeout=10).topics
    assert not [name for name in topics if name.startswith(shell.settings.topics.prefix)]


@pytest.mark.parametrize(
    ("url", "allow", "why"),
    [
        ("http://hooks.acme.example/in", "", "http is refused: use https"),
        ("http://93.184.216.34/in", "10.0.0.0/8", "http is refused: use https"),
        ("https://0x7f.1/in", "10.0.0.0/8", "the address 127.0.0.1 is not public"),
        # the controls: what may be reached, or only a look-up can tell
        ("https://hooks.acme.example/in", "", None),
        ("https://127.0.0.1/in", "127.0.0.0/8", None),
        ("http://127.0.0.1:8000/in", "127.0.0.0/8", None),
        ("http://hooks.acme.example/in", "10.0.0.0/8", None),
    ],
)
def test_apply_warns_of_what_the_guard_will_refuse_and_applies_it(
    shell: Shell, url: str, allow: str, why: str | None
) -> None:
    file = shell.file(CONFIGURATION.replace("https://hooks.acme.example/in?token=canary-7f3a9c", url))
    result = shell.run("apply", "-f", file, "--dry-run", env={"HEADGATE_EGRESS_ALLOW": allow})
    assert (result.exit_code, "+ destination acme/hook" in result.stdout) == (0, True)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    if why is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(f"warning: {file}:7:24: tenants[0].destinations[0].options.url: {why}")
        assert warning.endswith("unless HEADGATE_EGRESS_ALLOW of the workers, unlike the one here, covers it")


def test_made_secrets_are_shown_once_and_only_when_they_are_in_force(shell: Shell) -> None:
    text = CONFIGURATION.replace("          signing: {env: ACME_SIGNING}\n", "")
    planned = shell.run("apply", "-f", "-", "--dry-run", "--output", "json", stdin=text)
    assert json.loads(planned.stdout)["secrets"] == []
    result = shell.run("apply", "-f", "-", "--output", "json", stdin=text)
    (made,) = json.loads(result.stdout)["secrets"]
    assert (made["tenant"], made["destination"], made["field"]) == ("acme", "hook", "signing")
    tenant = shell.tenant(ACME)
    assert open_secrets(tenant, next(iter(tenant.destinations.values())), 0)["signing"] == [made["value"]]
    again = shell.run("apply", "-f", "-", "--output", "json", stdin=text)
    assert json.loads(again.stdout)["secrets"] == []


@pytest.mark.parametrize("using", [["apply", "-f", "-"], ["keys", "rotate", "--tenant", "acme"]])
def test_a_master_key_that_wraps_for_the_first_time_is_warned_of(shell: Shell, using: list[str]) -> None:
    more = CONFIGURATION + "  - externalId: globex\n"
    key = base64.b64encode(os.urandom(32)).decode()
    both = shell.file(f"new:{key}\n{Path(shell.env['HEADGATE_MASTER_KEY_FILE']).read_text()}", "both.key")
    warning = "new has wrapped no key so far: a worker whose master key file lacks it ends"
    # the controls: the first keys of all, and a change that wraps none
    assert warning not in shell.run("apply", "-f", "-", stdin=CONFIGURATION).stderr
    env = {"HEADGATE_MASTER_KEY_FILE": both}
    renamed = shell.run("apply", "-f", "-", stdin=CONFIGURATION.replace("Acme Ltd", "Acme"), env=env)
    assert (renamed.exit_code, warning in renamed.stderr) == (0, False)
    planned = shell.run("apply", "-f", "-", "--dry-run", stdin=more, env=env)
    used = shell.run(*using, stdin=more, env=env)
    assert (used.exit_code, warning in planned.stderr, warning in used.stderr) == (0, True, True), used.stderr
    # and once it is in use no more
    again = shell.run("apply", "-f", "-", stdin=more + "  - externalId: hooli\n", env=env)
    assert (again.exit_code, warning in again.stderr) == (0, False)


def test_pruning_asks_and_without_a_terminal_wants_a_yes(shell: Shell) -> None:
    shell.apply()
    only = "tenants: [{externalId: acme2}]"
    kept = shell.run("apply", "-f", shell.file(only))
    assert (kept.exit_code, kept.stderr) == (0, "no changes\n")
    refused = shell.run("apply", "-f", shell.file(only), "--prune")
    assert refused.exit_code == 1
    assert "this removes 1 tenant: acme; add --yes to do it" in refused.stderr
    assert shell.tenant(ACME).state == "active"
    pruned = shell.run("apply", "-f", shell.file(only), "--prune", "--yes")
    assert pruned.exit_code == 0
    assert shell.tenant(ACME).state == "removed"


def test_of_two_writers_the_later_one_wins_and_the_first_writes_nothing(shell: Shell) -> None:
    shell.apply()
    topics = shell.settings.topics
    with Writer(shell.kafka, topics, DEFAULT_VENDOR) as first:
        first.current()
        shell.apply(CONFIGURATION.replace("Acme Ltd", "Second"))
        before = shell.records(topics.control)
        with pytest.raises(Fenced, match="another change of vendor default by `headgate` began after this one"):
            first.write([Write("control", b"tenant/default/acme/", b"{}")], 1_000_000)
    assert shell.records(topics.control) == before
    assert shell.tenant(ACME).name == "Second"
    # the control: with nobody in between the same write is made
    with Writer(shell.kafka, topics, DEFAULT_VENDOR) as alone:
        alone.write([Write("control", b"note/default/acme/x", b"{}")], 1_000_000)
    assert len(shell.records(topics.control)) == len(before) + 1


def test_an_apply_is_seen_whole_or_not_at_all(shell: Shell) -> None:
    """A read-committed reader never holds a state between two applies."""
    shell.apply()
    topics = shell.settings.topics
    registry = Registry(MasterKeys.load(shell.settings.keys), topics)
    seen: set[tuple[str, int]] = set()
    done = threading.Event()

    def follow() -> None:
        consumer = Consumer({**shell.kafka, "group.id": "t", "isolation.level": "read_committed"})
        names = (topics.control, topics.keys, topics.state)
        consumer.assign([TopicPartition(name, 0, 0) for name in names])
        while not done.is_set():
            for message in consumer.consume(100, 0.1):
                if message.error() is None:
                    registry.fold(message.topic() or "", message.key() or b"", message.value())
                    tenant = registry.tenant(TenantRef(DEFAULT_VENDOR, ACME))
                    if tenant is not None:
                        seen.add((tenant.name, len(tenant.destinations)))
        consumer.close()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        second = CONFIGURATION.replace("Acme Ltd", "Two").replace(
            "    routes:\n",
            "      - {id: two, type: webhook, options: {url: 'https://b.example/'}}\n    routes:\n",
            1,
        )
        for _ in range(3):
            shell.apply(second)
            shell.apply()
        deadline = time.monotonic() + 10
        while ("Two", 2) not in seen and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        done.set()
        thread.join()
    assert seen == {("Acme Ltd", 1), ("Two", 2)}


def test_a_thousand_pooled_tenants_apply_in_ten_seconds(shell: Shell) -> None:
    text = "tenants:\n" + "".join(
        f"""\
  - externalId: tenant-{number}
    topics: pooled
    destinations:
      - id: hook
        type: webhook
        options: {{url: "https://h{number}.example/in"}}
    routes:
      - id: all
        match: {{types: ["order.*"], where: 'payload.total > {number}'}}
        to: [hook]
"""
        for number in range(1000)
    )
    applied = shell.apply(text)
    assert len(applied.plan.lines) == 4000
    assert applied.took_s < 10
    assert len(read_current(shell.kafka, shell.settings.topics, DEFAULT_VENDOR).tenants) == 1000
    assert not shell.apply(text).written


def test_topics_that_are_too_small_are_raised_and_wrong_ones_refused(shell: Shell) -> None:
    topics = shell.settings.topics
    retry = topics.retry(DEFAULT_VENDOR, Tag("acme"))
    shell.env["HEADGATE_RETRY_TIERS"] = "1s,5s"
    shell.apply()
    shell.env["HEADGATE_RETRY_TIERS"] = "1s,5s,30s"
    long = CONFIGURATION.replace('7f3a9c"}', '7f3a9c"}\n        retry: {schedule: [0s], max_age: 700h}')
    said: list[str] = []
    apply_document(shell.settings, long, env=shell.env, say=said.append)
    assert f"topic {retry}: raised to 3 partitions" in said
    assert setting(shell, retry, "retention.ms") == str((700 + 7 * 24) * 3_600_000)
    wrong = topics.dead_letters(DEFAULT_VENDOR, Tag("late"))
    admin = AdminClient(shell.kafka)
    (future,) = admin.create_topics([NewTopic(wrong, 1, 1, config={"cleanup.policy": "compact"})]).values()
    future.result()
    with pytest.raises(KafkaFault, match=f"topic {wrong} has cleanup.policy=compact, but Headgate relies on delete"):
        shell.apply("tenants: [{externalId: late}]")
    assert "late" not in read_current(shell.kafka, topics, DEFAULT_VENDOR).tenants


# ---------------------------------------------------------------- get


def test_get_shows_no_secret_and_no_query(shell: Shell) -> None:
    shell.apply()
    for what in ("tenants", "destinations", "routes"):
        for output in ("text", "json"):
            result = shell.run("get", what, "--output", output)
            assert result.exit_code == 0, result.output
            assert "acme" in result.stdout
            assert "canary" not in result.output
            assert SIGNING not in result.output
    (row,) = json.loads(shell.run("get", "destinations", "--tenant", "acme", "--output", "json").stdout)
    assert row["options"] == {"url": "https://hooks.acme.example/in?…"}
    assert row["secrets"] == {"signing": 1, "headers.X-Token": 1}
    assert row["state"] == "on"


def test_get_shows_what_is_not_set_as_not_set(shell: Shell) -> None:
    shell.apply()
    destinations = shell.run("get", "destinations").stdout
    assert "inFlight=16" in destinations
    assert "ratePerS" not in destinations
    header, row = shell.run("get", "routes", "--tenant", "acme").stdout.splitlines()
    assert row[header.index("REDACT") :].split() == ["-", "1"]


def test_get_names_a_tenant_that_is_not_there(shell: Shell) -> None:
    shell.apply()
    result = shell.run("get", "routes", "--tenant", "nobody")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "vendor default has no tenant 'nobody'" in result.stderr


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://a.example/x?k=v#f", "https://a.example/x?…"),
        ("https://a.example/x", "https://a.example/x"),
        (["https://a.example/?a\nb"], ["https://a.example/?…"]),
        ({"url": "http://a/?q"}, {"url": "http://a/?…"}),
        ("what?", "what?"),
        (3, 3),
    ],
)
def test_queries_of_urls_are_hidden(given: object, shown: object) -> None:
    assert shown_options(given) == shown


# ---------------------------------------------------------------- publish


def line(number: int, **more: object) -> str:
    event = {"customerExternalId": "acme", "eventType": "order.paid", "payload": {"n": number}, **more}
    return json.dumps(event)


def test_publish_sends_each_line_as_it_stands_keyed_by_its_tenant(shell: Shell) -> None:
    shell.apply()
    odd = '{"payload":{"n":1.10e2},"eventType":"order.paid","customerExternalId":"ünï"}'
    result = shell.run("publish", "-f", shell.file(f"\ufeff{line(1)}\r\n\n{odd}\n", "events.ndjson"))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 events published (")
    found = dict(shell.records(shell.settings.topics.ingress(DEFAULT_VENDOR)))
    assert found == {b"acme": line(1).encode(), "ünï".encode(): odd.encode()}


def test_a_file_with_a_bad_line_is_not_sent_at_all_unless_told_to(shell: Shell) -> None:
    shell.apply()
    topic = shell.settings.topics.ingress(DEFAULT_VENDOR)
    bad = [line(1), "{", line(2), '{"eventType": "x", "payload": 1}', line(3, customerExternalId="\t")]
    file = shell.file("\n".join(bad), "events.ndjson")
    refused = shell.run("publish", "-f", file)
    assert (refused.exit_code, refused.stdout) == (1, "")
    told = refused.stderr.splitlines()
    assert [one.split(": ")[0] for one in told[:3]] == [f"{file}:2", f"{file}:4", f"{file}:5"]
    assert told[-1] == "Error: 3 bad lines: nothing was sent (--skip-bad sends the others)"
    assert shell.records(topic) == []
    sent = shell.run("publish", "-f", file, "--skip-bad", "--output", "json")
    assert sent.exit_code == 0
    found = json.loads(sent.stdout)
    assert (found["published"], found["skipped"]) == (2, 3)
    assert sorted(value or b"" for _, value in shell.records(topic)) == [line(1).encode(), line(2).encode()]


def test_a_stream_stops_at_its_first_bad_line_and_says_how_many_were_sent(shell: Shell) -> None:
    shell.apply()
    stream = "\n".join([line(1), line(2), "{", line(3)]).encode()
    result = shell.process("publish", "-f", "-", stdin=stream)
    assert result.returncode == 1
    assert result.stdout.startswith(b"2 events published")
    assert b"stdin:3: " in result.stderr
    assert b"stopped there; published before it: 2 events" in result.stderr
    assert len(shell.records(shell.settings.topics.ingress(DEFAULT_VENDOR))) == 2


def test_publish_keeps_to_its_rate(shell: Shell) -> None:
    shell.apply()
    result = shell.run(
        "publish", "-f", "-", "--rate", "50/s", "--output", "json", stdin="\n".join(map(line, range(26)))
    )
    assert json.loads(result.stdout)["published"] == 26
    assert json.loads(result.stdout)["seconds"] >= 0.5


def test_a_tenant_can_be_named_for_lines_that_do_not(shell: Shell) -> None:
    shell.apply()
    plain = '{"eventType": "x", "payload": 1}'
    assert shell.run("publish", "-f", "-", "--tenant", "acme", stdin=plain).exit_code == 0
    other = shell.run("publish", "-f", "-", "--tenant", "acme2", stdin=line(1))
    assert other.exit_code == 1
    assert "stdin:1: field customerExternalId: differs from --tenant" in other.stderr
    assert shell.records(shell.settings.topics.ingress(DEFAULT_VENDOR)) == [(b"acme", plain.encode())]


def test_publish_says_which_events_went_to_no_tenant_where_it_may_know(shell: Shell) -> None:
    shell.apply()
    shell.apply("tenants: [{externalId: acme}]", prune=True)  # acme2 is removed
    lines = [line(1), line(2, customerExternalId="acme2"), *(line(n, customerExternalId="nobody") for n in (3, 4))]
    found = shell.run("publish", "-f", "-", "--output", "json", stdin="\n".join(lines))
    told = json.loads(found.stdout)
    assert (found.exit_code, told["published"], told["unknownTenant"]) == (0, 4, 3)
    assert "warning: vendor default has no active tenant acme2, nobody: 3 events will not be delivered" in found.stderr
    assert "`headgate dlq replay --unrouted --error unknown_tenant`" in found.stderr
    theirs = {"HEADGATE_VENDORS": "default,north"}
    assert shell.run("apply", "-f", "-", stdin="vendor: north\ntenants: []", env=theirs).exit_code == 0
    found = shell.run("publish", "-f", "-", "--vendor", "north", stdin=line(1), env=theirs)
    assert "`headgate dlq replay --unrouted --vendor north --error unknown_tenant`" in found.stderr
    # the controls: a tenant that there is, and a user who is shown ingress alone
    well = shell.run("publish", "-f", "-", "--output", "json", stdin=line(1))
    assert (json.loads(well.stdout)["unknownTenant"], "no active tenant" in well.stderr) == (0, False)
    other = f"{shell.settings.topics.prefix}x"
    admin = AdminClient(shell.kafka)
    admin.create_topics([NewTopic(f"{other}.default.ingress", 1)])[f"{other}.default.ingress"].result()
    env = {"HEADGATE_PREFIX": other}
    silent = shell.run("publish", "-f", "-", "--output", "json", stdin="\n".join(lines), env=env)
    assert (silent.exit_code, json.loads(silent.stdout)["unknownTenant"]) == (0, None)
    assert "no active tenant" not in silent.stderr


def test_publishing_before_anything_is_configured_names_the_remedy(shell: Shell) -> None:
    result = shell.run("publish", "-f", "-", stdin=line(1))
    assert result.exit_code == 1
    assert "does not exist: vendor default has no configuration yet; run `headgate apply` first" in result.stderr


# ---------------------------------------------------------------- dlq


class Letters:
    """Writes dead letters as the worker does."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._producer = Producer({**shell.kafka, "linger.ms": 0})

    def write(
        self, tenant: str, number: int, *, error: str = "timeout", tag: str = "pool-00", at_ms: int | None = None
    ) -> str:
        """One letter; its id."""
        ref = TenantRef(DEFAULT_VENDOR, ExternalId(tenant))
        event = Event("order.paid", msgspec.Raw(b'{"total":1.50}'), f"evt_{number}", "2026-11-21T09:30:00Z", tenant)
        parked = Parked(
            ref, DestinationId("hook"), DeliveryId(f"dlv_{number}"), EventId(f"evt_{number}"), "order.paid",
            3, 4, 0, 0, "in/0/1", error, "destination", "no answer", 1_700_000_000_000, "",
        )  # fmt: skip
        vault = self._shell.tenant(ref.tenant).vault
        sealed = vault.seal(PURPOSE_DELIVERY, "hook", f"dlv_{number}", canonical(event))
        return self.send(tag, sealed, parked_headers(parked), at_ms)

    def mark(self, letter: str, tag: str = "pool-00") -> None:
        self.send(tag, b"", [("hg-mark", b"replayed"), ("hg-letter", letter.encode()), ("hg-replay", b"r1")])

    def send(
        self, tag: str, value: bytes, headers: list[tuple[str, bytes | None]] | list[tuple[str, bytes]],
        at_ms: int | None = None,
    ) -> str:  # fmt: skip
        topic = self._shell.settings.topics.dead_letters(DEFAULT_VENDOR, Tag(tag))
        places: list[str] = []
        self._producer.produce(
            topic, value, b"acme/hook", partition=0, headers=list(headers), timestamp=at_ms or int(time.time() * 1000),
            on_delivery=lambda error, message: places.append(f"{message.partition()}/{message.offset()}"),
        )  # fmt: skip
        self._producer.flush(10)
        return places[0]


@pytest.fixture
def pooled(shell: Shell) -> Shell:
    shell.apply("tenants: [{externalId: acme, topics: pooled}, {externalId: acme2, topics: pooled}]")
    return shell


def listed(shell: Shell, *args: str) -> list[str]:
    result = shell.run("dlq", "list", "--output", "json", *args)
    assert result.exit_code == 0, result.output
    return [letter.get("event", letter["letter"]) for letter in json.loads(result.stdout)]


def test_dlq_list_shows_one_tenant_s_letters_only(pooled: Shell) -> None:
    letters = Letters(pooled)
    letters.write("acme", 1)
    letters.write("acme2", 2)
    letters.write("acme", 3, error="gone")
    assert listed(pooled, "--tenant", "acme") == ["evt_1", "evt_3"]
    assert listed(pooled, "--tenant", "acme2") == ["evt_2"]
    assert listed(pooled, "--tenant", "acme", "--error", "gone") == ["evt_3"]
    assert listed(pooled, "--tenant", "acme", "--destination", "other") == []
    assert listed(pooled, "--tenant", "acme", "--limit", "1") == ["evt_3"]
    text = pooled.run("dlq", "list", "--tenant", "acme")
    assert text.stdout.splitlines()[0].split() == [
        "LETTER", "AT", "DESTINATION", "TYPE", "EVENT", "ERROR", "ATTEMPTS", "DETAIL",
    ]  # fmt: skip


def test_dlq_list_hides_what_was_replayed_unless_asked_for_all(pooled: Shell) -> None:
    letters = Letters(pooled)
    first = letters.write("acme", 1)
    letters.write("acme", 2)
    assert listed(pooled, "--tenant", "acme") == ["evt_1", "evt_2"]
    letters.mark(first)
    assert listed(pooled, "--tenant", "acme") == ["evt_2"]
    assert listed(pooled, "--tenant", "acme", "--all") == ["evt_1", "evt_2"]


def test_dlq_list_by_time(pooled: Shell) -> None:
    letters = Letters(pooled)
    now_ms = int(time.time() * 1000)
    letters.write("acme", 1, at_ms=now_ms - 3 * 3_600_000)
    letters.write("acme", 2, at_ms=now_ms - 60_000)
    assert listed(pooled, "--tenant", "acme", "--since", "2h") == ["evt_2"]
    assert listed(pooled, "--tenant", "acme", "--until", "2h") == ["evt_1"]
    assert listed(pooled, "--tenant", "acme", "--since", "2020-01-01T00:00:00Z") == ["evt_1", "evt_2"]


def test_dlq_show_opens_the_event_of_its_own_tenant_only(pooled: Shell) -> None:
    letter = Letters(pooled).write("acme", 1)
    result = pooled.run("dlq", "show", letter, "--tenant", "acme", "--output", "json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["content"]["payload"] == {"total": 1.5}
    assert shown["error"] == "timeout"
    assert '"total": 1.50' in result.stdout  # numbers keep their digits
    assert '"total": 1.50' in pooled.run("dlq", "show", letter, "--tenant", "acme").stdout
    other = pooled.run("dlq", "show", letter, "--tenant", "acme2")
    assert (other.exit_code, other.stdout) == (1, "")
    assert f"there is no letter {letter} of tenant 'acme2'" in other.stderr


def test_a_letter_that_another_tenant_sealed_does_not_open(pooled: Shell) -> None:
    """Headers can be forged by who can write to the topic; the seal cannot."""
    letters = Letters(pooled)
    stolen = pooled.tenant(ExternalId("acme2")).vault.seal(PURPOSE_DELIVERY, "hook", "dlv_9", b"{}")
    first = letters.write("acme", 9)
    headers = next(
        message.headers() or []
        for message in read_to_end(
            pooled.kafka, [pooled.settings.topics.dead_letters(DEFAULT_VENDOR, Tag("pool-00"))], "t"
        )
    )
    forged = letters.send("pool-00", stolen, headers)
    assert pooled.run("dlq", "show", first, "--tenant", "acme").exit_code == 0  # the control
    result = pooled.run("dlq", "show", forged, "--tenant", "acme")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the letter does not open: it was not sealed for this tenant, destination and delivery" in result.stderr


def test_unrouted_letters_are_listed_and_shown_as_they_came(shell: Shell) -> None:
    shell.apply()
    headers = [
        ("hg-v", b"1"),
        ("hg-error", b"malformed"),
        ("hg-origin", b"in/0/4"),
        ("hg-detail", b"not UTF-8 at byte 0"),
    ]
    Letters(shell).send("unrouted", b"\xff\x00", [*headers, ("theirs", b"\xfe")])
    (row,) = json.loads(shell.run("dlq", "list", "--unrouted", "--output", "json").stdout)
    assert (row["letter"], row["error"], row["origin"], row["bytes"]) == ("0/0", "malformed", "in/0/4", 2)
    assert listed(shell, "--unrouted", "--key", "nobody") == []
    shown = json.loads(shell.run("dlq", "show", "0/0", "--unrouted", "--output", "json").stdout)
    assert (shown["value"], shown["headers"]["theirs"]) == ("base64:/wA=", "base64:/g==")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["dlq", "list"], "name a tenant with --tenant, or give --unrouted"),
        (["dlq", "list", "--tenant", "a", "--unrouted"], "name a tenant with --tenant, or give --unrouted"),
        (["dlq", "list", "--tenant", "a", "--since", "soon"], "'soon' is neither a duration such as 2h nor a time"),
        (["dlq", "list", "--tenant", "a", "--since", "2026-01-01T00:00:00"], "has no zone"),
        (["dlq", "show", "x", "--tenant", "a"], "'x' is not <partition>/<offset>, such as 2/17"),
        (["publish", "-f", "-", "--rate", "fast"], "'fast' is not a rate such as 200/s or 100/m"),
        (["publish", "-f", "-", "--tenant", "a\tb"], "holds a control character"),
        (["get", "tenants", "--vendor", "A"], "'A' must match"),
        (["trace", "evt_1"], "Missing option '--tenant'"),
        (["projector"], "arrives with a later release"),
        (["aply"], "no command 'aply'. Did you mean apply?"),
        (["apply"], "Missing option '-f'"),
    ],
)
def test_wrong_use_exits_2_and_says_what_is_right(shell: Shell, args: list[str], told: str) -> None:
    result = shell.run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert "Traceback" not in result.stderr


NEEDED = {
    "acls": ["--role", "operator", "--principal", "User:operator"],
    "destinations disable": ["--tenant", "acme", "hook"],
    "destinations enable": ["--tenant", "acme", "hook"],
    "dlq drop": ["--unrouted"],
    "dlq list": ["--unrouted"],
    "dlq replay": ["--unrouted"],
    "dlq show": ["--unrouted", "0/3"],
    "get destinations": [],
    "get routes": [],
    "get tenants": [],
    "keys rotate": ["--master"],
    "keys shred": ["--tenant", "acme"],
    "publish": ["-f", "-"],
    "secrets rotate": ["--tenant", "acme", "--destination", "hook"],
    "trace": ["--tenant", "acme", "evt_1"],
}


def of_a_vendor(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The commands that have the option `--vendor`."""
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if isinstance(found, click.Group):
            yield from of_a_vendor(found, (*path, name))
        elif found is not None and any(option.name == "vendor" for option in found.params):
            yield " ".join((*path, name))


def test_every_command_refuses_a_vendor_that_the_deployment_has_not(shell: Shell) -> None:
    assert isinstance(command, click.Group)
    assert sorted(of_a_vendor(command)) == sorted(NEEDED)
    for name, args in NEEDED.items():
        result = shell.run(*name.split(), *args, "--vendor", "defualt")
        assert (result.exit_code, result.stdout) == (2, ""), name
        told = "'--vendor': 'defualt' is no vendor of this deployment (default); add it to HEADGATE_VENDORS"
        assert told in result.stderr, name


# ---------------------------------------------------------------- the process


def test_faults_are_messages_and_not_tracebacks(shell: Shell) -> None:
    for env, told in (
        ({"HEADGATE_DEV_DIR": str(shell.folder / "none")}, b"HEADGATE_KAFKA_BOOTSTRAP is not set"),
        ({**shell.env, "HEADGATE_POOLS": "many"}, b"HEADGATE_POOLS='many'"),
    ):
        result = shell.process("get", "tenants", env=env)
        assert (result.returncode, result.stdout) == (1, b"")
        assert told in result.stderr
        assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("command", [["apply"], ["publish"], ["filter", "true"]])
def test_a_file_that_cannot_be_read_is_a_message_and_nothing_else(shell: Shell, command: list[str]) -> None:
    missing = shell.process(*command, "-f", str(shell.folder / "none"))
    assert (missing.returncode, missing.stdout) == (1, b"")
    assert missing.stderr.startswith(b"Error: cannot read '")
    closed = shell.process("-c", f"exec 0<&-; exec {sys.executable} -m cli.main {' '.join(command)} -f -", shell=True)
    assert (closed.returncode, closed.stdout, closed.stderr) == (1, b"", b"Error: cannot read stdin: it is closed\n")


def test_a_full_disk_is_a_message_and_not_a_traceback(shell: Shell) -> None:
    full = shell.process("-c", f"exec {sys.executable} -m cli.main filter true >/dev/full", shell=True)
    assert (full.returncode, full.stderr) == (1, b"Error: cannot write: No space left on device\n")


def test_a_worker_whose_port_is_taken_says_so(shell: Shell) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        result = shell.process("worker", env={**shell.env, "HEADGATE_HTTP_PORT": str(port)})
    assert result.returncode == 1
    assert f"Error: HEADGATE_HTTP_PORT={port}: cannot listen there (address already in use)".encode() in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("key", ["", "k1:c2hvcnQ="])
def test_a_worker_refuses_a_wrong_master_key_before_it_asks_for_a_broker(shell: Shell, key: str) -> None:
    env = {"HEADGATE_KAFKA_BOOTSTRAP": "127.0.0.1:1", "HEADGATE_MASTER_KEY": key}
    result = shell.process("worker", env=env)
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"HEADGATE_MASTER_KEY" in result.stderr
    assert b"127.0.0.1:1" not in result.stderr


def test_a_mistyped_subcommand_is_told_what_there_is(shell: Shell) -> None:
    for typed, told in (
        (["dlq", "lst"], "no command 'lst'. Did you mean list?"),
        (["get", "tenant"], "no command 'tenant'. Did you mean tenants?"),
        (["dev", "sideways"], "no command 'sideways'. There are: up, down, status."),
    ):
        result = shell.run(*typed)
        assert (result.exit_code, result.stdout) == (2, "")
        assert told in result.stderr
    later = shell.run("isolation", "--tenant", "acme")
    assert later.exit_code == 2
    assert "arrives with a later release" in later.stderr


def test_a_time_too_long_ago_is_refused_for_what_it_is(shell: Shell) -> None:
    result = shell.run("dlq", "list", "--tenant", "acme", "--since", "1000000h")
    assert result.exit_code == 2
    assert "'1000000h': longer than a hundred years; write a shorter duration" in result.stderr


def test_an_unreachable_broker_is_told_within_ten_seconds_or_so(shell: Shell) -> None:
    started = time.monotonic()
    result = shell.process("get", "tenants", env={**shell.env, "HEADGATE_KAFKA_BOOTSTRAP": "127.0.0.1:1"})
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"no broker answers at 127.0.0.1:1" in result.stderr
    assert b"HEADGATE_KAFKA_SECURITY_PROTOCOL: it is PLAINTEXT" in result.stderr
    assert b"check HEADGATE_KAFKA_BOOTSTRAP" in result.stderr
    assert b"Traceback" not in result.stderr
    assert time.monotonic() - started < 20


def test_no_output_of_a_process_holds_a_secret_of_the_configuration(shell: Shell) -> None:
    file = shell.file(CONFIGURATION)
    outputs = [
        shell.process("apply", "-f", file),
        shell.process("apply", "-f", file),
        shell.process("get", "destinations"),
        shell.process("apply", "-f", shell.file(CONFIGURATION.replace("type: webhook", "type: webhok"))),
    ]
    assert [result.returncode for result in outputs] == [0, 0, 0, 1]
    said = b"".join(result.stdout + result.stderr for result in outputs)
    assert b"hook" in said  # the control: something was said
    assert b"canary" not in said
    assert SIGNING.encode() not in said
    held = b"".join(value or b"" for _, value in shell.records(shell.settings.topics.control))
    assert b"hooks.acme.example" in held
    assert SIGNING.encode() not in held
    assert b"token-" + CANARY.encode() not in held


def test_an_embedded_stack_is_used_where_the_environment_names_no_broker(shell: Shell) -> None:
    env = {name: value for name, value in shell.env.items() if name != "HEADGATE_KAFKA_BOOTSTRAP"}
    result = shell.process("get", "tenants", env=env)
    assert result.returncode == 0
    assert b"HEADGATE_KAFKA_BOOTSTRAP is not set: using the embedded stack" in result.stderr
    assert b"warning" not in result.stderr
    other = shell.process("get", "tenants", env={**env, "HEADGATE_MASTER_KEY_FILE": "/none"})
    assert b"warning: HEADGATE_MASTER_KEY_FILE of the environment is not used" in other.stderr


def test_a_signal_ends_a_command_with_130(shell: Shell) -> None:
    shell.apply()
    process = subprocess.Popen(
        [sys.executable, "-c", "from cli.main import main; main()", "publish", "-f", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), **shell.env},
    )
    assert process.stdin is not None
    process.stdin.write(line(1).encode() + b"\n")
    process.stdin.flush()
    topic = shell.settings.topics.ingress(DEFAULT_VENDOR)
    deadline = time.monotonic() + 20
    while not shell.records(topic) and time.monotonic() < deadline:
        pass
    process.send_signal(2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out.startswith(b"1 event published")
    assert b"Traceback" not in err


def test_help_appears_at_once_and_names_every_command(shell: Shell) -> None:
    """At once: none of the libraries that take long to import is imported for it."""
    result = shell.process("--help", then="import sys; print(*sys.modules, file=sys.stderr)")
    assert result.returncode == 0
    for name in (b"demo", b"dev", b"apply", b"get", b"filter", b"worker", b"publish", b"dlq", b"trace", b"doctor"):
        assert name in result.stdout
    slow = {b"pydantic", b"confluent_kafka", b"faust", b"msgspec", b"yaml"}
    assert not slow & set(result.stderr.split())
    assert b"click" in result.stderr.split()  # the control


def test_applies_at_a_time_leave_one_file_whole(shell: Shell) -> None:
    shell.apply()
    code = "from cli.main import main; main()"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), **shell.env}
    names = ["One", "Two", "Three"]
    processes = []
    for name in names:
        text = CONFIGURATION.replace("Acme Ltd", name).replace(
            "externalId: acme2", f"externalId: acme2\n    name: {name}"
        )
        args = [sys.executable, "-c", code, "apply", "-f", shell.file(text, f"{name}.yaml")]
        processes.append(subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env))
    told = [process.communicate(timeout=60)[1].decode() for process in processes]
    ends = [process.returncode for process in processes]
    assert 0 in ends
    assert all(code == 0 or "nothing of this one was written" in said for code, said in zip(ends, told, strict=True))
    name = shell.tenant(ACME).name
    assert name in [names[at] for at, code in enumerate(ends) if code == 0]
    assert shell.tenant(ExternalId("acme2")).name == name
