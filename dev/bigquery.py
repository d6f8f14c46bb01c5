"""A BigQuery endpoint for development: `bqemulator` (DuckDB) as a process of its own, REST and gRPC on loopback.

It asks nobody who they are, and takes rows that BigQuery refuses: it shows how things fit together, not what is
allowed. All data are in memory and end with the process.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Final

from dev import process, wait
from dev.process import Condition, Proc

LOG: Final = "bigquery.log"
PROJECT: Final = "headgate-dev"
START_TIMEOUT_S: Final = 120.0
_ANSWER_TIMEOUT_S: Final = 60.0


class BigQueryError(Exception):
    """The endpoint cannot do what was asked. The message is for the user."""


def rest_url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def grpc_address(port: int) -> str:
    return f"127.0.0.1:{port}"


def version() -> str:
    return version_of("bqemulator")


def start(home: Path, rest_port: int, grpc_port: int) -> Proc:
    """Starts the endpoint; `home` takes its log. Does not wait for it."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dev.bigquery", str(rest_port), str(grpc_port)]
    environ = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        # what it would fetch from DuckDB's own site, for formats that nobody uses here
        "BQEMU_ENABLE_FORMAT_EXTENSIONS": "false",
    }
    return process.spawn(command, cwd=home, log=home / LOG, environ=environ)


def answers(rest_port: int) -> bool:
    try:
        _ask("GET", rest_port, "/readyz")
    except (OSError, ValueError):
        return False
    return True


def wait_ready(proc: Proc, home: Path, rest_port: int, grpc_port: int) -> None:
    """Raises `BigQueryError`, with the end of the log, where it does not come up."""
    wait.until(
        lambda: (answers(rest_port) and not wait.is_free(grpc_port)) or process.condition(proc) is Condition.GONE,
        START_TIMEOUT_S,
    )
    if process.condition(proc) is Condition.GONE or not answers(rest_port) or wait.is_free(grpc_port):
        process.end(proc, grace_s=0)
        log = home / LOG
        raise BigQueryError(f"BigQuery's endpoint did not start; see {log}:\n" + log.read_text()[-2000:])


def make_dataset(rest_port: int, project: str, dataset: str) -> None:
    """One that exists is left as it is."""
    what = {"datasetReference": {"projectId": project, "datasetId": dataset}}
    try:
        _ask("POST", rest_port, f"/bigquery/v2/projects/{project}/datasets", what)
    except urllib.error.HTTPError as fault:
        if fault.code != 409:
            raise BigQueryError(f"dataset {dataset} of project {project} was not made: {fault}") from fault


def tables(rest_port: int, project: str, dataset: str) -> list[str]:
    found = _ask("GET", rest_port, f"/bigquery/v2/projects/{project}/datasets/{dataset}/tables?maxResults=1000")
    return [table["tableReference"]["tableId"] for table in found.get("tables", ())]


def table(rest_port: int, project: str, dataset: str, name: str) -> Any:
    """As the REST API describes it."""
    return _ask("GET", rest_port, f"/bigquery/v2/projects/{project}/datasets/{dataset}/tables/{name}")


def make_table(rest_port: int, project: str, dataset: str, name: str, columns: Sequence[Mapping[str, str]]) -> None:
    reference = {"projectId": project, "datasetId": dataset, "tableId": name}
    what = {"tableReference": reference, "schema": {"fields": columns}}
    _ask("POST", rest_port, f"/bigquery/v2/projects/{project}/datasets/{dataset}/tables", what)


def query(rest_port: int, project: str, sql: str) -> list[list[str | None]]:
    """The rows of a query, each cell as BigQuery writes it in JSON."""
    asked = {"query": sql, "useLegacySql": False, "maxResults": 1_000_000}
    found = _ask("POST", rest_port, f"/bigquery/v2/projects/{project}/queries", asked)
    return [[cell["v"] for cell in row["f"]] for row in found.get("rows", ())]


def _ask(method: str, rest_port: int, path: str, what: Any = None) -> Any:
    request = urllib.request.Request(
        rest_url(rest_port) + path,
        json.dumps(what).encode() if what is not None else None,
        {"content-type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as answer:
        return json.loads(answer.read())


def main(rest_port: str, grpc_port: str) -> None:
    """The process itself: the emulator without the extension for geography, which it would download."""
    from bqemulator.cli import main as emulator
    from bqemulator.storage.engine import DuckDBEngine

    DuckDBEngine._load_spatial = lambda _: None
    emulator(
        ["start", "--ephemeral", "--rest-port", rest_port, "--grpc-port", grpc_port, "--log-level", "error"],
        prog_name="bqemulator",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
