"""What is wrong with a configuration, from pydantic's errors: a line a key, with where it stands and what was expected.

    except ValidationError as err: raise ConfigError("\\n".join(faults_of(err, lines, "run.yaml", RunConfig)))
"""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

OURS = "Value error, "  # how pydantic opens the message of a validator of ours


def _group(holder: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The group that a key of another group holds (or may hold, as `lora`), None for a plain value."""
    field = holder.model_fields.get(key)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _known_part(root: type[BaseModel], loc: tuple) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The keys at the start of an error's place, and the group that the last one stands in."""
    keys, holder, inner = [], root, root
    for key in loc:
        if inner is None:  # what follows a plain value's key is pydantic's: places in a list, members of a union
            break
        keys.append(key)
        holder, inner = inner, _group(inner, key)
    return tuple(keys), holder


def _messages(item: Mapping[str, Any], holder: type[BaseModel]) -> list[str]:
    """What an error found and what was expected, in words; holder: the group that its key stands in."""
    if item["type"] == "value_error":
        return item["msg"].removeprefix(OURS).splitlines()
    if item["type"] != "extra_forbidden":
        return [f"{item['msg'].replace('Input s', 's')}, got {item['input']!r}"]
    if near := difflib.get_close_matches(item["loc"][-1], list(holder.model_fields), 1):
        return [f"unknown key; did you mean '{near[0]}'?"]
    return [f"unknown key; known here: {', '.join(holder.model_fields)}"]


def faults_of(error: ValidationError, lines: Mapping[tuple, int | str], source: str,
              root: type[BaseModel]) -> list[str]:
    """One line a key with a fault: where it stands, what was found, what was expected.

    A validator of ours may tell of several, a line each, which begins with the key that it is about.
    lines: of each key, by its path such as ("train", "epochs"): a line of the file `source`, or a text that names
        another place. root: the group of the outermost keys.
    """
    faults: dict[tuple[str, str, str], list[str]] = {}  # several messages: of the members of a union
    for item in error.errors():
        keys, holder = _known_part(root, item["loc"])
        for message in _messages(item, holder):
            ours = message if item["type"] == "value_error" else ""
            place = (*keys, *ours.split(" ")[0].split("."))
            at = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
            where = f"{source}:{at}" if isinstance(at, int) else at or source
            faults.setdefault((where, ".".join(keys), ours), []).append(message)
    return [f"{where}: {key + ': ' if key else ''}{' or '.join(messages)}"
            for (where, key, _), messages in faults.items()]
