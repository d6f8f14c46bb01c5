"""The upcasters that installed packages bring (`schemas/upcast.py` says what they are)."""

from importlib.metadata import entry_points

from config.settings import SettingsError
from schemas.upcast import GROUP, Upcasters


def installed_upcasters() -> Upcasters:
    """Of every entry point of the group. Raises `SettingsError`: with some of them, events would be misread."""
    upcasters = Upcasters()
    problems = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()(upcasters)
        except Exception as fault:  # code of another package
            package = entry.dist.name if entry.dist is not None else "unknown"
            why = f"{type(fault).__name__}: {fault}"
            problems.append(
                f"entry point {GROUP}: {entry.name} = {entry.value} of package {package}: {why[:300]}; "
                "mend the package, or uninstall it"
            )
    if problems:
        raise SettingsError(problems)
    return upcasters
