"""What is logged: a constant event and fields, and never a payload or a secret."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from config.kafka import client_config
from config.logs import configure_logs, mask
from config.settings import LogFormat, LogLevel, LogSettings
from config.vault import MasterKeys, Vault
from schemas.event import Event
from schemas.ids import ExternalId, TenantRef, Vendor

CANARY = "canary-4711"
ACME = TenantRef(Vendor("default"), ExternalId("acme"))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is the process's: later tests find it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def set_up(format: LogFormat = "json", level: LogLevel = "info", worker: str | None = None) -> io.StringIO:
    out = io.StringIO()
    configure_logs(LogSettings(format, level), worker=worker, stream=out)
    return out


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_has_its_event_its_fields_its_level_and_the_worker() -> None:
    out = set_up(worker="headgate-0")
    structlog.get_logger().info("worker_started", tenant=ACME, port=8080, topics=["a", "b"])
    (line,) = lines(out)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "worker_started",
        "level": "info",
        "worker": "headgate-0",
        "tenant": "default/acme",
        "port": 8080,
        "topics": ["a", "b"],
    }


def test_what_a_library_says_again_and_again_comes_once_in_ten_seconds() -> None:
    out = set_up()
    library = logging.getLogger("aiokafka")
    for second in range(25):
        record = library.makeRecord("aiokafka", logging.ERROR, "", 0, "node %s is away", (second % 3,), None)
        record.created = 1e9 + second
        library.handle(record)
    library.error("the coordinator is away")
    told = [(line["message"], line.get("left_out", 0)) for line in lines(out)]
    assert told == [
        ("node 0 is away", 0),
        ("node 1 is away", 9),
        ("node 2 is away", 9),
        ("the coordinator is away", 0),
    ]


def test_what_a_command_says_itself_of_kafka_is_not_heard_from_the_library_too() -> None:
    out = set_up()
    client_config({})["logger"].error("connection refused")
    logging.getLogger("another").error("is heard")
    assert [line["library"] for line in lines(out)] == ["another"]


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_the_least_that_is_written(level: LogLevel, count: int) -> None:
    out = set_up(level=level)
    log = structlog.get_logger()
    log.debug("one")
    log.info("two")
    log.warning("three")
    log.error("four")
    assert len(lines(out)) == count


@pytest.mark.parametrize("name", ["faust.agents", "mode.services", "aiokafka.consumer.fetcher", "asyncio"])
def test_libraries_are_heard_from_warning_up_as_a_constant_event(name: str) -> None:
    library = logging.getLogger(name)
    library.setLevel(logging.DEBUG)  # as one that sets its own
    out = set_up(level="debug")
    library.debug("chatter")
    library.info("chatter")
    library.warning("lost %s", "a broker")
    (line,) = lines(out)
    assert (line["event"], line["library"], line["message"]) == ("library", name, "lost a broker")
    assert line["level"] == "warning"


def test_warnings_of_python_become_lines() -> None:
    out = set_up()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    assert [line["event"] for line in lines(out)] == ["library"]


@pytest.mark.parametrize("format", ["json", "console"])
def test_no_payload_and_no_secret_gets_through(format: LogFormat) -> None:
    out = set_up(format)
    payload = json.dumps({"card": CANARY}).encode()
    key = CANARY.encode().ljust(32)
    log = structlog.get_logger()
    log.info(
        "everything",
        secret_string=SecretStr(CANARY),
        raw=msgspec.Raw(payload),
        some_bytes=payload,
        view=memoryview(payload),
        event_struct=Event(eventType="t", payload=msgspec.Raw(payload)),
        an_object=type("Holder", (), {"__repr__": lambda self: CANARY})(),
        password=CANARY,
        payload=CANARY,
        nested={"deep": [{"authorization": CANARY, "value": payload, "list": [payload]}]},
        vault=Vault(ACME, {1: key}, 1),
        master=MasterKeys({"k1": key}),
    )
    try:
        local_of_the_frame = CANARY
        assert local_of_the_frame
        raise ValueError("no payload here")
    except ValueError:
        log.exception("failed")
        logging.getLogger("faust").exception("failed")
    told = out.getvalue()
    assert CANARY not in told.replace("local_of_the_frame = CANARY", "")
    assert "no payload here" in told
    assert f"<{len(payload)} bytes>" in told
    log.info("control", shown=CANARY)  # the control: a plain field is shown
    assert CANARY in out.getvalue()


def test_long_texts_are_cut() -> None:
    out = set_up()
    structlog.get_logger().info("long", text="x" * 100_000, many=list(range(1000)))
    logging.getLogger("faust").warning("y" * 100_000)
    assert len(out.getvalue()) < 4000


def test_what_cannot_be_written_plainly_is_written_all_the_same() -> None:
    out = set_up()
    structlog.get_logger().info("odd", lone="\ud800", big=10**30, nan=float("nan"), path=Path("/x"), none=None)
    (line,) = lines(out)
    assert (line["lone"], line["big"], line["nan"], line["path"]) == ("?", str(10**30), None, "/x")


def test_one_line_stays_one_line() -> None:
    formats: tuple[LogFormat, ...] = ("json", "console")
    for format in formats:
        out = set_up(format)
        structlog.get_logger().info("field", text="a\nb\r\nc")
        assert len(out.getvalue().splitlines()) == 1


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.text() | st.binary() | st.floats(), st.lists)))
def test_the_mask_takes_anything(fields: dict[str, Any]) -> None:
    msgspec.json.encode(mask(None, "info", {f"x-{name}": value for name, value in fields.items() if name.isascii()}))
