"""The embedded S3: moto's server as a process, with STS beside it. It keeps objects in memory and knows conditional
writes, but believes every access key: enough to see what arrives, not to see what is refused.

Owns how it is started and asked; `stack.py` owns its folder, its port and its life.
"""

import http.client
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Final

from dev import process
from dev.process import Proc

START_TIMEOUT_S: Final = 30
REGION: Final = "us-east-1"


def start(home: Path, port: int) -> Proc:
    """Begins to start it; `answers` tells when it is ready. Raises nothing: its log tells why it ended."""
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # what is set for somebody's real account has no say here
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))}
    return process.spawn(command, cwd=home, log=log(home), environ=environ)


def log(home: Path) -> Path:
    return home / "s3.log"


def url(port: int) -> str:
    """The endpoint of both S3 (`path_style: true`) and STS."""
    return f"http://127.0.0.1:{port}"


def version() -> str:
    return version_of("moto")


def answers(port: int, timeout_s: float = 1.0) -> bool:
    return _asked("GET", "/moto-api/data.json", port, timeout_s) == 200


def make_bucket(port: int, name: str, timeout_s: float = 10.0) -> None:
    """There afterwards, whether it was there or not. Raises OSError."""
    if (status := _asked("PUT", f"/{name}", port, timeout_s)) != 200:
        raise OSError(f"the embedded S3 did not make the bucket {name}: it answered {status}")


def _asked(method: str, path: str, port: int, timeout_s: float) -> int:
    """The status; 0 where nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
    return answer.status
