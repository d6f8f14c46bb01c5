"""Sealed values: master keys wrap a data key per tenant, which seals what is the tenant's (design, sections 5 and 8).

Owns keys and AES-256-GCM; the form and the AAD of a sealed value are `schemas/wire.py`'s. A value that was moved to
another tenant, purpose, destination, item or key version does not open (ADR 0006). No key material gets into a text:
not into `repr`, exceptions or pickles.
"""

import binascii
import hashlib
import hmac
import os
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Final, Literal, NoReturn, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from config.settings import KeySettings, SettingsError
from schemas.control import WrappedKey
from schemas.ids import TenantRef, parts
from schemas.wire import NONCE_BYTES, SEALED_FORMAT, SEALED_OVERHEAD_BYTES, aad, pack_sealed, unpack_sealed

KEY_BYTES: Final = 32
PURPOSE_DATA_KEY: Final = "data_key"
DEVELOPMENT_PREFIX: Final = "dev-"
_KEY_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REMEDY: Final = 'write lines id:base64 of 32 bytes; make one with: echo "k1:$(openssl rand -base64 32)"'
_MAX_BOUND: Final = 1024
_NONCES_DRAWN: Final = 64

UnsealableCode: TypeAlias = Literal["unknown_key", "unsealable", "shredded", "unknown_master"]


class Unsealable(Exception):
    """A value that does not open, or a key that is not there to seal with.

    `unknown_key`: this vault does not have the key version (yet). `shredded`: a marker says that the version is gone
    for good. `unknown_master`: a data key wrapped by a master key that this process was not given. `unsealable`: not of
    our form, changed, or sealed for another tenant, purpose, destination, item or version.
    """

    def __init__(self, code: UnsealableCode) -> None:
        super().__init__(code)
        self.code: UnsealableCode = code


# Nonces are drawn many at once: a system call per seal would cost a third of it. A fork forgets what was drawn, so
# that two processes never share a nonce; `list.pop` hands each to one thread only.
_nonces: list[bytes] = []


def _nonce() -> bytes:
    try:
        return _nonces.pop()
    except IndexError:
        drawn = os.urandom(NONCE_BYTES * _NONCES_DRAWN)
        _nonces.extend(drawn[at : at + NONCE_BYTES] for at in range(NONCE_BYTES, len(drawn), NONCE_BYTES))
        return drawn[:NONCE_BYTES]


os.register_at_fork(after_in_child=_nonces.clear)


def new_data_key() -> bytes:
    return os.urandom(KEY_BYTES)


class _Secretive:
    """Has no text form that shows what it holds, and cannot be pickled or copied."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds keys and cannot be pickled or copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__reduce__()


class MasterKeys(_Secretive):
    """The keys that wrap data keys. The first wraps, all open."""

    __slots__ = ("_ciphers", "first")

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """`keys` by id, 32 bytes each, at least one."""
        self._ciphers = {name: AESGCM(key) for name, key in keys.items()}
        self.first = next(iter(self._ciphers))

    @staticmethod
    def load(keys: KeySettings) -> "MasterKeys":
        """Reads the lines of `HEADGATE_MASTER_KEY` or of the file that `HEADGATE_MASTER_KEY_FILE` names.

        Raises `SettingsError`, which tells the place of a fault and nothing of what stands there.
        """
        if keys.master_key_file is not None:
            where = f"HEADGATE_MASTER_KEY_FILE={str(keys.master_key_file)!r}"
            try:
                text = keys.master_key_file.read_text("ascii")
            except OSError as fault:
                raise SettingsError([f"{where}: cannot be read ({fault.strerror})"]) from None
            except UnicodeDecodeError:
                raise SettingsError([f"{where}: not text; {_REMEDY}"]) from None
        elif keys.master_key is not None:
            where, text = "HEADGATE_MASTER_KEY", keys.master_key.get_secret_value()
        else:
            raise SettingsError(
                [
                    "HEADGATE_MASTER_KEY_FILE is not set: tenants' keys are wrapped by a master key; give a "
                    f"file that holds one, or set HEADGATE_MASTER_KEY; {_REMEDY}"
                ]
            )
        found, problems = _read_lines(text, where)
        if keys.production and any(name.startswith(DEVELOPMENT_PREFIX) for name in found):
            problems.append(
                f"{where}: holds a development key (its id starts with {DEVELOPMENT_PREFIX}), which "
                "HEADGATE_ENV=production refuses; make one for production under another id"
            )
        if problems:
            raise SettingsError(problems)
        return MasterKeys(found)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._ciphers)

    @property
    def is_development(self) -> bool:
        """Whether any of the keys is one for development."""
        return any(name.startswith(DEVELOPMENT_PREFIX) for name in self._ciphers)

    def wrap(self, tenant: TenantRef, version: int, data_key: bytes) -> WrappedKey:
        """Seals a data key for its tenant and version with the first master key."""
        nonce = _nonce()
        bound = aad(tenant, PURPOSE_DATA_KEY, "", "", version)
        wrapped = pack_sealed(version, nonce, self._ciphers[self.first].encrypt(nonce, data_key, bound))
        return WrappedKey(version, self.first, wrapped)

    def unwrap(self, tenant: TenantRef, key: WrappedKey) -> bytes:
        """The data key. Raises `Unsealable`."""
        cipher = self._ciphers.get(key.master)
        if cipher is None:
            raise Unsealable("unknown_master")
        sealed = unpack_sealed(key.wrapped)
        if sealed is None or sealed.key_version != key.version:
            raise Unsealable("unsealable")
        try:
            data_key = cipher.decrypt(
                sealed.nonce, sealed.ciphertext, aad(tenant, PURPOSE_DATA_KEY, "", "", key.version)
            )
        except InvalidTag:
            raise Unsealable("unsealable") from None
        if len(data_key) != KEY_BYTES:
            raise Unsealable("unsealable")
        return data_key

    def __repr__(self) -> str:
        return f"MasterKeys({', '.join(self._ciphers)})"


def _read_lines(text: str, where: str) -> tuple[dict[str, bytes], list[str]]:
    """The keys by id, and what is wrong, told by line number alone: a line in another order might be a key whole."""
    found: dict[str, bytes] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, encoded = line.partition(":")
        try:
            key = b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not colon or not _KEY_ID.fullmatch(name):
            problems.append(f"{where}, line {number}: does not start with an id and a colon; {_REMEDY}")
        elif len(key) != KEY_BYTES:
            problems.append(f"{where}, line {number}: what follows the id is not base64 of 32 bytes; {_REMEDY}")
        elif name in found:
            problems.append(f"{where}, line {number}: has the id of an earlier line; give each key its own")
        else:
            found[name] = key
    if not found and not problems:
        problems.append(f"{where}: holds no key; {_REMEDY}")
    return found, problems


class Vault(_Secretive):
    """One tenant's data keys by version; seals with `current`, opens with all.

    Immutable but for what it has prepared: a cipher per version, and the first part of the AAD per purpose and
    destination. Sealing 1 KB costs about 2 us.

    Nonces are random, 96 bits: safe over restarts and forks without a counter. With 2^32 sealings under one key
    version the odds that any two nonces met are 2^-33; rotate the key before that (ADR 0006).
    """

    __slots__ = (
        "_bound",
        "_ciphers",
        "_head",
        "_keys",
        "_print_keys",
        "_tail",
        "current",
        "shredded_through",
        "tenant",
    )

    def __init__(self, tenant: TenantRef, keys: Mapping[int, bytes], current: int, shredded_through: int = 0) -> None:
        """Versions up to `shredded_through` are gone for good. `current` may be missing: then nothing can be sealed."""
        self.tenant = tenant
        self.current = current
        self.shredded_through = shredded_through
        self._keys = {version: key for version, key in keys.items() if version > shredded_through}
        self._ciphers: dict[int, AESGCM] = {}
        self._print_keys: dict[int, bytes] = {}
        self._bound: dict[tuple[str, str], bytes] = {}
        self._head = bytes([SEALED_FORMAT]) + current.to_bytes(4, "big")
        self._tail = parts(str(current))

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted(self._keys))

    @property
    def can_seal(self) -> bool:
        return self.current in self._keys

    def same_keys(self, other: "Vault") -> bool:
        return (
            self.tenant == other.tenant
            and self.current == other.current
            and self.shredded_through == other.shredded_through
            and self._keys == other._keys
        )

    def seal(self, purpose: str, destination: str, item: str, plaintext: bytes) -> bytes:
        """Seals for (tenant, purpose, destination, item); `item` is a delivery's id or a field's name.

        Raises `Unsealable` if the current key is not there.
        """
        cipher = self._ciphers.get(self.current) or self._cipher(self.current)
        nonce = _nonce()
        named = item.encode()
        bound = self._bound.get((purpose, destination)) or self._bind(purpose, destination)
        return (
            self._head + nonce + cipher.encrypt(nonce, plaintext, b"%b%d:%b%b" % (bound, len(named), named, self._tail))
        )

    def open(self, purpose: str, destination: str, item: str, sealed: bytes) -> bytes:
        """What was sealed for exactly these. Raises `Unsealable`."""
        if len(sealed) < SEALED_OVERHEAD_BYTES or sealed[0] != SEALED_FORMAT:
            raise Unsealable("unsealable")
        version = int.from_bytes(sealed[1:5], "big")
        cipher = self._ciphers.get(version) or self._cipher(version)
        named = item.encode()
        bound = self._bound.get((purpose, destination)) or self._bind(purpose, destination)
        tail = self._tail if version == self.current else parts(str(version))
        try:
            return cipher.decrypt(sealed[5:17], sealed[17:], b"%b%d:%b%b" % (bound, len(named), named, tail))
        except InvalidTag:
            raise Unsealable("unsealable") from None

    def secret_print(self, destination: str, field: str, value: str, version: int | None = None) -> str:
        """A keyed hash of a secret's value: tells a changed value from the same one without opening either.

        Of no use without the data key. `version` is the key version that an earlier print was made with, the current
        one if None. Raises `Unsealable` if that key is not there.
        """
        version = self.current if version is None else version
        key = self._print_keys.get(version)
        if key is None:
            # a key of its own: the data key is for AES-GCM alone
            key = self._print_keys[version] = hmac.digest(self._key(version), b"headgate secret print", "sha256")
        tenant = self.tenant
        named = parts(tenant.vendor, tenant.tenant, destination, field, value)
        return hashlib.blake2b(named, key=key, digest_size=16).hexdigest()

    def _key(self, version: int) -> bytes:
        key = self._keys.get(version)
        if key is None:
            raise Unsealable("shredded" if 0 < version <= self.shredded_through else "unknown_key")
        return key

    def _cipher(self, version: int) -> AESGCM:
        cipher = self._ciphers[version] = AESGCM(self._key(version))
        return cipher

    def _bind(self, purpose: str, destination: str) -> bytes:
        """The AAD up to the item, as `schemas.wire.aad` spells it."""
        if len(self._bound) >= _MAX_BOUND:  # what is asked to open names destinations of its own
            self._bound.clear()
        tenant = self.tenant
        bound = self._bound[purpose, destination] = parts(tenant.vendor, tenant.tenant, purpose, destination)
        return bound

    def __repr__(self) -> str:
        return f"Vault({self.tenant.vendor}/{self.tenant.tenant}, versions {self.versions}, current {self.current})"
