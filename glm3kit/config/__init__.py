"""The configuration of a run: YAML with lines, the groups with every default, a file and its overrides."""

from glm3kit.config.groups import LoraConfig, TrainConfig

__all__ = ["LoraConfig", "TrainConfig"]
