"""The request: its head, and the signature of Standard Webhooks 1.0 over the body."""

import hashlib
from binascii import b2a_base64
from collections.abc import Mapping, Sequence

from connectors.body import body
from connectors.http.client import USER_AGENT
from schemas.delivery import Delivery


class Signer:
    """Signs with every live key. HMAC-SHA256 with its two padded halves kept: 1.4 us a key, half of `hmac.digest`."""

    __slots__ = ("_pads",)

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._pads = tuple((_pad(key, 0x36), _pad(key, 0x5C)) for key in keys)

    def sign(self, ident: bytes, timestamp: bytes, content: bytes) -> bytes:
        """The value of `webhook-signature`: one `v1,<base64>` for each key, separated by spaces."""
        signatures = b""
        prefix = b"%b.%b." % (ident, timestamp)
        for inner_pad, outer_pad in self._pads:
            inner = inner_pad.copy()
            inner.update(prefix)
            inner.update(content)
            outer = outer_pad.copy()
            outer.update(inner.digest())
            signature = b"v1," + b2a_base64(outer.digest(), newline=False)
            signatures = signatures + b" " + signature if signatures else signature
        return signatures


def _pad(key: bytes, value: int) -> "hashlib._Hash":
    """The hash of one padded half of the key. Keys have at most 64 bytes, SHA-256's block, so none is hashed first."""
    return hashlib.sha256(bytes(byte ^ value for byte in key.ljust(64, b"\0")))


def fixed_headers(custom: Mapping[str, str]) -> bytes:
    """The header lines that are the same for every request of a destination."""
    lines = [f"content-type: application/json\r\nuser-agent: {USER_AGENT}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in custom.items()]
    return "".join(lines).encode("ascii")


def message(start: bytes, signer: Signer, delivery: Delivery, at_ms: int) -> bytes:
    """The whole request of one attempt, signed. `start` is what its head begins with: the target's lines and the fixed.

    Built in one step: every byte of it is copied once.
    """
    content = body(delivery.event)
    ident = delivery.id.encode("ascii")
    timestamp = b"%d" % (at_ms // 1000)
    return (
        b"%bwebhook-id: %b\r\nwebhook-timestamp: %b\r\nwebhook-signature: %b\r\nheadgate-attempt: %d\r\n"
        b"content-length: %d\r\n\r\n%b"
    ) % (
        start,
        ident,
        timestamp,
        signer.sign(ident, timestamp, content),
        delivery.attempt + 1,
        len(content),
        content,
    )
