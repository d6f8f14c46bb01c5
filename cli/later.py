"""Names of commands that the design fixes and a later release brings: known, and refused with exit 2."""

from collections.abc import Sequence

import click


def later(path: str, what: str) -> click.Command:
    """A command that says so, whatever it is given. `path` is how it is called, without `headgate`."""

    def refuse(rest: Sequence[str]) -> None:
        raise click.UsageError(f"`headgate {path}` ({what}) arrives with a later release")

    return click.Command(
        path.rpartition(" ")[2],
        callback=refuse,
        params=[click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
        hidden=True,
    )
