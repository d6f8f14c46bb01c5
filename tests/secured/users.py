"""A deployment on the secured broker: every part of it is a user of its own, with the rights of its role alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from click.testing import Result
from confluent_kafka.admin import AclBindingFilter, AdminClient

from cli.apply import Applied, apply_document
from config.acls import ROLES, Acl, Role, acls_of
from config.rights import binding, grant
from config.settings import Settings
from dev.inbox import Inbox
from dev.stack import Stack
from tests.cli.shell import headgate
from tests.deployment import Deployment, Worker


class Secured(Deployment):
    """`env` is the administrator's, so what a test looks at it looks at as that; workers and commands are their own."""

    def __init__(self, stack: Stack, inbox: Inbox, folder: Path, env: Mapping[str, str]) -> None:
        super().__init__(stack, inbox, folder, env)
        self.users = {role: stack.add_user(self.name(role)) for role in ROLES}
        for role in ROLES:
            grant(self.kafka, f"User:{self.name(role)}", self.rights(role), self.prefix)

    @property
    def kafka(self) -> dict[str, Any]:
        """How an administrator connects."""
        return self.settings.kafka.confluent()

    def name(self, role: Role) -> str:
        return f"{self.prefix}-{role}"

    def rights(self, role: Role) -> tuple[Acl, ...]:
        settings = self.settings
        return acls_of(role, settings.topics, settings.vendors[:1] if role == "producer" else settings.vendors)

    def as_user(self, role: Role, **more: str) -> Settings:
        """`more` are further settings, without their HEADGATE_."""
        return Settings.load(
            {**self.env, **self.users[role], **{f"HEADGATE_{name}": its for name, its in more.items()}}
        )

    async def run(self, role: Role, *args: str, **env: str | None) -> Result:
        """A command, by that user."""
        return await headgate(self, *args, **{**self.users[role], **env})

    async def told(self, role: Role, *args: str, **env: str | None) -> Any:
        """What it says in JSON; it must come to a good end."""
        done = await self.run(role, *args, "--output", "json", **env)
        assert done.exit_code == 0, done.output
        return msgspec.json.decode(done.stdout)

    async def told_as_admin(self, *args: str) -> Any:
        done = await headgate(self, *args, "--output", "json")
        assert done.exit_code == 0, done.output
        return msgspec.json.decode(done.stdout)

    async def publish_as_producer(self, *events: Mapping[str, Any], vendor: str = "default") -> None:
        file = self.folder / "events.ndjson"
        file.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
        assert (await self.told("producer", "publish", "-f", str(file), "--vendor", vendor))["published"] == len(events)

    # ---------------------------------------------------------------- of Deployment, by the right user

    def launch(self, name: str = "w0", command: Any = (), **env: str) -> Worker:
        mine = {key.removeprefix("HEADGATE_"): value for key, value in self.users["worker"].items()}
        return super().launch(name, command, **{**mine, **env})

    async def apply(self, document: Mapping[str, Any] | str, *, prune: bool = False) -> Applied:
        text = document if isinstance(document, str) else msgspec.json.encode(document).decode()
        return apply_document(self.as_user("control"), text, prune=prune)

    # ---------------------------------------------------------------- rights

    def give(self, role: Role, *acls: Acl) -> None:
        self.give_to(self.name(role), *acls)

    def give_to(self, user: str, *acls: Acl) -> None:
        admin = AdminClient(self.kafka)
        for future in admin.create_acls([binding(f"User:{user}", acl) for acl in acls]).values():
            future.result()

    def take(self, role: Role, *acls: Acl) -> None:
        bindings = [binding(f"User:{self.name(role)}", acl) for acl in acls]
        filters = [
            AclBindingFilter(
                one.restype, one.name, one.resource_pattern_type, one.principal, "*", one.operation, one.permission_type
            )
            for one in bindings
        ]
        admin = AdminClient(self.kafka)
        for future in admin.delete_acls(filters).values():
            assert len(future.result()) == 1
