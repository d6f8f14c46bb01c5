"""`headgate dlq replay` and `headgate dlq drop` on real Kafka: which letters, what is written for one, what is told."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message

from cli.letters import Which
from config.kafka import read_to_end
from config.plan import Write, disabled_key
from config.writer import Writer
from dev.stack import Stack
from schemas.attempt import PURPOSE_DELIVERY
from schemas.control import DisabledRecord, encode_control
from schemas.dead_letter import Selectors, replay_job
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag, TenantRef
from schemas.wire import read_parked
from tests.cli.test_commands import Letters, Shell, listed
from tests.streams.killed_replay import DROP_POINTS

pytestmark = pytest.mark.broker

POOL = Tag("pool-00")
TENANT = """
  - externalId: {name}
    topics: pooled
    destinations:
      - {{id: hook, type: webhook, options: {{url: "https://hooks.example/{name}"}}}}
"""
BOTH = "tenants:" + TENANT.format(name="acme") + TENANT.format(name="acme2")


@pytest.fixture
def shell(stack: Stack, tmp_path: Path) -> Shell:
    """Two tenants that share the topics of one pool, each with a destination `hook`."""
    made = Shell(stack, tmp_path)
    made.apply(BOTH)
    return made


def records(shell: Shell, topic: str) -> list[Message]:
    return list(read_to_end(shell.kafka, [topic], "test"))


def retries(shell: Shell) -> list[Message]:
    return records(shell, shell.settings.topics.retry(DEFAULT_VENDOR, POOL))


def dead(shell: Shell) -> list[Message]:
    return records(shell, shell.settings.topics.dead_letters(DEFAULT_VENDOR, POOL))


def marks(found: Sequence[Message]) -> list[dict[str, bytes]]:
    return [headers for one in found if "hg-mark" in (headers := dict(one.headers() or []))]


def done(shell: Shell, command: str, *args: str) -> dict[str, int]:
    result = shell.run("dlq", command, "--output", "json", *args)
    assert result.exit_code == 0, result.output
    found: dict[str, int] = json.loads(result.stdout)
    return found


def replayed(shell: Shell, *args: str) -> tuple[int, int, int]:
    """Matched, replayed, skipped."""
    found = done(shell, "replay", *args)
    assert found.keys() == {"matched", "replayed", "skipped"}
    return found["matched"], found["replayed"], found["skipped"]


def ingress(shell: Shell) -> str:
    return shell.settings.topics.ingress(DEFAULT_VENDOR)


def sent(shell: Shell) -> list[str]:
    """The events of the records in the retry topic."""
    return sorted(dict(one.headers() or [])["hg-event"].decode() for one in retries(shell))


ACME = ("--tenant", "acme")


def test_a_replayed_letter_is_a_retry_record_with_its_bytes_and_then_marked(shell: Shell) -> None:
    name = Letters(shell).write("acme", 1)
    before_ms = int(time.time() * 1000)
    assert replayed(shell, *ACME) == (1, 1, 0)
    letter, mark = dead(shell)
    (retry,) = retries(shell)
    assert (retry.value(), retry.partition(), retry.key()) == (letter.value(), 0, b"acme/hook")
    was, now = read_parked(letter.headers() or []), read_parked(retry.headers() or [])
    assert was is not None and now is not None
    assert (now.tenant, now.destination, now.delivery, now.event, now.origin) == (
        was.tenant, was.destination, was.delivery, was.event, was.origin,
    )  # fmt: skip
    # the schedule and the age start anew
    assert (now.attempt, now.hop, now.parks) == (0, was.hop + 1, 0)
    assert now.first_failed_ms >= before_ms and now.not_before_ms >= now.first_failed_ms
    headers = dict(mark.headers() or [])
    assert (mark.value(), mark.partition()) == (b"", letter.partition())
    assert (headers["hg-mark"], headers["hg-letter"].decode()) == (b"replayed", name)
    assert headers["hg-replay"].decode() == now.replay != ""


def test_a_letter_is_sent_once_unless_forced(shell: Shell) -> None:
    Letters(shell).write("acme", 1)
    assert replayed(shell, *ACME) == (1, 1, 0)
    assert listed(shell, *ACME) == []
    assert listed(shell, *ACME, "--all") == ["evt_1"]
    again = shell.run("dlq", "replay", *ACME)
    assert (again.exit_code, again.stdout) == (0, "1 matched, 0 replayed, 1 skipped\n")
    assert "skipped: 1 letter: was replayed or dropped before" in again.stderr
    assert len(retries(shell)) == 1
    assert replayed(shell, *ACME, "--force") == (1, 1, 0)
    assert len({dict(one.headers() or [])["hg-replay"] for one in retries(shell)}) == 2


def test_copies_of_a_letter_share_their_job_if_they_are_not_forced(shell: Shell) -> None:
    """What a replay that was killed before the mark has sent, the next one sends again: under the same job."""
    letters = Letters(shell)
    letters.write("acme", 1)
    assert replayed(shell, *ACME) == (1, 1, 0)
    job = dict(retries(shell)[0].headers() or [])["hg-replay"].decode()
    topic = shell.settings.topics.dead_letters(DEFAULT_VENDOR, POOL)
    from config.provision import topic_ids

    assert job == replay_job(topic_ids(shell.kafka, [topic])[topic], 0, 0)


def test_a_forced_replay_goes_on_by_its_job(shell: Shell) -> None:
    letters = Letters(shell)
    first = letters.write("acme", 1)
    letters.write("acme", 2)
    letters.mark(first)
    job = "0123456789abcdef" + Which(DEFAULT_VENDOR, TenantRef(DEFAULT_VENDOR, ExternalId("acme")), Selectors()).hash()
    topic = shell.settings.topics.dead_letters(DEFAULT_VENDOR, POOL)
    letters.send("pool-00", b"", [("hg-mark", b"replayed"), ("hg-letter", first.encode()), ("hg-replay", job.encode())])
    assert replayed(shell, *ACME, "--resume", job) == (2, 1, 1)
    assert sent(shell) == ["evt_2"]
    assert {dict(one.headers() or [])["hg-replay"] for one in retries(shell)} == {job.encode()}
    assert replayed(shell, *ACME, "--resume", job) == (2, 0, 2)
    told = shell.run("dlq", "replay", *ACME, "--force")
    assert f"if it is interrupted, go on with `headgate dlq replay {' '.join(ACME)} --resume " in told.stderr
    assert len(records(shell, topic)) == 2 + 2 + 1 + 2


def test_a_forced_replay_goes_on_with_the_letters_it_was_begun_for_and_no_others(shell: Shell) -> None:
    for number in range(2):
        Letters(shell).write("acme", number, error="timeout" if number else "it's odd")
    chosen = ("--error", "it's odd", "--since", "2h", "--until", "2100-01-01T00:00:00.123Z")
    told = shell.run("dlq", "replay", *ACME, *chosen, "--force", "--rate", "90/m").stderr
    found = re.search(r"go on with `headgate (.*)`", told)
    assert found is not None
    command = shlex.split(found[1])
    assert command[:4] == ["dlq", "replay", *ACME]
    assert command[-4:-1] == ["--rate", "1.5/s", "--resume"]
    again = shell.run(*command)  # `2h` is a moment there
    assert (again.exit_code, again.stdout) == (0, "1 matched, 0 replayed, 1 skipped\n"), again.stderr
    for others in (ACME, (*ACME, *chosen), ("--tenant", "acme2"), ("--unrouted",)):
        refused = shell.run("dlq", "replay", *others, "--resume", command[-1])
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"job {command[-1]} was begun for other letters: repeat the command that it told" in refused.stderr
    assert len(retries(shell)) == 1


def test_waiting_has_an_end_that_names_what_is_open(shell: Shell) -> None:
    """No worker runs: nothing of it is settled."""
    Letters(shell).write("acme", 1)
    delivery = dict(dead(shell)[0].headers() or [])["hg-delivery"].decode()
    waited = shell.run("dlq", "replay", *ACME, "--wait", "--timeout", "300ms")
    assert (waited.exit_code, waited.stdout) == (1, "1 matched, 1 replayed, 0 skipped\n")
    assert f"not settled within 0.3 s: 1 letter, such as {delivery}: `headgate trace` tells" in waited.stderr
    origin = [("hg-v", b"1"), ("hg-error", b"unknown_tenant"), ("hg-origin", f"{ingress(shell)}/0/7".encode())]
    Letters(shell).send("unrouted", b"{}", origin)
    waited = shell.run("dlq", "replay", "--unrouted", "--wait", "--timeout", "300ms")
    assert (waited.exit_code, waited.stdout) == (1, "1 matched, 1 replayed, 0 skipped\n")
    assert f"not settled within 0.3 s: {ingress(shell)}/" in waited.stderr
    wrong = shell.run("dlq", "replay", *ACME, "--timeout", "1s")
    assert (wrong.exit_code, "--timeout goes with --wait" in wrong.stderr) == (2, True)


def test_selectors_choose_by_destination_error_and_time(shell: Shell) -> None:
    letters = Letters(shell)
    now_ms = int(time.time() * 1000)
    letters.write("acme", 1, at_ms=now_ms - 3 * 3_600_000)
    letters.write("acme", 2, error="gone", at_ms=now_ms - 60_000)
    letters.write("acme", 3, at_ms=now_ms - 30_000)
    assert replayed(shell, *ACME, "--destination", "other") == (0, 0, 0)
    assert replayed(shell, *ACME, "--error", "gone") == (1, 1, 0)
    assert replayed(shell, *ACME, "--until", "2h") == (1, 1, 0)
    assert sent(shell) == ["evt_1", "evt_2"]
    assert replayed(shell, *ACME, "--since", "2h", "--destination", "hook") == (2, 1, 1)
    assert sent(shell) == ["evt_1", "evt_2", "evt_3"]


def test_a_dry_run_counts_and_touches_nothing(shell: Shell) -> None:
    letters = Letters(shell)
    letters.mark(letters.write("acme", 1))
    letters.write("acme", 2)
    before = len(dead(shell))
    assert replayed(shell, *ACME, "--dry-run") == (2, 0, 1)
    assert done(shell, "drop", *ACME, "--dry-run") == {"matched": 2, "dropped": 0, "skipped": 1}
    assert (len(dead(shell)), retries(shell)) == (before, [])


def test_letters_of_the_pool_s_other_tenants_are_never_touched(shell: Shell) -> None:
    letters = Letters(shell)
    letters.write("acme", 1)
    other = letters.write("acme2", 2)
    # one that says it is acme's, and was sealed by acme2
    mine = next(one for one in dead(shell) if one.offset() == 0)
    stolen = shell.tenant(ExternalId("acme2")).vault.seal(PURPOSE_DELIVERY, "hook", "dlv_1", b"{}")
    forged = letters.send("pool-00", stolen, list(mine.headers() or []))
    result = shell.run("dlq", "replay", *ACME, "--output", "json")
    assert json.loads(result.stdout) == {"matched": 2, "replayed": 1, "skipped": 1}
    assert "skipped: 1 letter: it does not open with this tenant's keys" in result.stderr
    (retry,) = retries(shell)
    assert retry.value() == mine.value()
    assert not {other, forged} & {one["hg-letter"].decode() for one in marks(dead(shell))}
    assert listed(shell, "--tenant", "acme2") == ["evt_2"]


def test_letters_whose_destination_is_gone_or_disabled_are_skipped_and_stay(shell: Shell) -> None:
    Letters(shell).write("acme", 1)
    version = shell.tenant(ExternalId("acme")).config_version
    key = disabled_key(TenantRef(DEFAULT_VENDOR, ExternalId("acme")), "hook").encode()
    off = encode_control(DisabledRecord(version, 1, "dlv_1"))
    with Writer(shell.kafka, shell.settings.topics, DEFAULT_VENDOR) as writer:
        writer.write([Write("state", key, off)], 1_000_000)
    disabled = shell.run("dlq", "replay", *ACME, "--output", "json")
    assert json.loads(disabled.stdout) == {"matched": 1, "replayed": 0, "skipped": 1}
    assert "its destination is disabled, since it answered 410" in disabled.stderr
    shell.apply("tenants:" + TENANT.format(name="acme").replace("id: hook", "id: new") + TENANT.format(name="acme2"))
    gone = shell.run("dlq", "replay", *ACME, "--output", "json")
    assert json.loads(gone.stdout) == {"matched": 1, "replayed": 0, "skipped": 1}
    assert "its destination is gone" in gone.stderr
    assert listed(shell, *ACME) == ["evt_1"]
    shell.apply(BOTH)
    assert replayed(shell, *ACME) == (1, 1, 0)  # the control


def test_letters_that_may_have_arrived_are_skipped_unless_forced(shell: Shell) -> None:
    letters = Letters(shell)
    for number in range(2):
        letters.write("acme", number, error="unknown_outcome")
    letters.write("acme", 2)
    letters.write("acme2", 3, error="unknown_outcome")
    planned = shell.run("dlq", "replay", *ACME, "--dry-run")
    assert planned.stdout == "3 matched, 0 replayed, 2 skipped\n"
    why = "skipped: 2 letters: its destination may hold it already (unknown_outcome); --force sends it all the same"
    assert why in planned.stderr
    assert replayed(shell, *ACME) == (3, 1, 2)
    assert replayed(shell, *ACME, "--error", "unknown_outcome") == (2, 0, 2)
    assert sent(shell) == ["evt_2"]
    assert listed(shell, *ACME) == ["evt_0", "evt_1"]  # they stay
    forced = shell.run("dlq", "replay", *ACME, "--error", "unknown_outcome", "--force")
    assert forced.stdout == "2 matched, 2 replayed, 0 skipped\n"
    assert sent(shell) == ["evt_0", "evt_1", "evt_2"]
    # what is done is told as done
    again = shell.run("dlq", "replay", *ACME)
    assert "skipped: 3 letters: was replayed or dropped before" in again.stderr
    assert "may hold it" not in again.stderr


def test_a_forced_replay_of_what_may_have_arrived_goes_on_by_its_job(shell: Shell) -> None:
    letters = Letters(shell)
    first = letters.write("acme", 1, error="unknown_outcome")
    letters.write("acme", 2, error="unknown_outcome")
    job = "0123456789abcdef" + Which(DEFAULT_VENDOR, TenantRef(DEFAULT_VENDOR, ExternalId("acme")), Selectors()).hash()
    letters.send("pool-00", b"", [("hg-mark", b"replayed"), ("hg-letter", first.encode()), ("hg-replay", job.encode())])
    assert replayed(shell, *ACME, "--resume", job) == (2, 1, 1)
    assert sent(shell) == ["evt_2"]


def test_letters_that_may_have_arrived_are_dropped_like_others(shell: Shell) -> None:
    Letters(shell).write("acme", 1, error="unknown_outcome")
    assert done(shell, "drop", *ACME) == {"matched": 1, "dropped": 1, "skipped": 0}
    assert listed(shell, *ACME) == []


def test_dropped_letters_are_marked_and_nothing_is_sent(shell: Shell) -> None:
    letters = Letters(shell)
    letters.write("acme", 1)
    letters.write("acme", 2, error="gone")
    letters.write("acme2", 3)
    assert done(shell, "drop", *ACME, "--error", "gone") == {"matched": 1, "dropped": 1, "skipped": 0}
    assert listed(shell, *ACME) == ["evt_1"]
    assert done(shell, "drop", *ACME) == {"matched": 2, "dropped": 1, "skipped": 1}
    listing = shell.run("dlq", "list", *ACME)
    assert "there are no such letters but 2 that were replayed or dropped (--all)" in listing.stderr
    assert (listed(shell, *ACME), listed(shell, "--tenant", "acme2")) == ([], ["evt_3"])
    assert retries(shell) == []
    assert [one["hg-mark"] for one in marks(dead(shell))] == [b"dropped", b"dropped"]
    assert replayed(shell, *ACME) == (2, 0, 2)
    assert replayed(shell, *ACME, "--force") == (2, 2, 0)


def test_a_drop_killed_at_any_step_goes_on_when_it_is_run_again_and_marks_nobody_elses(shell: Shell) -> None:
    letters, count, nth = Letters(shell), 12, 3
    for number in range(count):
        letters.write("acme", number)
        letters.write("acme2", number)
    for point in DROP_POINTS:
        killed = subprocess.run(
            [sys.executable, "-m", "tests.streams.killed_replay", point, str(nth), "-", "dlq", "drop", *ACME],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **shell.env},
            timeout=60,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    last = done(shell, "drop", *ACME)
    assert last["matched"] == count
    assert last["skipped"] >= nth  # what the killed ones had marked
    assert last["dropped"] + last["skipped"] == count
    assert listed(shell, *ACME) == []
    assert len(listed(shell, "--tenant", "acme2")) == count
    assert retries(shell) == []


def test_letters_of_another_release_are_left_to_its_commands_and_told(shell: Shell) -> None:
    """Of this tenant alone: what a neighbour in the pool has is neither counted nor named."""
    letters = Letters(shell)
    letters.write("acme", 1)
    headers = [(name, value) for name, value in dead(shell)[0].headers() or [] if name != "hg-v"]
    theirs = letters.send("pool-00", b"sealed", [("hg-v", b"2"), *headers])  # type: ignore[list-item]
    listing = shell.run("dlq", "list", *ACME)
    assert "left out: 1 of a form that this version of headgate does not read" in listing.stderr
    assert "left out" not in shell.run("dlq", "list", "--tenant", "acme2").stderr
    shown = shell.run("dlq", "show", theirs, *ACME)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert f"letter {theirs} has a form (version 2) that this version of headgate does not read" in shown.stderr
    assert f"there is no letter {theirs}" in shell.run("dlq", "show", theirs, "--tenant", "acme2").stderr
    assert "left out: 1 record of the tenant" in shell.run("trace", "evt_1", *ACME).stderr
    assert replayed(shell, *ACME) == (2, 1, 1)
    assert replayed(shell, *ACME, "--force") == (2, 1, 1)
    assert done(shell, "drop", *ACME) == {"matched": 2, "dropped": 0, "skipped": 2}
    assert replayed(shell, "--tenant", "acme2") == (0, 0, 0)
    assert sent(shell) == ["evt_1", "evt_1"]


def test_unrouted_records_go_back_to_ingress_but_for_those_that_cannot(shell: Shell) -> None:
    letters = Letters(shell)
    topic = shell.settings.topics.ingress(DEFAULT_VENDOR)
    here = f"{topic}/2/41".encode()
    ours: list[tuple[str, bytes | None]] = [("hg-v", b"1"), ("hg-error", b"unknown_tenant"), ("hg-detail", b"d")]
    theirs: list[tuple[str, bytes | None]] = [("theirs", b"\xfe"), ("theirs", b"2")]
    letters.send("unrouted", b"bytes as they came", [*theirs, *ours, ("hg-origin", here)])
    letters.send("unrouted", b"cut", [*ours, ("hg-origin", here), ("hg-truncated", b"5000000")])
    letters.send("unrouted", b"sealed", [*ours, ("hg-origin", b"headgate.default.retry.acme/0/1")])
    result = shell.run("dlq", "replay", "--unrouted", "--error", "unknown_tenant", "--output", "json")
    assert json.loads(result.stdout) == {"matched": 3, "replayed": 1, "skipped": 2}
    assert "it was too large to keep whole" in result.stderr
    assert "it did not come from ingress" in result.stderr
    (back,) = records(shell, topic)
    assert (back.key(), back.value()) == (b"acme/hook", b"bytes as they came")
    assert back.headers() == [*theirs, ("hg-origin", here)]
    assert done(shell, "drop", "--unrouted") == {"matched": 3, "dropped": 2, "skipped": 1}
    assert listed(shell, "--unrouted") == []


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["replay"], 2, "name a tenant with --tenant, or give --unrouted"),
        (["replay", "--unrouted", "--destination", "hook"], 2, "--destination goes with --tenant"),
        (["drop", "--tenant", "acme", "--key", "k"], 2, "--key goes with --unrouted"),
        (["drop", "--tenant", "acme", "--since", "1h", "--until", "2h"], 2, "--since is later than --until"),
        (["replay", "--tenant", "acme", "--rate", "fast"], 2, "'fast' is not a rate such as 200/s or 100/m"),
        (["replay", "--tenant", "acme", "--resume", "j"], 2, "'j' is no job: 24 hexadecimal digits"),
        (["drop", "--tenant", "nobody"], 1, "vendor default has no tenant 'nobody'"),
    ],
)
def test_wrong_use_is_told(shell: Shell, args: list[str], code: int, told: str) -> None:
    result = shell.run("dlq", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert told in result.stderr


def test_nothing_is_replayed_for_a_tenant_that_was_removed(shell: Shell) -> None:
    Letters(shell).write("acme", 1)
    shell.apply("tenants:" + TENANT.format(name="acme2"), prune=True)
    result = shell.run("dlq", "replay", *ACME)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tenant 'acme' is removed: nothing is delivered for it; apply it again first" in result.stderr
    assert done(shell, "drop", *ACME) == {"matched": 1, "dropped": 1, "skipped": 0}


def test_on_a_terminal_it_asks_first(shell: Shell) -> None:
    Letters(shell).write("acme", 1)

    def answered(text: bytes) -> "subprocess.CompletedProcess[Any]":
        ours, terminal = pty.openpty()
        os.write(ours, text)
        try:
            return subprocess.run(
                [sys.executable, "-m", "cli.main", "dlq", "replay", *ACME],
                stdin=terminal,
                capture_output=True,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), **shell.env},
                timeout=60,
                check=False,
            )
        finally:
            os.close(ours)
            os.close(terminal)

    refused = answered(b"n\n")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"Send 1 letter of tenant 'acme'? [y/N]: " in refused.stderr
    assert retries(shell) == []
    left = answered(b"\x04")  # the end of input
    assert (left.returncode, left.stdout) == (130, b"")
    agreed = answered(b"what\ny\n")
    assert (agreed.returncode, agreed.stdout) == (0, b"1 matched, 1 replayed, 0 skipped\n")
    assert b"answer y or n" in agreed.stderr
