"""What a vendor's command that is killed within its transaction costs another vendor: time, and nothing else."""

import os
import secrets
import signal
import subprocess
import sys

import pytest

from cli.apply import apply_document
from config.settings import Settings
from config.writer import read_current
from dev.stack import Stack
from schemas.ids import ExternalId, Vendor

pytestmark = [pytest.mark.broker, pytest.mark.chaos("kills")]

TENANT = """\
vendor: {vendor}
tenants:
  - externalId: acme
    destinations: [{{id: hook, type: webhook, options: {{url: "https://acme.example/{path}"}}}}]
"""


def test_an_apply_waits_for_the_end_of_another_vendor_s_open_transaction_and_is_in_force_then(stack: Stack) -> None:
    prefix = f"t{secrets.token_hex(4)}"
    env = {**stack.settings(), "HEADGATE_PREFIX": prefix, "HEADGATE_VENDORS": "north,south"}
    settings = Settings.load(env)
    for vendor in ("north", "south"):
        apply_document(settings, TENANT.format(vendor=vendor, path="1"))
    command = ("produced", "keys", "rotate", "--tenant", "acme", "--vendor", "north")
    killed = subprocess.run(
        [sys.executable, "-m", "tests.cli.killed_command", *command],
        env={**os.environ, **env},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    applied = apply_document(settings, TENANT.format(vendor="south", path="2"))
    assert applied.written
    assert applied.took_s > 5  # it had to wait: else nothing was open
    for vendor, version in (("north", 1), ("south", 2)):
        current = read_current(settings.kafka.confluent(), settings.topics, Vendor(vendor))
        assert current.tenants[ExternalId("acme")].record.configVersion == version
