"""YAML files with the line of every key: `1e-5` is a number, a key stands once, and only plain values are made.

    values, lines = read_yaml(Path("configs/tiny.yaml")); lines["train", "batch_size"]
"""

import re
from pathlib import Path
from typing import Any

import yaml

from glm3kit.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-5` is a number and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} is no text", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key '{key}' stands twice (lines {seen[key]} and {line})",
                                           key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                              list("-+0123456789"))


def _lines(node: yaml.Node | None, path: tuple = ()) -> dict[tuple, int]:
    """Map each key's path, such as ("train", "batch_size"), to its line."""
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            lines[here] = key.start_mark.line + 1
            lines |= _lines(value, here)
    return lines


def parse_yaml(text: str, source: str) -> tuple[dict, dict[tuple, int]]:
    """As `read_yaml`; source is what messages call the text."""
    try:
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
        lines = _lines(yaml.compose(text, Loader=_Loader))
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: {getattr(err, 'problem', None) or err}") from err
    if not isinstance(values, dict | None):
        raise ConfigError(f"{source}: expected groups such as 'model:' and 'train:', got {type(values).__name__}")
    return values or {}, lines


def read_yaml(path: Path) -> tuple[dict, dict[tuple, int]]:
    """The values of a YAML file, and the line of each key, by its path such as ("train", "batch_size").

    Raises ConfigError for a missing file and for what is no mapping of groups.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file; the configurations that come with the kit are in configs/") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read: {err}") from err
    return parse_yaml(text, str(path))
