"""Where a request goes: the parts of a URL, parsed once and strictly."""

import re
from typing import Final
from urllib.parse import quote, urlsplit

import idna
from msgspec import Struct

from connectors.http.door import literal

MAX_URL_CHARACTERS: Final = 2048
_LABELS: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")


class Place(Struct, frozen=True, gc=False):
    """`host` is a name in ASCII (IDNA) or an address in its canonical spelling; `path` holds the query too."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def tls(self) -> bool:
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """The value of the host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def display(self) -> str:
        """The URL as it may be shown: a query is a place where people put secrets."""
        path, question, _ = self.path.partition("?")
        return f"{self.scheme}://{self.authority}{path}{'?…' if question else ''}"


def parse_url(text: str) -> Place:
    """Raises ValueError with a message that says what to do and quotes nothing but the host."""
    if not text.isprintable() or any(c.isspace() for c in text):
        raise ValueError("holds a space or a control character: percent-encode it")
    if len(text) > MAX_URL_CHARACTERS:
        raise ValueError(f"has more than {MAX_URL_CHARACTERS} characters")
    if "\\" in text:
        raise ValueError("holds a backslash: write / or %5C")
    parts = urlsplit(text)
    if parts.scheme not in ("https", "http") or not text[len(parts.scheme) :].startswith("://"):
        raise ValueError("must start with https://")
    if "@" in parts.netloc:
        raise ValueError("holds user info (name:password@): put credentials into secrets.headers")
    if "#" in text:
        raise ValueError("holds a fragment (#…), which is never sent: remove it")
    host = parse_host(parts.hostname or "", bracketed=parts.netloc.startswith("["))
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port is None:
        if parts.netloc.endswith(":"):
            raise ValueError("has an empty port: write a number or remove the colon")
        port = 443 if parts.scheme == "https" else 80
    if not 0 < port < 65536:
        raise ValueError("has a port that is not between 1 and 65535")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if "?" in text:
        path += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]|")
    return Place(parts.scheme, host, port, path)


def parse_host(host: str, *, bracketed: bool) -> str:
    """A name in ASCII or an address in its canonical spelling. Raises ValueError, which quotes the host alone."""
    if not host:
        raise ValueError("has no host")
    if bracketed:
        address = literal(host)
        if address is None or "%" in host:
            raise ValueError(f"host [{host}] is not an IPv6 address")
        return str(address)
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except idna.IDNAError:
            raise ValueError("has a host that is not a valid international name") from None
    host = host.lower().removesuffix(".")
    address = literal(host)
    if address is not None:
        return str(address)
    if len(host) > 253 or not _LABELS.fullmatch(host):
        raise ValueError(f"host {host!r} is not a host name")
    if host.rpartition(".")[2].isdigit():
        raise ValueError(f"host {host!r} is neither a name nor an address")
    return host
