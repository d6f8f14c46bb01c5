"""The broker's jars are those of the lock, whoever hands them out."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dev import jars
from dev.jars import Jar, JarError

BYTES = b"PK\x03\x04 as released"
JAR = Jar("org.example", "thing", "1.0", hashlib.sha256(BYTES).hexdigest())
PATH = "/org/example/thing/1.0/thing-1.0.jar"


class Repository:
    """A Maven repository on loopback that hands out what a test tells it to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        repository = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                repository.asked.append(self.path)
                body = repository.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("content-length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.remotes = {"test": f"http://127.0.0.1:{self.server.server_port}"}

    def times_asked(self) -> int:
        return self.asked.count(PATH)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    repository = Repository()
    thread = threading.Thread(target=repository.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield repository
    repository.server.shutdown()
    thread.join()
    repository.server.server_close()


def fetch(cache: Path, repository: Repository) -> Path:
    said: list[str] = []
    [path] = jars.fetch_all(cache, said.append, jars=[JAR], remotes=repository.remotes)
    return path


def test_a_jar_with_other_bytes_than_the_lock_names_is_refused_and_not_kept(
    tmp_path: Path, repository: Repository
) -> None:
    repository.files[PATH] = BYTES + b" and one more"
    with pytest.raises(JarError, match=r"org\.example:thing:1\.0: refused.*" + JAR.sha256):
        fetch(tmp_path, repository)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    repository.files[PATH] = BYTES  # the control: the same way with the right bytes
    assert fetch(tmp_path, repository).read_bytes() == BYTES


def test_a_jar_in_the_cache_is_fetched_once_and_again_only_when_it_was_damaged(
    tmp_path: Path, repository: Repository
) -> None:
    repository.files[PATH] = BYTES
    kept = fetch(tmp_path, repository)
    fetch(tmp_path, repository)
    assert repository.times_asked() == 1

    kept.write_bytes(BYTES.replace(b"released", b"tampered"))
    assert fetch(tmp_path, repository).read_bytes() == BYTES
    assert repository.times_asked() == 2


def test_a_jar_that_the_repository_does_not_have_is_named(tmp_path: Path, repository: Repository) -> None:
    with pytest.raises(JarError, match=r"org\.example:thing:1\.0: cannot be fetched"):
        fetch(tmp_path, repository)


def test_a_lock_line_without_a_whole_checksum_is_refused_by_its_number(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(f"a:b:1 sha256:{JAR.sha256}\na:c:1 sha256:12ab\n")
    with pytest.raises(JarError, match=f"{lock}:2:"):
        jars.locked(lock)


def test_the_lock_pins_one_broker_version() -> None:
    pinned = jars.locked()
    assert len({jar.version for jar in pinned if jar.group == "org.apache.kafka"}) == 1
    assert len({jar.file_name for jar in pinned}) == len(pinned)
