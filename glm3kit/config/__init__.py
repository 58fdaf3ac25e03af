"""The configuration of a run: YAML with lines, the groups with every default, a file and its overrides."""

from glm3kit.config.groups import (
    DataConfig,
    GenerateConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from glm3kit.config.load import load_config

__all__ = ["DataConfig", "GenerateConfig", "LoraConfig", "ModelConfig", "ParallelConfig", "RunConfig", "TrainConfig",
           "load_config"]
