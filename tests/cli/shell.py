"""`headgate` commands against a deployment of a test."""

import asyncio
import json
from typing import Any

from click.testing import CliRunner, Result

from cli.main import command
from tests.deployment import Deployment


async def headgate(deployment: Deployment, *args: str, **env: str | None) -> Result:
    """In this process, on a thread of its own: no start-up. `env` goes before the deployment's settings."""
    given: dict[str, str | None] = {**deployment.env, **env}
    return await asyncio.to_thread(CliRunner().invoke, command, args, env=given)


async def told(deployment: Deployment, *args: str, **env: str | None) -> Any:
    """The JSON that a command puts out."""
    found = await headgate(deployment, *args, "--output", "json", **env)
    assert found.stdout, found.stderr
    return json.loads(found.stdout)
