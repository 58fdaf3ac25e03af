"""Training: a step, many steps, one rank of a run."""

from glm3kit.config.groups import LoraConfig, TrainConfig
from glm3kit.train.trainer import fit

__all__ = ["LoraConfig", "TrainConfig", "fit"]
