"""`headgate secrets` and `headgate keys` on real Kafka: what they say, what the topics hold, and what a kill leaves."""

import base64
import json
import os
import pty
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from confluent_kafka.admin import AdminClient

from cli.apply import apply_document
from cli.keys import shred_tenant
from cli.main import command
from config.document import DocumentError
from config.erasure import Pace, erase, pace_of
from config.kafka import KafkaFault, read_to_end
from config.plan import Write
from config.registry import Registry, Tenant, open_secrets
from config.rotation import shred, tick_key
from config.settings import Settings
from config.vault import MasterKeys
from config.writer import Fenced, Writer, read_current
from dev.stack import Stack
from dev.wait import until as came_true
from schemas.control import TenantRecord
from schemas.ids import DEFAULT_VENDOR, DestinationId, ExternalId, TenantRef
from tests.quick_keys import change_keys, make_quick_keys, on_disk, wrapped_keys

pytestmark = pytest.mark.broker

ACME = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
OTHER = TenantRef(DEFAULT_VENDOR, ExternalId("acme2"))
FIRST = "whsec_" + "QUFB" * 8
CONFIGURATION = """\
tenants:
  - externalId: acme
    destinations:
      - id: hook
        type: webhook
        options: {url: "https://a.example/in"}
        secrets: {signing: {env: SIGNING}}
    routes: [{id: all, match: {types: ["*"]}, to: [hook]}]
  - externalId: acme2
"""
HOUR_MS = 3_600_000
WITHOUT_ACME = "tenants: [{externalId: acme2}]"
ROTATE = ("secrets", "rotate", "--tenant", "acme", "--destination", "hook")
SHRED = ("keys", "shred", "--tenant", "acme", "--yes")


def until(holds: Callable[[], bool], what: str) -> None:
    assert came_true(holds, 30), f"never came: {what}"


class Shell:
    """One deployment on the stack whose `keys` topic forgets within seconds, and `headgate` in its environment."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.master_file = folder / "master.key"
        self.master_file.write_text(stack.master_key_file.read_text())
        self.env = {
            **stack.settings(),
            "HEADGATE_PREFIX": f"t{uuid.uuid4().hex[:12]}",
            "HEADGATE_INGRESS_PARTITIONS": "1",
            "HEADGATE_MASTER_KEY_FILE": str(self.master_file),
            "SIGNING": FIRST,
        }
        make_quick_keys(self.settings)
        self.apply()

    @property
    def settings(self) -> Settings:
        return Settings.load(self.env)

    @property
    def kafka(self) -> dict[str, str]:
        return self.settings.kafka.confluent()

    def compacts(self, does: bool) -> None:
        """Whether the broker may compact the `keys` topic. While it may not, nothing leaves it, however long it takes
        to look; the commands go by its other settings."""
        lag_ms = 1000 if does else HOUR_MS
        change_keys(self.settings, min_compaction_lag_ms=0 if does else HOUR_MS, max_compaction_lag_ms=lag_ms)

    def apply(self, text: str = CONFIGURATION, *, prune: bool = False) -> None:
        apply_document(self.settings, text, env=self.env, prune=prune)

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(command, args, env=self.env)

    def started(self, *args: str) -> "subprocess.Popen[str]":
        """`headgate` as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.env},
        )

    def killed(self, point: str, *args: str) -> None:
        """The command as a process of its own that kills itself at this point."""
        done = subprocess.run(
            [sys.executable, "-m", "tests.cli.killed_command", point, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **self.env},
            timeout=60,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert done.stdout == b""

    def tenant(self, ref: TenantRef = ACME) -> Tenant:
        """The tenant as a worker's registry has it that starts now."""
        settings = self.settings
        registry = Registry(MasterKeys.load(settings.keys), settings.topics)
        names = [settings.topics.keys, settings.topics.control, settings.topics.state]
        for message in read_to_end(self.kafka, names, "test"):
            registry.fold(message.topic() or "", message.key() or b"", message.value())
        assert registry.faults == {}
        tenant = registry.tenant(ref)
        assert tenant is not None
        return tenant

    def secrets(self, now_ms: int = 0) -> list[str]:
        tenant = self.tenant()
        return open_secrets(tenant, tenant.destinations[DestinationId("hook")], now_ms)["signing"]

    def record(self) -> TenantRecord:
        return read_current(self.kafka, self.settings.topics, DEFAULT_VENDOR).tenants[ACME.tenant].record

    def topics(self) -> set[str]:
        prefix = f"{self.settings.topics.prefix}.{DEFAULT_VENDOR}."
        listed = AdminClient(self.kafka).list_topics(timeout=10).topics
        return {name.removeprefix(prefix) for name in listed if name.startswith(prefix)}


@pytest.fixture
def shell(stack: Stack, tmp_path: Path) -> Iterator[Shell]:
    yield Shell(stack, tmp_path)


# ---------------------------------------------------------------- secrets


def test_a_rotation_shows_the_new_secret_once_and_both_are_live(shell: Shell) -> None:
    first = shell.run(*ROTATE)
    assert first.exit_code == 0, first.output
    path, _, value = first.stdout.strip().partition(": ")
    assert path == "acme/hook/signing"
    assert shell.secrets() == [value, FIRST]
    assert "the old secret signs too until" in first.stderr
    second = shell.run(*ROTATE, "--overlap", "0s", "--output", "json")
    shown = json.loads(second.stdout)
    assert shown["overlapUntil"] == ""
    assert shell.secrets() == [shown["secrets"][0]["value"]]
    assert value not in shell.run("get", "destinations", "--output", "json").output


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("secrets", "rotate", "--tenant", "acme"), 2, "--destination"),
        ((*ROTATE[:-1], "hok"), 1, "has no destination 'hok'; it has: hook"),
        ((*ROTATE, "--overlap", "soon"), 2, "not a duration"),
        ((*ROTATE, "--overlap", "60d"), 2, "30d at most"),
        (("secrets", "rotate", "--tenant", "nobody", "--destination", "hook"), 1, "no tenant 'nobody'"),
        (("keys", "rotate"), 2, "give either --master or --tenant ID"),
        (("keys", "rotate", "--master", "--tenant", "acme"), 2, "give either --master or --tenant ID"),
        (("keys", "rotate", "--tenant", "acme", "--wait"), 2, "--wait goes with --master"),
        (SHRED[:-1], 1, "this destroys the key of the active tenant acme"),
        (("keys", "shred", "--tenant", "nobody", "--yes"), 1, "no tenant 'nobody'"),
    ],
)
def test_wrong_use_and_what_is_not_there_change_nothing(
    stack_shell: Shell, args: tuple[str, ...], code: int, told: str
):
    before = stack_shell.record()
    result = stack_shell.run(*args)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert stack_shell.record() == before
    assert stack_shell.tenant().vault.can_seal


@pytest.fixture(scope="module")
def stack_shell(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(stack, tmp_path_factory.mktemp("shell"))


@pytest.mark.parametrize("args", [ROTATE, ("keys", "rotate", "--tenant", "acme")], ids=["secrets", "tenant key"])
def test_a_rotation_killed_at_any_step_is_whole_or_nothing_and_can_be_run_again(
    shell: Shell, args: tuple[str, ...]
) -> None:
    before = shell.record()
    for point in ("taken", "produced"):
        shell.killed(point, *args)
        assert shell.record() == before
        assert shell.secrets() == [FIRST]
    shell.killed("committed", *args)
    assert shell.record().configVersion == before.configVersion + 1
    assert FIRST in shell.secrets()  # what a receiver knows goes on signing
    again = shell.run(*args)
    assert again.exit_code == 0, again.output
    assert shell.record().configVersion == before.configVersion + 2
    assert FIRST in shell.secrets()


def test_of_a_rotation_and_an_apply_at_a_time_the_first_writes_nothing(shell: Shell) -> None:
    with Writer(shell.kafka, shell.settings.topics, DEFAULT_VENDOR) as apply:
        assert shell.run(*ROTATE).exit_code == 0
        tombstone = shred_tenant_writes(shell)
        with pytest.raises(Fenced):
            apply.write(tombstone, 1 << 20)
    assert shell.tenant().vault.can_seal


def shred_tenant_writes(shell: Shell) -> list[Write]:
    known = read_current(shell.kafka, shell.settings.topics, DEFAULT_VENDOR).tenants[ACME.tenant]
    return shred(ACME, known, 1)


# ---------------------------------------------------------------- keys


def test_a_new_master_key_goes_in_and_the_old_one_out(shell: Shell) -> None:
    old = shell.master_file.read_text().strip()
    old_id = old.partition(":")[0]
    new = "k-new:" + base64.b64encode(os.urandom(32)).decode()
    shell.master_file.write_text(f"{new}\n{old}\n")
    sealed = shell.tenant().vault.seal("delivery", "hook", "d1", b"waits")
    earlier = wrapped_keys(shell.settings, ACME)
    shell.compacts(False)
    shell.killed("produced", "keys", "rotate", "--master")
    assert wrapped_keys(shell.settings, ACME) == earlier
    shell.killed("committed", "keys", "rotate", "--master")
    assert wrapped_keys(shell.settings, ACME) != earlier
    again = shell.run("keys", "rotate", "--master", "--output", "json")
    assert json.loads(again.stdout) == {
        "vendor": "default",
        "master": "k-new",
        "keys": 2,
        "rewrapped": 0,
        "stillNeeded": [old_id],
    }
    assert f"keep the line of {old_id}" in again.stderr
    for point in ("watching", "ticked"):
        shell.killed(point, "keys", "rotate", "--master", "--wait")
    shell.compacts(True)
    waited = shell.run("keys", "rotate", "--master", "--wait", "--output", "json")
    assert waited.exit_code == 0, waited.output
    assert json.loads(waited.stdout)["stillNeeded"] == []
    assert "the other lines can go" in waited.stderr
    shell.master_file.write_text(f"{new}\n")
    assert shell.tenant().vault.open("delivery", "hook", "d1", sealed) == b"waits"
    assert shell.secrets() == [FIRST]


def test_a_shredded_key_leaves_the_topic_and_the_disk(shell: Shell) -> None:
    topic = shell.settings.topics.keys
    (wrapped,) = wrapped_keys(shell.settings, ACME)
    (kept,) = wrapped_keys(shell.settings, OTHER)
    assert on_disk(shell.stack, topic, wrapped) != []
    shredded = shell.run(*SHRED, "--output", "json")
    assert shredded.exit_code == 0, shredded.output
    shown = json.loads(shredded.stdout)
    assert (shown["state"], shown["shreddedThrough"], shown["gone"]) == ("active", 1, True)
    until(lambda: on_disk(shell.stack, topic, wrapped) == [], "the broker deletes the files that it compacted")
    assert on_disk(shell.stack, topic, kept) != []
    assert not shell.tenant().vault.can_seal
    assert shell.tenant(OTHER).vault.can_seal
    again = shell.run(*SHRED[:-1])  # there is nothing to ask
    assert (again.exit_code, again.stdout.partition(";")[0]) == (0, "acme: shredded up to key version 1"), again.output


def test_shredding_asks_on_a_terminal_and_takes_no_for_an_answer(shell: Shell) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"n\n")
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *SHRED[:-1]],
            stdin=theirs,
            capture_output=True,
            env={**os.environ, **shell.env},
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"This destroys the key of the active tenant acme" in done.stderr
    assert b"nothing was changed" in done.stderr
    assert shell.tenant().vault.can_seal


def test_without_ticks_the_key_stays_on_the_disk(shell: Shell, stack: Stack, tmp_path: Path) -> None:
    """The control: the same tombstone, in a topic to which nobody appends; a second deployment tells the time."""
    topic = shell.settings.topics.keys
    (wrapped,) = wrapped_keys(shell.settings, ACME)
    change_keys(shell.settings, segment_ms=HOUR_MS, max_compaction_lag_ms=HOUR_MS)  # what is written now stays in one
    assert shred_tenant(shell.settings, ACME, say=lambda _: None, agreed=lambda _: True) is not None
    change_keys(shell.settings, segment_ms=1000, max_compaction_lag_ms=1000)
    clock = Shell(stack, tmp_path)
    assert clock.run(*SHRED).exit_code == 0
    assert on_disk(stack, topic, wrapped) != []
    pace = pace_of(shell.kafka, shell.settings.topics)
    erase(shell.kafka, shell.settings.topics, tick_key(ACME), lambda key, _: key.endswith(b"/acme/1"), pace, print)
    until(lambda: on_disk(stack, topic, wrapped) == [], "with them it goes")


def test_a_topic_that_is_not_compacted_is_told_with_what_to_look_at(shell: Shell) -> None:
    hopeless = Pace(roll_s=0.0, expected_s=0.0, longest_s=0.0, disk_s=0.0)
    with pytest.raises(KafkaFault, match=r"can still be read in topic .*: the broker does not compact it\. Check"):
        erase(shell.kafka, shell.settings.topics, tick_key(ACME), lambda *_: True, hopeless, print)


def test_a_shredding_killed_at_any_step_goes_on_when_it_is_run_again(shell: Shell) -> None:
    sealed = shell.tenant().vault.seal("delivery", "hook", "d1", b"gone")
    (wrapped,) = wrapped_keys(shell.settings, ACME)
    for point in ("taken", "produced"):
        shell.killed(point, *SHRED)
        assert shell.tenant().vault.open("delivery", "hook", "d1", sealed) == b"gone"
    shell.compacts(False)
    for point in ("committed", "watching", "ticked"):
        shell.killed(point, *SHRED)
        assert not shell.tenant().vault.can_seal
    shell.compacts(True)
    assert shell.run(*SHRED).exit_code == 0
    until(lambda: on_disk(shell.stack, shell.settings.topics.keys, wrapped) == [], "gone")
    shell.apply()
    assert shell.tenant().key_version == 2
    assert shell.secrets() == [FIRST]


def test_a_shredding_that_is_run_again_leaves_the_key_of_an_apply_since_then(shell: Shell) -> None:
    shell.compacts(False)
    shell.killed("watching", *SHRED)
    shell.apply()
    with shell.started(*SHRED, "--output", "json") as again:
        assert again.stderr is not None and again.stdout is not None
        told = "version 2, made since, stays: run this again to shred that too"
        assert any(told in line for line in again.stderr)
        shell.compacts(True)  # only now that it has seen what the earlier one left
        again.stderr.read()
        assert json.loads(again.stdout.read())["shreddedThrough"] == 1
    assert again.returncode == 0
    assert shell.secrets() == [FIRST]
    assert json.loads(shell.run(*SHRED, "--output", "json").stdout)["shreddedThrough"] == 2  # the control
    assert not shell.tenant().vault.can_seal


def test_a_deletion_killed_at_any_step_goes_on_when_it_is_run_again(shell: Shell) -> None:
    (wrapped,) = wrapped_keys(shell.settings, ACME)
    own = {"retry.acme", "dlq.acme"}
    shell.apply(WITHOUT_ACME, prune=True)
    found = []
    for point in ("taken", "produced", "committed", "one_topic", "topics", "produced", "committed", "watching"):
        shell.killed(point, *SHRED)
        found.append((shell.record().state, len(own & shell.topics()), shell.tenant().vault.can_seal))
    assert found == [
        ("removed", 2, True),
        ("removed", 2, True),
        ("deleting", 2, True),
        ("deleting", 1, True),
        ("deleting", 0, True),
        ("deleting", 0, True),
        ("deleted", 0, False),
        ("deleted", 0, False),
    ]
    ended = shell.run(*SHRED, "--output", "json")
    assert json.loads(ended.stdout)["state"] == "deleted"
    until(lambda: on_disk(shell.stack, shell.settings.topics.keys, wrapped) == [], "gone")
    assert (shell.record().name, shell.record().parts, shell.record().slug) == ("", {}, "acme")
    assert shell.tenant(OTHER).state == "active"
    assert {"retry.acme2", "dlq.acme2"} <= shell.topics()


def test_a_tenant_that_is_being_deleted_cannot_be_applied_until_that_has_ended(shell: Shell) -> None:
    shell.apply(WITHOUT_ACME, prune=True)
    shell.killed("committed", *SHRED)
    with pytest.raises(DocumentError, match="this tenant is being deleted"):
        shell.apply()
    assert shell.run(*SHRED).exit_code == 0
    shell.apply()
    assert (shell.record().state, shell.tenant().key_version) == ("active", 2)
    assert {"retry.acme", "dlq.acme"} <= shell.topics()
