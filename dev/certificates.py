"""The certificates of a secured embedded broker: an authority of its own, and one certificate signed by it.

They are made once, into the stack's folder, and go with it.
"""

import datetime
import ipaddress
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY: Final = "ca.pem"
AUTHORITY_KEY: Final = "ca.key"
BROKER: Final = "broker.pem"
"""Key and certificate: the broker's, and of whoever looks after it."""
COMMON_NAME: Final = "headgate-dev"
DAY: Final = datetime.timedelta(days=1)
YEARS: Final = 3650 * DAY


def make(folder: Path) -> None:
    """Writes authority and certificate, unless they are there."""
    if (folder / BROKER).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    _write(folder / AUTHORITY_KEY, pem(authority_key))
    (folder / AUTHORITY).write_bytes(authority(authority_key, YEARS))
    signed = (
        _certificate(COMMON_NAME, key.public_key(), YEARS)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder / BROKER, pem(key) + signed.public_bytes(serialization.Encoding.PEM))


def authority(key: ec.EllipticCurvePrivateKey, valid_for: datetime.timedelta) -> bytes:
    """A certificate that signs others, as PEM; one that is valid for a negative time has expired."""
    return (
        _certificate(f"{COMMON_NAME} authority", key.public_key(), valid_for)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(name: str, key: ec.EllipticCurvePublicKey, valid_for: datetime.timedelta) -> x509.CertificateBuilder:
    ends = datetime.datetime.now(datetime.UTC) + valid_for
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(f"{COMMON_NAME} authority"))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(ends, datetime.datetime.now(datetime.UTC)) - DAY)
        .not_valid_after(ends)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
