"""The broker's jars: exactly those of `kafka-jars.lock`, fetched one by one and checked here.

Owns the cache folder and its checksums; `broker.py` runs what lies in it. The fetcher (jgo) only downloads: it is never
asked to resolve a tree, because it then mixes in other versions than the broker was released with, and its own checksum
check only warns. So every jar is compared with the lock when it arrives and again at each start.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

from msgspec import Struct

LOCK: Final = Path(__file__).with_name("kafka-jars.lock")
FETCHES_AT_ONCE: Final = 8
FETCH_TIMEOUT_S: Final = 60
TRIES: Final = 3

Say = Callable[[str], None]
"""Takes one line of progress, meant for a person."""


class JarError(Exception):
    """A jar cannot be had, or is not the one that the lock names. The message is for the user."""


class Jar(Struct, frozen=True):
    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    def __str__(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"


def locked(lock: Path = LOCK) -> tuple[Jar, ...]:
    """The jars of the lock file, in its order: `group:artifact:version sha256:<hex>` a line."""
    jars = []
    for number, line in enumerate(lock.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match line.replace(" sha256:", ":").split(":"):
            case [group, artifact, version, digest] if len(digest) == 64:
                jars.append(Jar(group, artifact, version, digest))
            case _:
                raise JarError(f"{lock}:{number}: expected 'group:artifact:version sha256:<64 hex digits>'")
    return tuple(jars)


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where jars are kept between stacks.

    `HEADGATE_CACHE_DIR` if set; else under `XDG_CACHE_HOME` if that is set; else beside a checkout's code, so that
    removing the checkout removes everything; else the user's own cache.
    """
    if named := environ.get("HEADGATE_CACHE_DIR"):
        return Path(named).expanduser().resolve()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().resolve() / "headgate"
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".headgate-cache"
    return Path.home() / ".cache" / "headgate"


def fetch_all(
    cache: Path, say: Say, *, jars: Sequence[Jar] | None = None, remotes: Mapping[str, str] | None = None
) -> list[Path]:
    """The paths of all jars in the lock's order; fetches those that are missing or damaged.

    `remotes` are Maven repositories by name, the public one if None. A jar takes its place by a rename, after its
    checksum was compared, so a reader never sees half a file and concurrent fetches of the same jar are harmless.
    """
    wanted = locked() if jars is None else tuple(jars)
    folder = cache / "jars"
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for jar in wanted:
        path = folder / jar.file_name
        if not path.exists():
            missing.append(jar)
        elif _sha256(path) != jar.sha256:
            say(f"{path} does not match its checksum in {LOCK.name}: fetching it again")
            missing.append(jar)
    if missing:
        say(f"fetching {len(missing)} of {len(wanted)} jars into {folder}")
        with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="jars") as pool:
            coming = [pool.submit(_fetch, jar, folder, remotes) for jar in missing]
            try:
                for done, one in enumerate(as_completed(coming), 1):
                    one.result()
                    if done % 10 == 0 or done == len(missing):
                        say(f"  {done} of {len(missing)}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [folder / jar.file_name for jar in wanted]


def _fetch(jar: Jar, folder: Path, remotes: Mapping[str, str] | None) -> Path:
    """Fetch one jar into `folder` and return its path there."""
    # imported here: only those who start a broker have the `embedded` extra
    from jgo.maven import MavenContext

    problem = ""
    for _ in range(TRIES):
        # a fresh folder each time: jgo takes whatever lies in its cache for good, half a file too
        scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
        try:
            context = MavenContext(
                repo_cache=scratch, remote_repos=dict(remotes) if remotes else None, timeout=FETCH_TIMEOUT_S
            )
            arrived = Path(context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve())
            found = _sha256(arrived)
            if found != jar.sha256:
                raise JarError(
                    f"{jar}: refused, what arrived has sha256 {found}, {LOCK.name} says {jar.sha256}. "
                    "The repository, or something on the way to it, hands out other bytes than were released."
                )
            return arrived.replace(folder / jar.file_name)
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; jgo raises RuntimeError for a 404
            problem = f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise JarError(f"{jar}: cannot be fetched ({problem}). Is Maven Central reachable?")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
