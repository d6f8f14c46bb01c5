"""`headgate keys`: new keys without a stop, and the end of a key and of all that it sealed.

Every step is one transaction with the writer that fences others, and each looks at the topics for what is still to be
done: what was killed is run again (ADR 0013).
"""

from collections.abc import Callable, Sequence
from time import monotonic, time
from typing import Final

import click
import msgspec
from msgspec import Struct

from cli.groups import Group
from cli.output import (
    agrees,
    asks,
    counted,
    load_settings,
    output_option,
    printable,
    say,
    show_json,
    tenant_option,
    tenant_ref,
    told,
    vendor_option,
)
from config.erasure import Pace, duration, erase, masters_in, pace_of, remaining
from config.plan import CurrentTenant, Write, new_master
from config.provision import delete_topics
from config.rotation import (
    Rekeyed,
    begin_deletion,
    end_deletion,
    known_tenant,
    own_tag,
    rewrap,
    rotate_tenant_key,
    shred,
    tick_key,
)
from config.settings import Settings
from config.vault import MasterKeys
from config.writer import Writer
from schemas.control import WrappedKey, decode_control, parse_control_key
from schemas.ids import ExternalId, TenantRef, Vendor
from schemas.topics import record_bytes, tenant_topics

SHRED: Final = "headgate keys shred"
ROTATE: Final = "headgate keys rotate"


@click.group(cls=Group)
def group() -> None:
    """Rotate keys; shred a tenant's key, and end a removed tenant.

    A tenant's data key seals its secrets and all of its events that wait, failed or are logged. A master key, of the
    file that HEADGATE_MASTER_KEY_FILE names, wraps the data keys.
    """


# ---------------------------------------------------------------- rotate


@group.command()
@click.option("--master", is_flag=True, help="Wrap all data keys of the vendor with the first master key.")
@tenant_option("Make a new data key for this tenant.")
@click.option("--wait", is_flag=True, help="With --master: until nothing in the topic is wrapped by another.")
@vendor_option
@output_option
@told
def rotate(master: bool, tenant: ExternalId | None, wait: bool, vendor: Vendor, output: str) -> None:
    """Rotate the master key, or the data key of a tenant, while everything runs.

    \b
      headgate keys rotate --tenant acme       what is sealed from now on is sealed with a new key
      headgate keys rotate --master --wait     after a new first line in the master key file

    A tenant's earlier key versions stay, to open what they sealed; its secrets are sealed anew. Workers follow within
    2 s.

    A new master key, step by step: add its line to the file of every worker, below the others, and restart them; make
    it the first line of the file here; run this; drop the old lines once it says that they are needed no more.
    """
    if master == (tenant is not None):
        raise click.UsageError("give either --master or --tenant ID")
    if wait and not master:
        raise click.UsageError("--wait goes with --master")
    settings = load_settings(vendor)
    if tenant is None:
        return _rotate_master(settings, vendor, wait, output)
    rekeyed = rekey(settings, tenant_ref(vendor, tenant), agreed=_workers_have_it)
    if output == "json":
        show_json(
            {"vendor": vendor, "tenant": tenant, "keyVersion": rekeyed.key_version, "secretsSealed": rekeyed.secrets}
        )
    else:
        count = counted(rekeyed.secrets, "secret")
        click.echo(f"{printable(tenant)}: key version {rekeyed.key_version} is current, {count} sealed with it")
    return None


def _workers_have_it(warning: str) -> None:
    """Says the warning of a new master key, and asks on a terminal."""
    if asks() and not agrees(f"{warning}. Do all workers have it?"):
        raise click.ClickException("nothing was changed")
    say(warning)


def rekey(settings: Settings, owner: TenantRef, *, agreed: Callable[[str], None] = lambda warning: None) -> Rekeyed:
    """A new data-key version for the tenant, in force on return.

    `agreed` hears what there is to heed, before anything is written. Raises Refusal, SettingsError, KafkaFault, Fenced.
    """
    keys = MasterKeys.load(settings.keys)
    with Writer(settings.kafka.confluent(), settings.topics, owner.vendor, ROTATE) as writer:
        current = writer.current()
        rekeyed = rotate_tenant_key(owner, current, master=keys, now_ms=int(time() * 1000))
        if warning := new_master(keys, current):
            agreed(warning)
        writer.write(rekeyed.writes, record_bytes(settings.sizes.max_event_bytes))
    return rekeyed


def _rotate_master(settings: Settings, vendor: Vendor, wait: bool, output: str) -> None:
    keys = MasterKeys.load(settings.keys)
    kafka, topics = settings.kafka.confluent(), settings.topics
    with Writer(kafka, topics, vendor, f"{ROTATE} --master") as writer:
        current = writer.current()
        writes: list[Write] = []
        for name, known in current.tenants.items():
            writes += rewrap(TenantRef(vendor, name), known, keys)
        if writes and (warning := new_master(keys, current)):
            _workers_have_it(warning)
        writer.write(writes, record_bytes(settings.sizes.max_event_bytes))
    count = sum(len(known.keys) for known in current.tenants.values())
    pace = pace_of(kafka, topics)
    if wait and current.tenants:
        say(f"waiting until nothing of vendor {vendor} in topic {topics.keys} is wrapped by another master key: "
            f"about {duration(pace.expected_s)}; this may be stopped and run again")  # fmt: skip
        tick = tick_key(TenantRef(vendor, next(iter(current.tenants))))

        def counts(raw_key: bytes, value: bytes) -> bool:
            key = parse_control_key(raw_key)
            return key is not None and key.vendor == vendor and _master_of(value) not in (None, keys.first)

        erase(kafka, topics, tick, counts, pace, say)
    needed = sorted(masters_in(kafka, topics, _master_of) - {keys.first})
    if output == "json":
        show_json(
            {
                "vendor": vendor,
                "master": keys.first,
                "keys": count,
                "rewrapped": len(writes),
                "stillNeeded": needed,
            }
        )
    else:
        click.echo(f"{counted(count, 'key')} wrapped by {keys.first}, {len(writes)} of them anew")
    if needed:
        say(
            f"keep the line{'s' if len(needed) > 1 else ''} of {', '.join(needed)} in every master key file: topic "
            f"{topics.keys} holds records that need {'them' if len(needed) > 1 else 'it'}, until the broker has "
            "compacted it (--wait), or until other vendors' keys are rotated too (--vendor)"
        )
    elif len(keys.ids) > 1:
        say(f"nothing in topic {topics.keys} needs another master key than {keys.first}: the other lines can go")


def _master_of(value: bytes) -> str | None:
    try:
        record = decode_control(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return record.master if isinstance(record, WrappedKey) else None


# ---------------------------------------------------------------- shred


class Shredded(Struct, frozen=True):
    """What a shredding did. `topics`: those that it deleted; `through`: the key versions up to it are gone."""

    state: str
    through: int
    topics: tuple[str, ...]


@group.command("shred")
@tenant_option("Whose key.", required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@vendor_option
@output_option
@told
def shred_key(tenant: ExternalId, yes: bool, vendor: Vendor, output: str) -> None:
    """Destroy a tenant's key, and with it the content of everything that it sealed. It cannot be undone.

    \b
      headgate apply -f tenants.yaml --prune     the tenant is no longer in the file: removed
      headgate keys shred --tenant acme          deletes it: topics, configuration, key

    Its parked deliveries, dead letters, logged events and secrets can never be read again. A tenant that
    `apply --prune` removed is deleted. One that is active stays in the configuration, and what is parked for it is
    dropped; nothing is delivered to it until it is applied again and has a new key.

    Workers drop the key within 2 s. This goes on until the key can be read in the topic no more, some 11 minutes. It
    may be stopped, and run again.
    """
    owner = tenant_ref(vendor, tenant)
    settings = load_settings(vendor)
    started = monotonic()

    def agreed(question: str) -> bool:
        if yes:
            return True
        if not asks():
            raise click.ClickException(f"this {question}; add --yes to do it")
        return agrees(f"This {question}. Do it?")

    shredded = shred_tenant(settings, owner, say=say, agreed=agreed)
    if shredded is None:
        raise click.ClickException("nothing was changed")
    pace = pace_of(settings.kafka.confluent(), settings.topics)
    name = printable(tenant)
    say(
        f"the key of {name} is gone from every worker within 2 s, and from topic {settings.topics.keys} in about "
        f"{duration(pace.expected_s)}; stopped before that, run this again"
    )
    wait_until_gone(settings, owner, shredded.through, pace, say)
    took_s = monotonic() - started
    if output == "json":
        show_json(
            {
                "vendor": vendor,
                "tenant": tenant,
                "state": shredded.state,
                "shreddedThrough": shredded.through,
                "topicsDeleted": shredded.topics,
                "gone": True,
                "tookSeconds": round(took_s, 1),
            }
        )
    else:
        end = "deleted" if shredded.state == "deleted" else f"shredded up to key version {shredded.through}"
        click.echo(f"{name}: {end}; nothing of the key is left in topic {settings.topics.keys}")
    say(f"brokers delete the files that were compacted within {duration(pace.disk_s)} (file.delete.delay.ms)")


def shred_tenant(
    settings: Settings, owner: TenantRef, *, say: Callable[[str], None], agreed: Callable[[str], bool]
) -> Shredded | None:
    """Shreds the key; of a removed tenant also what else there is. Goes on where an earlier one was killed.

    `agreed` is asked, where there is something to do, before anything is touched; None if it says no. Raises Refusal,
    KafkaFault, Fenced.
    """
    kafka, topics = settings.kafka.confluent(), settings.topics
    max_bytes = record_bytes(settings.sizes.max_event_bytes)
    deleted: Sequence[str] = ()
    with Writer(kafka, topics, owner.vendor, f"{SHRED} --tenant …") as writer:
        current = writer.current()
        known = known_tenant(owner, current)
        state = known.record.state
        if state == "active":
            through = known.shredded_through
            if known.keys and through and remaining(kafka, topics, _versions(owner, through)):
                # what is run again after a kill must not take the key of an apply since then for the one it was to end
                say(
                    f"an earlier shredding of {printable(owner.tenant)}, up to key version {through}, is brought to "
                    f"its end; version {known.record.keyVersion}, made since, stays: run this again to shred that too"
                )
            else:
                if known.keys and not agreed(_question(owner, known)):
                    return None
                writer.write(shred(owner, known, int(time() * 1000)), max_bytes)
        elif state in ("removed", "deleting"):
            if not agreed(_question(owner, known)):
                return None
            writer.write(begin_deletion(owner, known), max_bytes)
            say(f"{printable(owner.tenant)} is being deleted: its events are dropped from now on")
            tag = own_tag(owner, current)
            if tag is not None:
                sizes = settings.sizes
                names = [spec.name for spec in tenant_topics(topics, owner.vendor, tag, sizes, staged=True)]
                deleted = delete_topics(kafka, names)
                for name in deleted:
                    say(f"topic {name} deleted")
            known = known_tenant(owner, writer.current())
            writer.write(end_deletion(owner, known, int(time() * 1000)), max_bytes)
        known = known_tenant(owner, writer.current())
    return Shredded(known.record.state, known.shredded_through, tuple(deleted))


def _question(owner: TenantRef, known: CurrentTenant) -> str:
    name = printable(owner.tenant)
    if known.record.state == "active":
        return (
            f"destroys the key of the active tenant {name}: its parked deliveries, dead letters, logged events and "
            "secrets can never be read again, and nothing is delivered to it until it is applied again"
        )
    return f"deletes the tenant {name} for good: its topics, its configuration and the key of everything it ever sealed"


def wait_until_gone(settings: Settings, owner: TenantRef, through: int, pace: Pace, say: Callable[[str], None]) -> None:
    """Returns once no key version of the tenant up to `through` can be read in the topic. Raises KafkaFault."""
    erase(settings.kafka.confluent(), settings.topics, tick_key(owner), _versions(owner, through), pace, say)


def _versions(owner: TenantRef, through: int) -> Callable[[bytes, bytes], bool]:
    """Whether a record is the tenant's key in a version up to this one."""

    def counts(raw_key: bytes, _value: bytes) -> bool:
        key = parse_control_key(raw_key)
        return (
            key is not None
            and (key.kind, key.vendor, key.tenant) == ("key", owner.vendor, owner.tenant)
            and key.id.isdecimal()
            and int(key.id) <= through
        )

    return counts
