"""The `headgate` command: its help, and which module has which command.

A command's module is imported when it runs, so that the help appears at once.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import click
from click.shell_completion import CompletionItem

from cli.groups import refuse_command
from cli.later import later

_SECTIONS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Try it": {
        "demo": ("cli.demo:command", "Tenants, events and an inbox on this machine, live."),
        "dev": ("cli.dev:group", "A real Kafka and Redis as background processes: up, down, status."),
    },
    "Configure": {
        "apply": ("cli.apply:command", "Make the tenants what a file says, all or nothing."),
        "get": ("cli.get:group", "Show tenants, destinations or routes."),
        "filter": ("cli.filter:command", "Check a filter, and try it on events."),
        "destinations": ("cli.destinations:group", "Hold a destination, or enable it again."),
    },
    "Keep secret": {
        "secrets": ("cli.secrets:group", "Rotate the signing secret of a destination."),
        "keys": ("cli.keys:group", "Rotate keys; shred a tenant's key, and end a removed tenant."),
    },
    "Kafka's users": {
        "acls": ("cli.acls:command", "What each user may do in Kafka: print it, or give it."),
    },
    "Run": {
        "worker": ("cli.worker:command", "Deliver events until SIGTERM."),
        "publish": ("cli.publish:command", "Publish events from a file or from stdin."),
        "trace": ("cli.trace:command", "What became of an event: routes, attempts, where it is now."),
        "dlq": ("cli.dlq:group", "Look at dead letters, send them again, or drop them."),
        "doctor": ("cli.doctor:command", "Check a deployment, and say what to do."),
    },
    "Shell": {
        "completion": ("cli.completion:command", "Completion for bash, zsh or fish."),
    },
}
_LATER: Final = {
    "projector": "the API's projections",
    "api": "the admin and tenant API",
    "isolation": "proof of isolation",
    "check": "a check of a destination",
}
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMMANDS: Final = {name: found for section in _SECTIONS.values() for name, found in section.items()}

_HELP = """Delivers your events to your customers' own destinations, isolated by tenant.

Kafka is the log, the queue and the retry clock; a tenant is one customer, named by its customerExternalId.

\b
Five minutes to a first delivery:
  headgate dev up                          a Kafka and a Redis on this machine
  headgate apply -f headgate.yaml          tenants, destinations, routes
  headgate worker                          delivers (leave it running)
  headgate publish -f events.ndjson        one event a line
  headgate dlq list --tenant acme          what could not be delivered
  headgate dlq replay --tenant acme        sends it again

Settings come from HEADGATE_… environment variables; without HEADGATE_KAFKA_BOOTSTRAP, the stack of `headgate dev up` in
this folder is used. Results go to stdout, all else to stderr. Exit 0: done, 1: a fault, 2: wrong use.
"""


class Sections(click.Group):
    """A group that imports a command when it is used, and lists commands by what they are for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LATER:
            return later(cmd_name, _LATER[cmd_name])
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and name not in _COMMANDS and name not in _LATER:
            refuse_command(ctx, name, list(_COMMANDS))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Without importing the commands: a key press waits for it."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=text) for name, (_, text) in _COMMANDS.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])
        with formatter.section("With a later release"):
            formatter.write_text(", ".join(_LATER))


def _version(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"headgate {version('headgate')}")
        except PackageNotFoundError:  # run from a source tree that was not installed
            click.echo("headgate dev")
        ctx.exit()


@click.command(cls=Sections, help=_HELP, context_settings={"max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def command() -> None:
    """See `_HELP`."""


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Exits 0, 1 for a fault, 2 for wrong use, 130 when interrupted."""
    try:
        code = command.main(args, prog_name="headgate", standalone_mode=False)
    except click.ClickException as fault:
        fault.show()
        sys.exit(fault.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # who read our output has gone; keep the interpreter from complaining about it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as fault:
        if fault.errno not in _NO_ROOM:
            raise
        click.echo(f"Error: cannot write: {fault.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
