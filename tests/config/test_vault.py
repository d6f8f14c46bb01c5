"""Sealed values open for exactly what they were sealed for, and no key gets into a text."""

import copy
import json
import os
import pickle
from base64 import b64encode
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from config import vault as vault_module
from config.settings import KeySettings, SettingsError
from config.vault import MasterKeys, Unsealable, Vault, new_data_key
from schemas.control import WrappedKey, decode_control, encode_control
from schemas.ids import ExternalId, TenantRef, Vendor
from schemas.wire import Sealed, aad, unpack_sealed

ACME = TenantRef(Vendor("default"), ExternalId("acme"))
KEY = bytes(range(32))

texts = st.text(min_size=0, max_size=12)
# look-alikes: names that meet when parts are joined without their lengths, or folded, or normalised
names = st.sampled_from(
    ["acme", "acme2", "ACME", "a.b", "ac", "me", "", "1:a", "a1:", "é", "e\u0301", "dlv_1", "dlv_11"]
)
places = st.tuples(names, names, names, names, names, st.integers(1, 3))


def line(name: str, key: bytes) -> str:
    return f"{name}:{b64encode(key).decode()}"


def load(text: str, *, production: bool = False) -> MasterKeys:
    return MasterKeys.load(KeySettings(master_key=SecretStr(text), production=production))


def sealed_at(place: tuple[str, str, str, str, str, int], plaintext: bytes) -> bytes:
    vendor, tenant, purpose, destination, item, version = place
    ref = TenantRef(Vendor(vendor), ExternalId(tenant))
    return Vault(ref, {version: KEY}, version).seal(purpose, destination, item, plaintext)


def opened_at(place: tuple[str, str, str, str, str, int], sealed: bytes) -> bytes:
    vendor, tenant, purpose, destination, item, version = place
    ref = TenantRef(Vendor(vendor), ExternalId(tenant))
    return Vault(ref, {version: KEY}, version).open(purpose, destination, item, sealed)


@given(places, st.binary(max_size=200))
def test_what_is_sealed_opens_where_it_was_sealed(place: tuple[str, str, str, str, str, int], plaintext: bytes) -> None:
    assert opened_at(place, sealed_at(place, plaintext)) == plaintext


@given(places, places)
def test_a_moved_value_never_opens_though_all_share_one_key(
    place: tuple[str, str, str, str, str, int], other: tuple[str, str, str, str, str, int]
) -> None:
    sealed = sealed_at(place, b"payload")
    if place == other:
        return
    with pytest.raises(Unsealable):
        opened_at(other, sealed)


@given(st.tuples(texts, texts, texts, texts, texts), st.tuples(texts, texts, texts, texts, texts))
def test_no_two_places_share_an_aad(
    place: tuple[str, str, str, str, str], other: tuple[str, str, str, str, str]
) -> None:
    def bound(at: tuple[str, str, str, str, str]) -> bytes:
        return aad(TenantRef(Vendor(at[0]), ExternalId(at[1])), at[2], at[3], at[4], 1)

    assert (bound(place) == bound(other)) == (place == other)


def test_of_ten_thousand_swapped_values_none_opens() -> None:
    tenants = [
        TenantRef(Vendor(v), ExternalId(t))
        for v in ("default", "other")
        for t in ("acme", "acme2", "ACME", "a.b", "ac")
    ]
    purposes, destinations, items = ("delivery", "secret"), ("hook", "hook2"), ("dlv_1", "dlv_2", "signing")
    # the worst case: one and the same key everywhere, so that nothing but the binding keeps them apart
    vaults = [Vault(tenant, {1: KEY, 2: KEY}, version) for tenant in tenants for version in (1, 2)]
    places = [(vault, *rest) for vault in vaults for rest in product(purposes, destinations, items)]
    sealed = [vault.seal(purpose, destination, item, b"secret") for vault, purpose, destination, item in places]
    swaps = opened = at_home = 0
    for number, (vault, purpose, destination, item) in enumerate(places):
        for step in range(1, 44):
            swapped = sealed[(number + step * 5) % len(sealed)]
            swaps += 1
            try:
                vault.open(purpose, destination, item, swapped)
                opened += 1
            except Unsealable as fault:
                assert fault.code == "unsealable"
        at_home += vault.open(purpose, destination, item, sealed[number]) == b"secret"
    assert swaps >= 10_000
    assert opened == 0
    assert at_home == len(places)  # the control: unmoved, each of them opens


def test_a_value_under_another_version_byte_does_not_open() -> None:
    vault = Vault(ACME, {1: KEY, 2: KEY}, 1)
    sealed = vault.seal("delivery", "hook", "dlv_1", b"payload")
    relabelled = sealed[:1] + (2).to_bytes(4, "big") + sealed[5:]
    with pytest.raises(Unsealable) as caught:
        vault.open("delivery", "hook", "dlv_1", relabelled)
    assert caught.value.code == "unsealable"


@given(st.data())
def test_a_changed_byte_never_opens(data: st.DataObject) -> None:
    vault = Vault(ACME, {1: KEY}, 1)
    sealed = vault.seal("delivery", "hook", "dlv_1", b"payload")
    at = data.draw(st.integers(0, len(sealed) - 1))
    changed = bytes([*sealed[:at], sealed[at] ^ data.draw(st.integers(1, 255)), *sealed[at + 1 :]])
    with pytest.raises(Unsealable):
        vault.open("delivery", "hook", "dlv_1", changed)


@given(st.binary(max_size=100))
def test_any_other_bytes_are_unsealable(value: bytes) -> None:
    with pytest.raises(Unsealable):
        Vault(ACME, {1: KEY}, 1).open("delivery", "hook", "dlv_1", value)


def test_the_form_is_the_documented_one() -> None:
    """Format, version, nonce, ciphertext; AES-256-GCM with the AAD of `schemas.wire`, opened without our code."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = Vault(ACME, {7: KEY}, 7).seal("delivery", "hook", "dlv_1", b"payload")
    assert sealed[0] == 1
    unpacked = unpack_sealed(sealed)
    assert isinstance(unpacked, Sealed)
    assert unpacked.key_version == 7
    bound = b"7:default4:acme8:delivery4:hook5:dlv_11:7"
    assert AESGCM(KEY).decrypt(unpacked.nonce, unpacked.ciphertext, bound) == b"payload"


def test_an_earlier_key_opens_and_the_current_one_seals() -> None:
    old = Vault(ACME, {1: KEY}, 1).seal("delivery", "hook", "dlv_1", b"old")
    vault = Vault(ACME, {1: KEY, 2: new_data_key()}, 2)
    assert vault.open("delivery", "hook", "dlv_1", old) == b"old"
    assert unpack_sealed(vault.seal("delivery", "hook", "dlv_1", b"new")) is not None
    assert vault.seal("delivery", "hook", "dlv_1", b"new")[1:5] == (2).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("version", "shredded_through", "code"), [(3, 0, "unknown_key"), (1, 1, "shredded"), (3, 1, "unknown_key")]
)
def test_a_missing_key_says_whether_it_was_shredded(version: int, shredded_through: int, code: str) -> None:
    sealed = Vault(ACME, {version: KEY}, version).seal("delivery", "hook", "dlv_1", b"payload")
    vault = Vault(ACME, {1: KEY, 2: KEY}, 2, shredded_through)
    with pytest.raises(Unsealable) as caught:
        vault.open("delivery", "hook", "dlv_1", sealed)
    assert caught.value.code == code


def test_a_vault_without_its_current_key_does_not_seal() -> None:
    vault = Vault(ACME, {1: KEY}, 2)
    assert not vault.can_seal
    with pytest.raises(Unsealable):
        vault.seal("delivery", "hook", "dlv_1", b"payload")


def test_many_destinations_that_nobody_has_do_not_fill_memory() -> None:
    vault = Vault(ACME, {1: KEY}, 1)
    sealed = vault.seal("delivery", "hook", "dlv_1", b"payload")
    for number in range(5000):
        with pytest.raises(Unsealable):
            vault.open("delivery", f"made-up-{number}", "dlv_1", sealed)
    assert len(vault._bound) <= 1024
    assert vault.open("delivery", "hook", "dlv_1", sealed) == b"payload"


# ---------------------------------------------------------------- nonces


def test_nonces_do_not_repeat() -> None:
    vault = Vault(ACME, {1: KEY}, 1)
    nonces = {vault.seal("delivery", "hook", "dlv_1", b"")[5:17] for _ in range(20_000)}
    assert len(nonces) == 20_000


def _nonces_of_child(connection: Connection) -> None:
    vault = Vault(ACME, {1: KEY}, 1)
    connection.send([vault.seal("delivery", "hook", "dlv_1", b"")[5:17] for _ in range(200)])


def test_a_fork_shares_no_nonce_with_its_parent() -> None:
    vault = Vault(ACME, {1: KEY}, 1)
    vault.seal("delivery", "hook", "dlv_1", b"")
    drawn_ahead = set(vault_module._nonces)
    assert drawn_ahead  # the control: there is something that a fork would inherit
    context = get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_nonces_of_child, args=(theirs,))
    child.start()
    of_child = set(ours.recv())
    child.join()
    of_parent = {vault.seal("delivery", "hook", "dlv_1", b"")[5:17] for _ in range(200)}
    assert drawn_ahead <= of_parent
    assert not of_child & of_parent


# ---------------------------------------------------------------- master keys


def test_the_first_master_key_wraps_and_all_open(tmp_path: Path) -> None:
    first, second = os.urandom(32), os.urandom(32)
    data_key = new_data_key()
    old = load(line("k1", first))
    wrapped = old.wrap(ACME, 1, data_key)
    file = tmp_path / "master.key"
    file.write_text(f"# newest first\n\n{line('k2', second)}\n{line('k1', first)}\n")
    both = MasterKeys.load(KeySettings(master_key_file=file))
    assert both.ids == ("k2", "k1")
    assert both.unwrap(ACME, wrapped) == data_key
    assert both.wrap(ACME, 1, data_key).master == "k2"
    with pytest.raises(Unsealable) as caught:
        old.unwrap(ACME, both.wrap(ACME, 1, data_key))
    assert caught.value.code == "unknown_master"


def test_a_wrapped_key_survives_its_record() -> None:
    master = load(line("k1", KEY))
    data_key = new_data_key()
    record = decode_control(encode_control(master.wrap(ACME, 3, data_key)))
    assert isinstance(record, WrappedKey)
    assert master.unwrap(ACME, record) == data_key


@pytest.mark.parametrize(
    ("tenant", "version"),
    [
        (TenantRef(Vendor("default"), ExternalId("acme2")), 1),
        (TenantRef(Vendor("other"), ExternalId("acme")), 1),
        (ACME, 2),
    ],
)
def test_a_wrapped_key_moved_to_another_tenant_or_version_does_not_open(tenant: TenantRef, version: int) -> None:
    master = load(line("k1", KEY))
    wrapped = master.wrap(ACME, 1, new_data_key())
    relabelled = wrapped.wrapped[:1] + version.to_bytes(4, "big") + wrapped.wrapped[5:]
    for moved in (WrappedKey(version, "k1", wrapped.wrapped), WrappedKey(version, "k1", relabelled)):
        with pytest.raises(Unsealable):
            master.unwrap(tenant, moved)


GOOD = b64encode(KEY).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing",
        GOOD,
        f":{GOOD}",
        f"k 1:{GOOD}",
        f"k1:{GOOD[:-4]}",
        f"k1:{GOOD}AAAA",
        f"k1:{GOOD[:-2]}*=",
        f"k1:{GOOD}\nk1:{GOOD}",
        f"k1:{GOOD}\n{GOOD}",
        f"k1={GOOD}",
    ],
)
def test_a_wrong_master_key_is_refused_by_its_line_without_a_byte_of_it(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(text)
    told = str(caught.value)
    assert "HEADGATE_MASTER_KEY" in told
    assert "openssl rand -base64 32" in told or "its own" in told
    assert GOOD[:8] not in told


def test_no_master_key_is_a_fault_that_names_the_setting() -> None:
    with pytest.raises(SettingsError, match="HEADGATE_MASTER_KEY_FILE is not set"):
        MasterKeys.load(KeySettings())


def test_a_key_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "master.key"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(SettingsError, match="not text"):
        MasterKeys.load(KeySettings(master_key_file=file))
    with pytest.raises(SettingsError, match="cannot be read"):
        MasterKeys.load(KeySettings(master_key_file=tmp_path))


def test_a_development_key_is_known_and_refused_in_production() -> None:
    assert load(line("dev-1", KEY)).is_development
    assert not load(line("k1", KEY)).is_development
    with pytest.raises(SettingsError, match="development key"):
        load(f"{line('k1', KEY)}\n{line('dev-1', new_data_key())}", production=True)
    assert load(line("k1", KEY), production=True).ids == ("k1",)


# ---------------------------------------------------------------- prints and texts


def test_a_print_is_equal_for_the_same_value_of_one_field_only() -> None:
    vault = Vault(ACME, {1: KEY, 2: new_data_key()}, 1)
    same = vault.secret_print("hook", "signing", "whsec_abc")
    assert same == Vault(ACME, {1: KEY}, 1).secret_print("hook", "signing", "whsec_abc")
    others = {
        vault.secret_print("hook", "signing", "whsec_abd"),
        vault.secret_print("hook2", "signing", "whsec_abc"),
        vault.secret_print("hook", "other", "whsec_abc"),
        vault.secret_print("hook", "signing", "whsec_abc", version=2),
        Vault(TenantRef(Vendor("default"), ExternalId("acme2")), {1: KEY}, 1).secret_print(
            "hook", "signing", "whsec_abc"
        ),
    }
    assert len(others) == 5
    assert same not in others
    with pytest.raises(Unsealable):
        vault.secret_print("hook", "signing", "whsec_abc", version=9)


def test_no_key_is_in_a_text_or_a_pickle() -> None:
    canary = b"canary-canary-canary-canary-cana"
    assert len(canary) == 32
    shown = [canary.decode(), b64encode(canary).decode(), canary.hex(), repr(canary)]
    vault, master = Vault(ACME, {1: canary}, 1), MasterKeys({"k1": canary})
    vault.seal("delivery", "hook", "dlv_1", b"payload")
    settings = KeySettings(master_key=SecretStr(line("k1", canary)))
    told = [repr(vault), str(vault), f"{vault}", repr(master), str(master), repr(settings)]
    try:
        Vault(ACME, {1: canary}, 2).seal("delivery", "hook", "dlv_1", b"payload")
    except Unsealable as fault:
        told += [repr(fault), str(fault), json.dumps(fault.args)]
    assert not [text for text in told if any(form in text for form in shown)]
    for held in (vault, master):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError):
                pickle.dumps(held, protocol)
        with pytest.raises(TypeError):
            copy.deepcopy(held)
