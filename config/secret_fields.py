"""How the secrets of a destination are spelled as fields: `signing`, and `headers.<name>` for each of a mapping.

A field is what is sealed, compared and rotated by itself. Of a field that can have several live values the model of its
kind takes a list, the newest first; of the others there is only one.
"""

from collections.abc import Mapping, Sequence
from typing import get_origin

from pydantic import BaseModel


def field_name(secret: str, key: str) -> str:
    """The field of one value of a mapping. The secret's name holds no dot; the key may."""
    return f"{secret}.{key}"


def overlaps(model: type[BaseModel], field: str) -> bool:
    """Whether the old value of a field stays live beside a new one."""
    known = model.model_fields.get(field)
    return known is not None and get_origin(known.annotation) is tuple


def assemble(live: Mapping[str, Sequence[str]]) -> dict[str, str | list[str] | dict[str, str]]:
    """The live values of all fields, the newest first, as the model of a kind takes them."""
    found: dict[str, str | list[str] | dict[str, str]] = {}
    for field, values in live.items():
        secret, dot, key = field.partition(".")
        if dot:
            nested = found.setdefault(secret, {})
            assert isinstance(nested, dict), f"{secret} is both a secret and a mapping"
            nested[key] = values[0]
        else:
            found[secret] = values[0] if len(values) == 1 else list(values)
    return found
