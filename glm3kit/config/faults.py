"""What is wrong with a configuration, from pydantic's errors: a line a key, with where it stands and what was expected.

    config = validated(RunConfig, values, lines, "run.yaml")
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from glm3kit.errors import ConfigError

SomeGroup = TypeVar("SomeGroup", bound=BaseModel)


def _known_part(root: type[BaseModel], loc: tuple) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The keys at the start of an error's place, and the innermost group among them (else `root`)."""
    keys, group = [], root
    for key in loc:
        keys.append(key)
        field = group.model_fields.get(key)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()  # LoraConfig | None may hold a group
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:  # what follows a plain value's key is pydantic's: places in a list, members of a union
            break
        group = inner[0]
    return tuple(keys), group


def _messages(item: Mapping[str, Any], group: type[BaseModel]) -> list[str]:
    """What an error found and what was expected, in words; group: where an unknown key stands."""
    if item["type"] == "value_error":  # of a validator of ours
        return str(item["ctx"]["error"]).splitlines()
    if item["type"] != "extra_forbidden":
        return [f"{item['msg'].replace('Input s', 's')}, got {item['input']!r}"]
    if near := difflib.get_close_matches(item["loc"][-1], list(group.model_fields), 1):
        return [f"unknown key; did you mean '{near[0]}'?"]
    return [f"unknown key; known here: {', '.join(group.model_fields)}"]


def validated(group: type[SomeGroup], values: Mapping[str, Any], lines: Mapping[tuple, int | str],
              source: str) -> SomeGroup:
    """The group of parsed values. Raises ConfigError, a line a fault: where it stands, what was found and expected.

    A validator of ours may tell of several, a line each, which begins with the key that it is about.
    lines: of each key, by its path such as ("train", "epochs"): a line of the file `source`, or a text that names
        another place.
    """
    try:
        return group(**values)
    except ValidationError as err:
        faults: dict[tuple[str, str, str], list[str]] = {}  # several messages: of the members of a union
        for item in err.errors():
            keys, holder = _known_part(group, item["loc"])
            for message in _messages(item, holder):
                ours = message if item["type"] == "value_error" else ""
                place = (*keys, *ours.split(" ")[0].split("."))
                at = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
                where = f"{source}:{at}" if isinstance(at, int) else at or source
                faults.setdefault((where, ".".join(keys), ours), []).append(message)
        raise ConfigError("\n".join(f"{where}: {key + ': ' if key else ''}{' or '.join(messages)}"
                                    for (where, key, _), messages in faults.items())) from err
