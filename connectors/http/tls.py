"""TLS as this product speaks it: verified, 1.2 at least, with a client certificate where a destination has one."""

import functools
import os
import ssl
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from msgspec import Struct


class Identity(Struct, frozen=True, gc=False):
    """A client certificate (chain) and its key, both PEM."""

    certificate: str
    key: str


def identity_problem(certificate: str, key: str) -> str:
    """Why these cannot be a destination's `client_cert` and `client_key`; empty if they can. Quotes nothing of them."""
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode())
    except ValueError:
        return "client_cert: not a PEM certificate"
    try:
        private = load_pem_private_key(key.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return "client_key: not a PEM private key without a pass phrase"
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if chain[0].public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        return "client_key: is not the key of client_cert"
    return ""


def client_context(
    ca_file: str | None, identity: Identity | None = None, *, ca: str = "", alpn: Sequence[str] = ("http/1.1",)
) -> ssl.SSLContext:
    """`ca_file` None: the system's authorities (and SSL_CERT_FILE). `ca`: PEM, in the place of either.

    Raises ssl.SSLError for an unusable identity.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(alpn)
    if ca:
        context.load_verify_locations(cadata=ca)
    elif ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    elif identity is not None and (folder := _authorities_folder()) is not None:
        context.load_verify_locations(capath=folder)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if identity is not None:
        _load(context, identity)
    return context


@functools.cache
def _authorities_folder() -> str | None:
    """The folder of the system's authorities, one file each, where there is one.

    A context that reads from it what it needs takes 16 KB and 1.4 ms; one with all authorities 900 KB and 21 ms, which
    one context may, but not one for each destination with a client certificate.
    """
    paths = ssl.get_default_verify_paths()
    if os.environ.get(paths.openssl_cafile_env) or paths.capath is None:
        return None
    hashed = any(name.endswith(".0") for name in os.listdir(paths.capath))
    return paths.capath if hashed else None


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    # the library reads keys from files only: this one lies in memory and has no name that another process could open
    file = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(file, f"{identity.certificate}\n{identity.key}\n".encode())
        # a key under a pass phrase would ask for it on the terminal; an empty answer fails instead
        context.load_cert_chain(f"/proc/self/fd/{file}", password="")
    finally:
        os.close(file)
