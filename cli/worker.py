"""`headgate worker`: the data plane, until SIGTERM."""

import os
import sys

import click

from cli.output import load_settings, told


@click.command()
@told
def command() -> None:
    """Deliver events until SIGTERM.

    Reads its settings from HEADGATE_… variables, makes missing base topics where it may, and serves /metrics, /healthz
    and /readyz on HEADGATE_HTTP_PORT. Start as many as you like: Kafka shares the partitions out.

    SIGTERM lets what is in flight end and parks the rest, within HEADGATE_SHUTDOWN_TIMEOUT; a second signal ends at
    once. Exits 0 after a clean end, 1 after a fault.
    """
    settings = load_settings()
    from streams.app import run_worker

    try:
        code = run_worker(settings)
    except OSError as fault:
        if "attempting to bind" not in str(fault):
            raise
        why = os.strerror(fault.errno or 0).lower()
        raise click.ClickException(
            f"HEADGATE_HTTP_PORT={settings.worker.http_port}: cannot listen there ({why}); "
            "give another port, or 0 for one that is free"
        ) from None
    sys.exit(code)
