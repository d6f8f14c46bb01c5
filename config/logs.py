"""Logs: structlog to stderr, JSON or console, a constant event and fields. Never a payload or a secret.

What is logged is let through by kind: texts, numbers and collections of them. Bytes show their length alone, objects
their type, and fields whose names say that they are secret nothing, so that no slip prints an event or a key. What
the libraries below log through the standard library takes the same way, from WARNING up, and not again and again.
"""

import logging
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Final, TextIO

import msgspec
import structlog
from pydantic import SecretBytes, SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from config.settings import LogSettings
from schemas.ids import TenantRef

MAX_TEXT: Final = 1000
MAX_TRACE: Final = 16_000
MAX_ITEMS: Final = 20
MAX_DEPTH: Final = 3
REPEAT_S: Final = 10.0
MAX_REPEATS: Final = 256
MASK: Final = "***"

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_SECRET_NAMES: Final = frozenset(
    {
        "authorization",
        "body",
        "data_key",
        "headers",
        "master_key",
        "password",
        "payload",
        "plaintext",
        "secret",
        "secrets",
        "signing",
        "token",
        "value",
        "values",
    }
)
# stacks, without the locals of their frames
_STACKS: Final = frozenset({"exception", "stack"})


def configure_logs(settings: LogSettings, *, worker: str | None = None, stream: TextIO | None = None) -> None:
    """Sets structlog and the standard library's logging up, for this process. Every line names `worker` if given.

    `stream` is stderr if None. Calling it again replaces what was set up.
    """
    out = sys.stderr if stream is None else stream
    level = _LEVELS[settings.level]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([_bind_worker(worker)] if worker else []),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        mask,
    ]
    if settings.format == "json":
        render: list[Processor] = [structlog.processors.JSONRenderer(serializer=_json)]
    else:
        colors = hasattr(out, "isatty") and out.isatty()
        # tracebacks come as text from above: a pretty printer would show the locals of each frame
        render = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.addFilter(_Repeats())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=()), _name_library, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    for name in list(logging.root.manager.loggerDict):
        # some libraries set a level or a handler of their own when they are imported
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.NOTSET)
    logging.captureWarnings(True)


def mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Lets through what cannot be a payload or a secret."""
    for name, value in event.items():
        if name in _SECRET_NAMES:
            event[name] = MASK
        else:
            event[name] = _text(str(value), MAX_TRACE) if name in _STACKS else _shown(value, MAX_DEPTH)
    return event


def _text(text: str, most: int) -> str:
    whole = text if text.isascii() else text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= most else f"{whole[:most]}… ({len(whole)} characters)"


def _shown(value: object, depth: int) -> object:
    match value:
        case None | bool() | float():
            return value
        case int():
            return value if -(2**63) <= value < 2**64 else str(value)
        case Enum():
            return _shown(value.value, depth)
        case str():
            return _text(value, MAX_TEXT)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case msgspec.Raw():
            return f"<{len(bytes(value))} bytes>"
        case SecretStr() | SecretBytes():
            return MASK
        case TenantRef():
            return f"{value.vendor}/{value.tenant}"
        case PurePath():
            return str(value)
        case BaseException():
            return _text(f"{type(value).__name__}: {value}", MAX_TEXT)
        case Mapping() if depth:
            items = list(value.items())[:MAX_ITEMS]
            return {str(name): MASK if name in _SECRET_NAMES else _shown(item, depth - 1) for name, item in items}
        case list() | tuple() | set() | frozenset() if depth:
            return [_shown(item, depth - 1) for item in list(value)[:MAX_ITEMS]]
        case _:
            return f"<{type(value).__name__}>"


def _bind_worker(worker: str) -> Processor:
    def bind(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["worker"] = worker
        return event

    return bind


class _Repeats(logging.Filter):
    """Lets what a library says again and again through once in `REPEAT_S`, with how often it was left out.

    A client without its broker complains at each attempt, a hundred times a second. What differs only in its arguments
    is the same; the clock is the record's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.levelno, str(record.msg)[:MAX_TEXT])
        at_s, left_out = self._said.get(key, (-REPEAT_S, 0))
        if 0 <= record.created - at_s < REPEAT_S:
            self._said[key] = (at_s, left_out + 1)
            return False
        if len(self._said) >= MAX_REPEATS:
            self._said.clear()
        self._said[key] = (record.created, 0)
        record.left_out = left_out
        return True


def _name_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A library's message varies: it becomes a field of a constant event."""
    record: logging.LogRecord = event["_record"]
    event["library"] = record.name
    if left_out := record.__dict__["left_out"]:
        event["left_out"] = left_out
    event["message"] = str(event.pop("event"))
    event["event"] = "library"
    return event


def _json(event: object, **_: object) -> str:
    return msgspec.json.encode(event).decode()
