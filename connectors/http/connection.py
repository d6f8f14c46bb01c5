"""One connection: TCP connect, TLS handshake, then one request at a time and what the far side says to it.

Nothing the far side does may cost more than a bounded amount of memory or raise anything: what is not HTTP/1.1 is the
fault `protocol`. A 2xx answer needs no header, so none is looked at; the head of any other answer is kept and searched.
"""

import errno
import fcntl
import select
import socket
import ssl
import struct
import termios
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import httptools

from connectors.http.answer import (
    MAX_ANSWER_BYTES,
    MAX_HEAD_BYTES,
    Answer,
    Fault,
    ends_with_connection,
    final_head,
    retry_after,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

    from connectors.http.client import Exchange, HttpClient

READ_BYTES: Final = 16 * 1024
# What a large request may send in one turn of the loop: in TLS some 0.3 ms.
WRITE_BYTES: Final = 256 * 1024
# An answer up to this size is remembered: most receivers give the same one again and again.
MAX_USUAL_BYTES: Final = 1024
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    __slots__ = (
        "__weakref__",
        "_carried",
        "_client",
        "_closed",
        "_complete",
        "_excerpt",
        "_extra",
        "_feed",
        "_head",
        "_headers_done",
        "_keep",
        "_out",
        "_parser",
        "_received",
        "_recv",
        "_send",
        "_socket",
        "_status",
        "_usual",
        "_usual_answer",
        "event",
        "exchange",
        "fd",
        "target",
    )

    def __init__(self, client: "HttpClient", exchange: "Exchange", made: socket.socket) -> None:
        self._client = client
        self._socket = made
        self._closed = False
        # the step that comes next, called with the mask of each event
        self.event: Callable[[int], None] = self._connected
        self.fd = made.fileno()
        self.target = exchange.target
        self.exchange: Exchange | None = exchange
        exchange.connection = self
        self._carried = 0
        self._out: memoryview | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._recv: Callable[[int], bytes] = made.recv
        self._send: Callable[[Buffer], int] = made.send
        self._usual = b""
        self._usual_answer = Answer(0)
        self._fresh_answer()

    def _fresh_answer(self) -> None:
        self._received = 0
        self._head = b""
        self._headers_done = False
        self._complete = False
        self._extra = False
        self._keep = False
        self._status = 0
        self._excerpt = b""

    # ------------------------------------------------------------------ events

    def _connected(self, _mask: int) -> None:
        exchange = self.exchange
        assert exchange is not None
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._client.not_connected(self, exchange, number)
            return
        self._client.connected(self)
        if not self.target.place.tls:
            self._open(exchange)
            return
        exchange.step = "tls"
        try:
            context = self.target.tls_context()
        except (ssl.SSLError, OSError):
            self._fault("client_identity", "the client certificate and its key cannot be used together")
            return
        try:
            tls = context.wrap_socket(
                self._socket, server_hostname=self.target.place.host, do_handshake_on_connect=False
            )
        except OSError as fault:  # the far side is gone already
            self._fault("reset", fault.strerror or "the connection was reset")
            return
        self._socket = tls
        self._recv = tls.read
        self._send = tls.write
        self.event = self._shake
        self._shake()

    def _shake(self, _mask: int = 0) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self._client.watch(self, writable=False)
            return
        except ssl.SSLWantWriteError:
            self._client.watch(self, writable=True)
            return
        except ssl.SSLCertVerificationError as fault:
            self._fault("tls", f"the certificate was not accepted: {fault.verify_message}")
            return
        except (OSError, ValueError) as fault:
            self._fault("tls", f"the TLS handshake failed: {_reason(fault)}")
            return
        exchange = self.exchange
        assert exchange is not None
        self._open(exchange)

    def _open(self, exchange: "Exchange") -> None:
        exchange.step = "answer"
        self.event = self._read
        self._client.watch(self, writable=False)
        if exchange.message:
            self.carry(exchange)
        else:
            self.exchange = None
            self.close()
            self._client.finish(exchange, Answer(0))

    # ------------------------------------------------------------------ the request

    def carry(self, exchange: "Exchange") -> None:
        """Sends a request. What goes wrong shows up as an event, never from here."""
        self.exchange = exchange
        exchange.connection = self
        self._carried += 1
        message = exchange.message
        send = self._send
        try:
            sent = send(message if len(message) <= WRITE_BYTES else memoryview(message)[:WRITE_BYTES])
        except _NOT_NOW:
            sent = 0
        except OSError:
            if self._carried > 1:
                self._again(exchange)
            # a fresh connection that broke at once: its event tells how, after what it may have answered
            return
        if sent < len(message):
            self._out = memoryview(message)[sent:]
            self.event = self._write_and_read
            self._client.watch(self, writable=True)

    def _write_and_read(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._write()
        if mask & ~select.EPOLLOUT and not self._closed:
            self._read()

    def _write(self) -> None:
        out = self._out
        assert out is not None
        enough = len(out) - WRITE_BYTES
        try:
            while out:
                if len(out) < enough:
                    raise BlockingIOError
                out = out[self._send(out) :]
        except _NOT_NOW:
            self._out = out
            return
        except OSError:
            # an answer may have come before the far side closed: reading tells
            self._client.watch(self, writable=False)
            self._read()
            return
        self._out = None
        self.event = self._read
        self._client.watch(self, writable=False)

    def _again(self, exchange: "Exchange") -> None:
        """A kept connection turned out to be closed and the far side got nothing: the same attempt, once more."""
        self.exchange = None
        exchange.connection = None
        self.close()
        self._client.connect(exchange)

    def _unread(self) -> bool:
        """Whether the far side's system has acknowledged nothing of this request: then it was never read.

        Only after an orderly end is this certain; a reset can overtake the acknowledgement.
        """
        exchange = self.exchange
        assert exchange is not None
        unsent = len(self._out) if self._out is not None else 0
        answer = bytearray(4)
        try:
            fcntl.ioctl(self.fd, termios.TIOCOUTQ, answer)
        except OSError:
            return False
        waiting: int = struct.unpack("i", answer)[0]
        return waiting >= len(exchange.message) - unsent

    # ------------------------------------------------------------------ the answer

    def _read(self, _mask: int = 0) -> None:
        received = self._received
        recv = self._recv  # first, because CPython 3.11 is slow at a call by way of a slot: 30 ns each
        try:
            data = recv(READ_BYTES if not received else min(READ_BYTES, MAX_ANSWER_BYTES - received))
        except _NOT_NOW:
            return
        except ssl.SSLError as fault:
            self._fault("tls", f"TLS ended: {_reason(fault)}")
            return
        except OSError:
            self._fault("reset", "the connection was reset")
            return
        if not data:
            self._end()
            return
        exchange = self.exchange
        if exchange is None:  # an answer that nobody asked for
            self.close()
            return
        if data == self._usual and not received and self._out is None and not self.target.closed:
            # the parser stands between two answers, and has made `_usual_answer` of these very bytes from there before
            self.exchange = None
            self._client.keep(self)
            self._client.finish(exchange, self._usual_answer)
            return
        if not self._headers_done:
            self._head = self._head + data if self._head else data
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._complete:
                self._fault("protocol", "the answer is not HTTP/1.1")
                return
            self._extra = True
        if self._complete:
            self._answer(b"" if received else data)
            return
        received += len(data)
        self._received = received
        if not self._headers_done:
            if received >= MAX_HEAD_BYTES:
                self._fault("headers_too_large", f"the answer's headers exceed {MAX_HEAD_BYTES // 1024} KiB")
        elif received >= MAX_ANSWER_BYTES:
            self._status = self._parser.get_status_code()
            self._answer()

    def _end(self) -> None:
        """The far side has closed, or half-closed, the connection."""
        exchange = self.exchange
        if exchange is None:
            self.close()
        elif not self._received and self._carried > 1 and self._unread():
            self._again(exchange)
        elif self._headers_done and ends_with_connection(self._head):
            self._status = self._parser.get_status_code()
            self._answer()
        else:
            self._fault("reset", "the connection was closed before the answer was complete")

    def _answer(self, whole: bytes = b"") -> None:
        """`whole` are all its bytes, where one read brought them."""
        exchange = self.exchange
        assert exchange is not None
        status = self._status
        if not 200 <= status < 600:
            self._fault("protocol", "the answer's status is not one of HTTP")
            return
        answer = Answer(
            status,
            "",
            "",
            "" if 200 <= status < 300 else retry_after(self._head),
            self._excerpt,
            self._carried > 1,
            head=final_head(self._head) if self.target.keeps_head else b"",
        )
        self.exchange = None
        if self._keep and not self._extra and self._out is None and not self.target.closed:
            if answer.reused and 0 < len(whole) <= MAX_USUAL_BYTES:
                self._usual = whole
                self._usual_answer = answer
            self._fresh_answer()
            self._client.keep(self)
        else:
            self.close()
        self._client.finish(exchange, answer)

    def _fault(self, fault: Fault, detail: str) -> None:
        exchange = self.exchange
        self.exchange = None
        self.close()
        if exchange is not None:
            self._client.finish(exchange, Answer(0, fault, detail, step=exchange.step, reused=self._carried > 1))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._client.release(self, self._socket)
        # the parser and this object hold each other: let go, so that memory does not wait for the collector
        del self.event, self._feed, self._parser, self._recv, self._send

    # ------------------------------------------------------------------ the parser's callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            self._extra = True

    def on_headers_complete(self) -> None:
        self._headers_done = True
        if self.target.keeps_head and not self._complete:
            exchange = self.exchange
            status = self._parser.get_status_code()
            if exchange is not None and exchange.message.startswith(b"HEAD ") and status >= 200:
                # the parser waits for the body that the headers announce and that never comes: the connection goes
                self._status = status
                self._complete = True

    def on_body(self, data: bytes) -> None:
        room = self.target.excerpt_bytes - len(self._excerpt)
        if room > 0 and not self._complete:
            self._excerpt += data[:room]

    def on_message_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200:  # interim; 101 makes the parser raise: nobody asked for an upgrade
            self._headers_done = False
            return
        self._status = status
        self._keep = self._parser.should_keep_alive()
        self._complete = True


def _reason(fault: Exception) -> str:
    """OpenSSL's or the system's short reason; quotes nothing that the far side sent."""
    if isinstance(fault, ssl.SSLError) and fault.reason:
        return fault.reason.lower().replace("_", " ")
    number = fault.errno if isinstance(fault, OSError) else None
    return errno.errorcode.get(number or 0, "the connection was closed")
