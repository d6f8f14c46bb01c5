"""What came of a request, and reading a response head that turned out to matter."""

import re
from typing import Final, Literal, TypeAlias

from msgspec import Struct

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_EXCERPT_BYTES: Final = 4096

Fault: TypeAlias = Literal[
    "",
    "dns",
    "egress_blocked",
    "connect_refused",
    "unreachable",
    "tls",
    "timeout",
    "reset",
    "protocol",
    "headers_too_large",
    "client_identity",
    "no_resources",
    "closed",
]
Step: TypeAlias = Literal["resolve", "connect", "tls", "answer"]


class Answer(Struct, frozen=True, gc=False):
    """The end of one request: `status` 0 and a `fault`, or a status.

    `detail` says more of a fault and quotes nothing that the far side sent. `retry_after` is the raw header, read only
    where the status is not 2xx. `excerpt` is the body as it came, still compressed if it was, up to what its target
    keeps. `reused`: the connection had carried a request before. `step`: how far the request came. `head` is the raw
    head, where its target keeps it.
    """

    status: int
    fault: Fault = ""
    detail: str = ""
    retry_after: str = ""
    excerpt: bytes = b""
    reused: bool = False
    step: Step = "answer"
    head: bytes = b""


_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after:[ \t]*([^\r\n]{0,200})", re.IGNORECASE)
_FRAMED: Final = re.compile(rb"\r\n(?:content-length:|transfer-encoding:[^\r\n]*chunked)", re.IGNORECASE)


def final_head(raw: bytes) -> bytes:
    """The head of the final response in `raw`, interim (1xx) ones skipped, up to its empty line."""
    start = len(raw) - len(raw.lstrip(b"\r\n"))
    while raw[start + 9 : start + 10] == b"1":
        end = raw.find(b"\r\n\r\n", start)
        if end < 0:
            break
        start = end + 4
    end = raw.find(b"\r\n\r\n", start)
    return raw[start:] if end < 0 else raw[start:end]


def retry_after(raw: bytes) -> str:
    found = _RETRY_AFTER.search(final_head(raw))
    return "" if found is None else found[1].decode("latin-1").strip()


def ends_with_connection(raw: bytes) -> bool:
    """Whether only the end of the connection ends the body: no length and no chunks were announced."""
    return _FRAMED.search(final_head(raw)) is None
